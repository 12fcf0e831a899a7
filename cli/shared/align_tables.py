"""What people see of alignments: how well the sides find each other, what was found, zero-shot, pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cachefuse.files import JsonObject
from cachefuse_cli.shared.render import MAX_CLASSES, new_table, out

if TYPE_CHECKING:
    from cachefuse.alignment.pairs import Pairs
    from cachefuse.alignment.retrieve import Found
    from cachefuse.alignment.run import Alignment, AlignmentSummary, Retrieval
    from cachefuse.alignment.similarity import Figures
    from cachefuse.alignment.zero_shot import ZeroShot
    from cachefuse.data.dataset import Dataset
    from cachefuse.store.store import FeatureStore


SHOWN_TOLERANCES = (0.25, 0.5, 1.0)


def alignment_dict(run: "Alignment") -> JsonObject:
    return {
        "run": run.name,
        "path": str(run.path),
        "dataset": run.dataset,
        "config": run.config.to_dict(),
        "sides": [asdict(side) for side in run.sides],
        "results": results_dict(run.results),
        "best_epoch": run.history.best_epoch,
        "epochs": len(run.history.epochs),
        "parameters": run.model.n_parameters,
        "size_mb": run.model.size_mb,
        "seconds": run.seconds,
    }


def results_dict(results: "Mapping[str, Retrieval]") -> JsonObject:
    return {split: asdict(result) for split, result in results.items()}


def alignment_line(run: "Alignment") -> None:
    """Say which alignment was taken."""
    from cachefuse_cli.shared.render import err

    sides = " with ".join(f"{side.encoder} ({side.modality})" for side in run.sides)
    err().print(Text.assemble(("run ", "dim"), (run.name, "bold"), f": {run.config.label} of {sides}"), soft_wrap=True)


def alignment_report(run: "Alignment") -> None:
    """Its figures, how long it took, and what to do next."""
    console = out()
    results_report(run.results)
    epochs = f"epoch {run.history.best_epoch} of {len(run.history.epochs)}"
    size = f"{run.model.n_parameters:,} parameters, {run.model.size_mb:.2f} MB"
    console.print(f"{size}; {run.seconds:.1f} s; weights of {epochs}")
    console.print(Text.assemble(("run   ", "dim"), str(run.path)), soft_wrap=True)
    query = f'cachefuse retrieve --text "{"a sentence" if run.same_texts else "what it shows"}"'
    console.print(Text.assemble(("next  ", "dim"), f"{query}, cachefuse report"), soft_wrap=True)


def results_report(results: "Mapping[str, Retrieval]") -> None:
    """A line for each direction of each split; below, the modality gap."""
    if not results:
        return
    console = out()
    figures = "R@1", "R@5", "R@10", "by chance", "median rank", "among"
    table = new_table("split", "from / to", *figures, numbers=len(figures))
    for split, result in results.items():
        for name, one in result.directions.items():
            shares = (f"{one.recall[k]:.3f}" for k in (1, 5, 10))
            chance = f"{one.chance[10]:.3f}"
            table.add_row(escape(split), escape(name), *shares, chance, f"{one.median_rank:g}", f"{one.n_gallery:,}")
            split = ""
    console.print(table)
    console.print(Text("R@k: the share of queries that find one of their own among the first k", style="dim"))
    gaps = (f"{split} {result.gap_before:.3f} to {result.gap_after:.3f}" for split, result in results.items())
    console.print(Text(f"modality gap, untrained to trained: {', '.join(gaps)}"))


def alignments_dict(found: "Sequence[AlignmentSummary]") -> list[JsonObject]:
    return [{**asdict(one), "path": str(one.path), "kind": "alignment"} for one in found]


def alignments_report(found: "Sequence[AlignmentSummary]") -> None:
    """The alignments there are, the latest first."""
    table = new_table("alignment", "of", "made", "R@1 both ways", "on", numbers=2)
    for one in found:
        recall = " ".join(f"{value:.3f}" for value in one.recall_at_1.values()) or "-"
        table.add_row(
            escape(one.name), escape(" with ".join(one.encoders)), escape(one.created[:16].replace("T", " ")), recall,
            escape(one.split or "-"),
        )  # fmt: skip
    out().print(table)


def found_dict(found: "Found", texts: Sequence[str] | None) -> JsonObject:
    shown = texts if texts is not None else [None] * len(found.matches)
    matches = [{**asdict(match), "text": text} for match, text in zip(found.matches, shown, strict=True)]
    return {"query": found.query, "modality": found.modality, "matches": matches}


def found_report(found: "Found", texts: Sequence[str] | None, space: str, store: "FeatureStore") -> None:
    """The matches, best first; with the raw data their texts."""
    where = f"{found.modality}s of {store.dataset} nearest to {found.query!r}, by {space}"
    out().print(Text(where, style="dim"))
    table = new_table("", "cosine", "sample", *(["text"] if texts is not None else []))
    for column in table.columns[:2]:
        column.justify = "right"
    for rank, match in enumerate(found.matches, start=1):
        shown = [escape(_one_line(texts[rank - 1]))] if texts is not None else []
        table.add_row(str(rank), f"{match.score:.3f}", escape(_one_line(match.id)), *shown)
    out().print(table)


def zero_shot_dict(found: "ZeroShot", space: str, store: "FeatureStore") -> JsonObject:
    return {"dataset": store.dataset, "space": space, "chance": found.chance, **asdict(found)}


def zero_shot_report(found: "ZeroShot", space: str, store: "FeatureStore") -> None:
    """Accuracy within the first 1 to 5 classes, and that of each class."""
    console = out()
    n_ranks = len(next(iter(found.accuracy.values())))
    title = f"{store.dataset}, zero-shot by {space}: {', '.join(found.prompts)}"
    console.print(Text(title, style="dim"))
    table = new_table("split", "images", *(f"top-{k}" for k in range(1, n_ranks + 1)), numbers=1 + n_ranks)
    for split, shares in found.accuracy.items():
        table.add_row(escape(split), f"{found.n_images[split]:,}", *(f"{share:.3f}" for share in shares))
    table.add_row(
        Text("by chance", style="dim"),
        "",
        *(Text(f"{k * found.chance:.3f}", style="dim") for k in range(1, n_ranks + 1)),
    )
    console.print(table)
    order = sorted(range(len(found.classes)), key=lambda c: (found.by_class[c] != found.by_class[c], found.by_class[c]))
    few = order[:MAX_CLASSES]
    which = f"classes, the {MAX_CLASSES} worst of {len(order)}" if len(few) < len(order) else "classes, the worst first"
    console.print(Text(which, style="dim"))
    classes = new_table("class", "accuracy", numbers=1)
    for c in few:
        value = found.by_class[c]
        classes.add_row(escape(found.classes[c]), "-" if value != value else f"{value:.3f}")
    console.print(classes)


def similarity_dict(found: "Mapping[str, Mapping[str, Figures]]", store: "FeatureStore") -> JsonObject:
    from cachefuse.alignment.similarity import TOLERANCES

    figures = {name: {split: asdict(one) for split, one in by.items()} for name, by in found.items()}
    scored = store.manifest.task == "similarity"
    return {"dataset": store.dataset, "encoders": figures, **({"tolerances": TOLERANCES.tolist()} if scored else {})}


def similarity_report(found: "Mapping[str, Mapping[str, Figures]]", store: "FeatureStore") -> None:
    """Encoders side by side on each split."""
    from cachefuse.alignment.similarity import Paraphrases

    if store.manifest.task == "similarity":
        out().print(_scored(found))
        low, high = store.manifest.scale or (0, 1)
        note = f"±e: share of pairs whose cosine, laid over {low:g} to {high:g}, is within e of the score"
    else:
        out().print(_paraphrases(found))
        every = [one for by in found.values() for one in by.values()]
        splits = dict.fromkeys(one.chosen_on for one in every if isinstance(one, Paraphrases))
        note = f"called similar from the cosine on that gives the best accuracy on {' or '.join(splits)}"
    out().print(Text(note, style="dim"))


def _scored(found: "Mapping[str, Mapping[str, Figures]]") -> Table:
    from cachefuse.alignment.similarity import TOLERANCES, Scored

    within = [f"±{e:g}" for e in SHOWN_TOLERANCES]
    table = new_table("encoder", "split", "pairs", "Pearson", "Spearman", *within, numbers=3 + len(within))
    for name, by in found.items():
        for split, one in by.items():
            assert isinstance(one, Scored)
            curve = one.tolerance.get("all", ())
            places = [int(abs(TOLERANCES - e).argmin()) for e in SHOWN_TOLERANCES]
            shares = [f"{curve[i]:.3f}" if curve else "-" for i in places]
            table.add_row(escape(name), split, f"{one.n_pairs:,}", f"{one.pearson:.3f}", f"{one.spearman:.3f}", *shares)
            name = ""
    return table


def _paraphrases(found: "Mapping[str, Mapping[str, Figures]]") -> Table:
    from cachefuse.alignment.similarity import Paraphrases

    columns = "pairs", "accuracy", "AP", "precision", "recall", "F1"
    table = new_table("encoder", "split", "class", *columns, numbers=len(columns))
    for name, by in found.items():
        for split, one in by.items():
            assert isinstance(one, Paraphrases)
            whole = f"{one.n_pairs:,}", f"{one.accuracy:.3f}", f"{one.average_precision:.3f}"
            for kind, figures in one.by_class.items():
                values = (f"{figures[key]:.3f}" for key in ("precision", "recall", "f1"))
                table.add_row(escape(name), escape(split), kind, *whole, *values)
                name, split, whole = "", "", ("", "", "")
    return table


def pairs_dict(pairs: "Pairs", manifest: Path) -> JsonObject:
    return {"manifest": str(manifest), "pairs": {split: len(rows) for split, rows in pairs.rows.items()}}


def pairs_report(pairs: "Pairs", dataset: "Dataset", manifest: Path) -> None:
    """How many, some of them, and what to do next."""
    console = out()
    flat = [str(text) for text in dataset.modalities["text"].feature_sources()]
    table = new_table("split", "pairs", "mean cosine", "an example", numbers=0)
    for column in table.columns[1:3]:
        column.justify = "right"
    for split, rows in pairs.rows.items():
        cosines = pairs.cosines[split]
        middle = rows[len(rows) // 2]
        example = " | ".join(_one_line(flat[row]) for row in middle)
        table.add_row(escape(split), f"{len(rows):,}", f"{cosines.mean():.3f}", escape(example))
    console.print(table)
    console.print(Text.assemble(("wrote ", "dim"), str(manifest)), soft_wrap=True)
    next_step = f"cachefuse extract --dataset {manifest} --encoder ONE --encoder ANOTHER, then cachefuse align"
    console.print(Text.assemble(("next  ", "dim"), next_step), soft_wrap=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())
