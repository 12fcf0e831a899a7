"""An alignment as one self-contained HTML page, and its two plots as files in the same folder."""

from pathlib import Path

from cachefuse.alignment.model import TEMPERATURE
from cachefuse.alignment.run import Alignment, shown_split
from cachefuse.data.dataset import Dataset
from cachefuse.files import write_atomically
from cachefuse.output import check_output, write_output
from cachefuse.report import alignment_plots
from cachefuse.report import provenance as about
from cachefuse.report import retrieval_page as retrieval
from cachefuse.report.charts import Chart
from cachefuse.report.curves import epochs_chart
from cachefuse.report.formatting import cut
from cachefuse.report.neighbours import examples
from cachefuse.report.render import render
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import VAL

TEMPLATE = "alignment.html.j2"


def write_alignment_report(
    run: Alignment,
    path: Path,
    store: FeatureStore | None = None,
    dataset: Dataset | None = None,
    *,
    device: str = "auto",
) -> list[Path]:
    """Write the page of ``alignment_html`` and the plots to one folder, and return their paths.

    The plots are retrieval.png and training.png; an empty plot is not written. Raises ConfigError if a path is a folder
    or its folder is missing.
    """
    plots = {path.with_name(name): draw for name, draw in alignment_plots.PLOTS.items()}
    for file in (path, *plots):
        check_output(file)
    page = alignment_html(run, store, dataset, device=device).encode()
    drawn = {plot: data for plot, draw in plots.items() if (data := draw(run)) is not None}
    write_output(path, page, own=run.path)
    for plot, data in drawn.items():
        write_atomically(plot, data)
    return [path, *drawn]


def alignment_html(
    run: Alignment,
    store: FeatureStore | None = None,
    dataset: Dataset | None = None,
    *,
    device: str = "auto",
) -> str:
    """Return an alignment's report as one HTML page: the same alignment gives the same page.

    The gallery of queries needs ``store`` and ``dataset``, the features and the raw data; without them it is left out.
    Names and texts from data are escaped. Raises as ``evaluate_alignment`` does.
    """
    split = shown_split(run.results)
    rows = retrieval.rows(run)
    shown = [row for row in rows if row.split == split]
    sides = [(side.encoder, side.modality) for side in run.sides]
    long_texts = about.long_texts(sides, store) if store is not None else []
    context: dict[str, object] = {
        "run": run,
        "split": split,
        "why_no_figures": _why_no_figures(run),
        "rows": rows,
        "shown_rows": shown,
        "verdicts": [(row.name, sentence) for row in shown if (sentence := retrieval.verdict(run, row))],
        "precision": None if split is None else retrieval.retrieval_chart(run, split),
        "gallery": examples(run, store, dataset, device) if store is not None and dataset is not None else None,
        "store_name": run.dataset if store is None else store.dataset,
        "has_raw": store is not None and dataset is not None,
        "charts": training_charts(run),
        "training_note": training_note(run),
        "temperature_note": _temperature_note(run),
        "facts": about.alignment_provenance(run) + long_texts,
        "settings": about.alignment_settings(run),
        "align_command": "" if run.parent else about.align_command(run),
        "retrieve_commands": about.retrieve_commands(run),
        "extract_commands": about.extract_commands(run),
    }
    return render(TEMPLATE, context)


def training_charts(run: Alignment) -> list[Chart]:
    """Return charts of the loss and of the validation score over the epochs.

    The score is the recall at 1; in fine-tuning it is the metric of the head.
    """
    if not run.history.epochs:
        return []
    averaged = run.config.ema and not run.parent
    kept = "validation, averaged weights (EMA)" if averaged else "validation"
    score = "score" if run.parent else "R@1"
    loss = "loss of the head" if run.parent else f"contrastive, {run.config.targets} targets"
    charts = [
        epochs_chart("Loss", loss, [run.history], {"loss": "training", "val_loss": kept}),
        epochs_chart(f"Validation {score}", score, [run.history], {"score": kept}),
    ]
    return [chart for chart in charts if chart.paths]


def training_note(run: Alignment) -> str:
    """Return the note above the curves."""
    n = len(run.history.epochs)
    note = f"{n:,} epoch{'s' * (n != 1)}; the dot marks the epoch whose weights were kept ({run.history.best_epoch:,})."
    if run.history.interrupted:
        note += " Training was interrupted."
    if run.caution:
        note += f" {run.caution[0].upper()}{run.caution[1:]}."
    if run.parent:
        return f"{note} The epochs trained {cut(run.parent)} further, together with a head."
    val = run.results.get(VAL)
    if val is not None:
        note += " R@1 is the mean of both directions."
    if val is not None and val.n_samples < run.config.batch_size:
        note += (
            f" The loss grows with the number of compared pairs. Validation compares only {val.n_samples:,} pairs, and "
            f"training up to {run.config.batch_size:,}, so the validation loss is lower."
        )
    return note


def _temperature_note(run: Alignment) -> str:
    return f"The temperature was {TEMPERATURE:g} before training, and is {run.model.temperature.item():.4f} now."


def _why_no_figures(run: Alignment) -> str:
    if run.results:
        return ""
    if run.parent:
        return (
            f"This alignment has no figures: it was fine-tuned from {cut(run.parent)} together with a head. The report "
            f"of the head has its figures. The tuned side is no longer aligned with the other side."
        )
    return "All samples were used for training, so the quality of this alignment on new samples is unknown."
