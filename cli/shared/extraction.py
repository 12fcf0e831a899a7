"""The extraction of a dataset's features, for every command that makes them, and its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefuse.files import JsonObject
from cachefuse_cli.shared.console import Text, new_table, out
from cachefuse_cli.shared.options import chosen_encoders

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.extraction.extract import ExtractReport
    from cachefuse.store.store import FeatureStore


def extract_features(
    dataset: "Dataset", encoder: list[str] | None, workspace: Path, *, no_lexical: bool = False, **options: Any
) -> "ExtractReport":
    """Extract a dataset's features into its store in a workspace, with a progress bar.

    ``encoder`` are the specs given, None for the default; ``options`` are those of ``cachefuse.extract``.
    """
    from cachefuse_cli.shared import render

    with render.status("loading torch and the encoders"):
        from cachefuse.encoders import LEXICAL
        from cachefuse.extraction.extract import extract
        from cachefuse.workspace import WorkspacePaths
        from cachefuse_cli.shared.progress import ExtractBar
    encoders = chosen_encoders(encoder, dataset, workspace, no_lexical)
    with ExtractBar() as progress:
        report = extract(
            dataset, encoders, WorkspacePaths(workspace).store(dataset.name), on_progress=progress.update, **options
        )
    lexical = (LEXICAL, "text")
    if report.computed.get(lexical) and LEXICAL not in (encoder or []):
        render.note(
            f"added the n-grams of {report.computed[lexical]:,} texts (encoder lexical) in "
            f"{progress.seconds[lexical]:.1f} s; --no-lexical leaves them out"
        )
    return report


def ensure_features(
    dataset: "Dataset", encoder: list[str] | None, workspace: Path, device: str
) -> tuple["FeatureStore", list[str]]:
    """Return a dataset's store, and the encoders given with the n-grams; extract what it lacks first.

    Without ``encoder``, these are all that the store was asked for, and the default for a new store.
    """
    from cachefuse.store.store import FeatureStore
    from cachefuse.workspace import WorkspacePaths

    path = WorkspacePaths(workspace).store(dataset.name)
    store = FeatureStore(path) if (path / "zarr.json").is_file() else None
    wanted = chosen_encoders(encoder, dataset, workspace, no_lexical=False) if encoder else []
    if store is None or not _has_features(store, dataset, wanted):
        asked = [] if store is None else [spec for sources in store.asked.values() for spec in sources.values()]
        specs = encoder or list(dict.fromkeys(asked)) or None
        extract_features(dataset, specs, workspace, device=device)
        store = FeatureStore(path)
    return store, wanted


def _has_features(store: "FeatureStore", dataset: "Dataset", encoders: list[str]) -> bool:
    """Whether a store holds a dataset's samples, and all their features of the encoders, by default of those asked."""
    import numpy as np

    from cachefuse.encoders.base import EncoderSpec
    from cachefuse.feature_spec import NGRAMS, POOLED

    found = [(features.encoder, features) for features in store.features()]
    names = {EncoderSpec.parse(spec).absolute().short for spec in encoders} or {name for name, _ in found}
    held = ((store.ids, dataset.ids), (store.splits, dataset.splits), (store.targets, dataset.targets))
    return (
        bool(names)
        and names <= {name for name, _ in found}
        and not any(name in names or not encoders for name, _ in store.lost_features())
        and all(f.is_complete(POOLED) or f.is_complete(NGRAMS) for name, f in found if name in names)
        and all(np.array_equal(np.asarray(mine), np.asarray(theirs)) for mine, theirs in held)
    )


def extract_dict(report: "ExtractReport") -> JsonObject:
    return {
        "store": str(report.store),
        "features": [
            {
                "encoder": encoder,
                "modality": modality,
                "rows": rows,
                "computed": report.computed[(encoder, modality)],
                "long_texts": long.to_dict() if (long := report.long.get((encoder, modality))) is not None else None,
            }
            for (encoder, modality), rows in report.rows.items()
        ],
        "bad": [vars(line) for line in report.bad],
    }


NEXT = {
    "retrieval": "cachefuse align, with two encoders",
    "similarity": "cachefuse similarity",
    "paraphrase": "cachefuse similarity",
}


def extract_report(report: "ExtractReport", task: str) -> None:
    """Print the rows in the store and computed now, the bad samples, and the next step."""
    console = out()
    table = new_table("encoder", "modality", "rows", "computed now", numbers=2)
    for (encoder, modality), rows in report.rows.items():
        computed = report.computed[(encoder, modality)]
        table.add_row(encoder, modality, f"{rows:,}", f"{computed:,}" if computed else "0 (all in the store)")
    console.print(table)
    if not any(report.computed.values()):
        console.print("Nothing to compute: all features were already there.")
    for (encoder, modality), long in report.long.items():
        if long.message:
            console.print(Text.assemble((f"{encoder} ({modality}): ", "dim"), long.message), soft_wrap=True)
    if report.bad:
        console.print(f"{len(report.bad):,} unusable samples (their rows are kept, and marked absent):")
        for line in report.bad[:10]:
            source = f" ({line.source})" if line.source else ""
            console.print(Text(f"  {line.id} {line.modality}: {line.reason}{source}"), soft_wrap=True)
        if len(report.bad) > 10:
            console.print(Text(f"  ... {report.store / 'samples' / 'bad.jsonl'} lists all of them"), soft_wrap=True)
    console.print(Text.assemble(("store ", "dim"), str(report.store)), soft_wrap=True)
    console.print(Text.assemble(("next  ", "dim"), NEXT.get(task, "cachefuse train-head")), soft_wrap=True)
