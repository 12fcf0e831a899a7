"""Tables of alignments: recall, matches, zero-shot, similarity, pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject
from cachefuse_cli.shared.console import Table, Text, err, new_table, out
from cachefuse_cli.shared.render import MAX_CLASSES, note

if TYPE_CHECKING:
    from cachefuse.alignment.pairs import Pairs
    from cachefuse.alignment.retrieve import QueryResult
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
        "caution": run.caution,
        "best_epoch": run.history.best_epoch,
        "epochs": len(run.history.epochs),
        "parameters": run.model.n_parameters,
        "size_mb": run.model.size_mb,
        "seconds": run.seconds,
    }


def results_dict(results: "Mapping[str, Retrieval]") -> JsonObject:
    return {split: asdict(result) for split, result in results.items()}


def alignment_line(run: "Alignment") -> None:
    """Print the alignment in use."""
    sides = " with ".join(f"{side.encoder} ({side.modality})" for side in run.sides)
    err().print(Text.assemble(("run ", "dim"), (run.name, "bold"), f": {run.config.label} of {sides}"), soft_wrap=True)


def alignment_report(run: "Alignment") -> None:
    """Print an alignment's figures, time and next step."""
    console = out()
    results_report(run.results)
    if run.caution:
        note(run.caution)
    epochs = f"epoch {run.history.best_epoch} of {len(run.history.epochs)}"
    size = f"{run.model.n_parameters:,} parameters, {run.model.size_mb:.2f} MB"
    console.print(f"{size}; {run.seconds:.1f} s; weights of {epochs}")
    console.print(Text.assemble(("run   ", "dim"), str(run.path)), soft_wrap=True)
    query = f'cachefuse retrieve --text "{"a sentence" if run.same_texts else "what it shows"}"'
    console.print(Text.assemble(("next  ", "dim"), f"{query}, cachefuse report"), soft_wrap=True)


def results_report(results: "Mapping[str, Retrieval]") -> None:
    """Print a line per split and direction, then the modality gap."""
    if not results:
        return
    console = out()
    figures = "R@1", "R@5", "R@10", "by chance", "median rank", "among"
    table = new_table("split", "from / to", *figures, numbers=len(figures))
    for split, result in results.items():
        for name, ranks in result.directions.items():
            shares = (f"{ranks.recall[k]:.3f}" for k in (1, 5, 10))
            chance = f"{ranks.chance[10]:.3f}"
            table.add_row(split, name, *shares, chance, f"{ranks.median_rank:g}", f"{ranks.n_gallery:,}")
            split = ""
    console.print(table)
    console.print(Text("R@k: the share of queries with an item of their own among the first k", style="dim"))
    gaps = (f"{split} {result.gap_before:.3f} to {result.gap_after:.3f}" for split, result in results.items())
    console.print(Text(f"modality gap, untrained to trained: {', '.join(gaps)}"))


def alignments_dict(summaries: "Sequence[AlignmentSummary]") -> list[JsonObject]:
    return [{**asdict(summary), "path": str(summary.path), "kind": "alignment"} for summary in summaries]


def alignments_report(summaries: "Sequence[AlignmentSummary]") -> None:
    """Print the alignments, the latest first."""
    table = new_table("alignment", "encoders", "created", "R@1 by direction", "split", numbers=2)
    for summary in summaries:
        recall = " ".join(f"{value:.3f}" for value in summary.recall_at_1.values()) or "-"
        table.add_row(
            summary.name,
            " with ".join(summary.encoders),
            summary.created[:16].replace("T", " "),
            recall,
            f"{summary.split or '-'}{', which chose the epoch' if summary.caution else ''}",
        )
    out().print(table)


def matches_dict(result: "QueryResult", texts: Sequence[str] | None) -> JsonObject:
    shown = texts if texts is not None else [None] * len(result.matches)
    matches = [{**asdict(match), "text": text} for match, text in zip(result.matches, shown, strict=True)]
    return {"query": result.query, "modality": result.modality, "matches": matches}


def matches_report(result: "QueryResult", texts: Sequence[str] | None, space: str, store: "FeatureStore") -> None:
    """Print the matches, best first, with their texts if they are known."""
    title = f"{result.modality}s of {store.dataset} nearest to {result.query!r}, by {space}"
    out().print(Text(title, style="dim"))
    table = new_table("", "cosine", "sample", *(["text"] if texts is not None else []))
    for column in table.columns[:2]:
        column.justify = "right"
    for rank, match in enumerate(result.matches, start=1):
        shown = [texts[rank - 1]] if texts is not None else []
        table.add_row(str(rank), f"{match.score:.3f}", match.id, *shown)
    out().print(table)


def zero_shot_dict(result: "ZeroShot", space: str, store: "FeatureStore") -> JsonObject:
    return {"dataset": store.dataset, "space": space, "chance": result.chance, **asdict(result)}


def zero_shot_report(result: "ZeroShot", space: str, store: "FeatureStore") -> None:
    """Print the top-1 to top-5 accuracy, and the accuracy per class."""
    console = out()
    n_ranks = len(next(iter(result.accuracy.values())))
    title = f"{store.dataset}, zero-shot by {space}: {', '.join(result.prompts)}"
    console.print(Text(title, style="dim"))
    table = new_table("split", "images", *(f"top-{k}" for k in range(1, n_ranks + 1)), numbers=1 + n_ranks)
    for split, shares in result.accuracy.items():
        table.add_row(split, f"{result.n_images[split]:,}", *(f"{share:.3f}" for share in shares))
    table.add_row(
        Text("by chance", style="dim"),
        "",
        *(Text(f"{k * result.chance:.3f}", style="dim") for k in range(1, n_ranks + 1)),
    )
    console.print(table)
    order = sorted(
        range(len(result.classes)), key=lambda c: (result.by_class[c] != result.by_class[c], result.by_class[c])
    )
    shown = order[:MAX_CLASSES]
    title = f"classes, the {MAX_CLASSES} worst of {len(order)}" if order[MAX_CLASSES:] else "classes, the worst first"
    console.print(Text(title, style="dim"))
    classes = new_table("class", "accuracy", numbers=1)
    for c in shown:
        value = result.by_class[c]
        classes.add_row(result.classes[c], "-" if value != value else f"{value:.3f}")
    console.print(classes)


def similarity_dict(results: "Mapping[str, Mapping[str, Figures]]", store: "FeatureStore") -> JsonObject:
    from cachefuse.alignment.similarity import TOLERANCES

    by_encoder = {
        name: {split: asdict(figures) for split, figures in by_split.items()} for name, by_split in results.items()
    }
    scored = store.manifest.task == "similarity"
    return {"dataset": store.dataset, "encoders": by_encoder, **({"tolerances": TOLERANCES.tolist()} if scored else {})}


def similarity_report(results: "Mapping[str, Mapping[str, Figures]]", store: "FeatureStore") -> None:
    """Print the figures of each encoder on each split."""
    from cachefuse.alignment.similarity import Paraphrases

    if store.manifest.task == "similarity":
        out().print(_correlations(results))
        low, high = store.manifest.scale or (0, 1)
        note = f"±e: share of pairs whose cosine, scaled to {low:g} to {high:g}, is within e of the score"
    else:
        out().print(_paraphrases(results))
        all_figures = [figures for by_split in results.values() for figures in by_split.values()]
        splits = dict.fromkeys(figures.chosen_on for figures in all_figures if isinstance(figures, Paraphrases))
        note = f"similar if the cosine reaches the threshold with the best accuracy on {' or '.join(splits)}"
    out().print(Text(note, style="dim"))


def _correlations(results: "Mapping[str, Mapping[str, Figures]]") -> Table:
    from cachefuse.alignment.similarity import TOLERANCES, ScoredPairs

    within = [f"±{e:g}" for e in SHOWN_TOLERANCES]
    table = new_table("encoder", "split", "pairs", "Pearson", "Spearman", *within, numbers=3 + len(within))
    for name, by_split in results.items():
        for split, figures in by_split.items():
            assert isinstance(figures, ScoredPairs)
            curve = figures.tolerance.get("all", ())
            places = [int(abs(TOLERANCES - e).argmin()) for e in SHOWN_TOLERANCES]
            shares = [f"{curve[i]:.3f}" if curve else "-" for i in places]
            table.add_row(
                name,
                split,
                f"{figures.n_pairs:,}",
                f"{figures.pearson:.3f}",
                f"{figures.spearman:.3f}",
                *shares,
            )
            name = ""
    return table


def _paraphrases(results: "Mapping[str, Mapping[str, Figures]]") -> Table:
    from cachefuse.alignment.similarity import Paraphrases

    columns = "pairs", "accuracy", "AP", "precision", "recall", "F1"
    table = new_table("encoder", "split", "class", *columns, numbers=len(columns))
    for name, by_split in results.items():
        for split, figures in by_split.items():
            assert isinstance(figures, Paraphrases)
            of_split = f"{figures.n_pairs:,}", f"{figures.accuracy:.3f}", f"{figures.average_precision:.3f}"
            for kind, class_figures in figures.by_class.items():
                values = (f"{class_figures[key]:.3f}" for key in ("precision", "recall", "f1"))
                table.add_row(name, split, kind, *of_split, *values)
                name, split, of_split = "", "", ("", "", "")
    return table


def pairs_dict(pairs: "Pairs", manifest: Path) -> JsonObject:
    return {"manifest": str(manifest), "pairs": {split: len(rows) for split, rows in pairs.rows.items()}}


def pairs_report(pairs: "Pairs", dataset: "Dataset", manifest: Path) -> None:
    """Print the number of pairs, an example per split, and the next step."""
    console = out()
    texts = [str(text) for text in dataset.modalities["text"].feature_sources()]
    table = new_table("split", "pairs", "mean cosine", "an example", numbers=0)
    for column in table.columns[1:3]:
        column.justify = "right"
    for split, rows in pairs.rows.items():
        cosines = pairs.cosines[split]
        middle = rows[len(rows) // 2]
        example = " | ".join(texts[row] for row in middle)
        table.add_row(split, f"{len(rows):,}", f"{cosines.mean():.3f}", example)
    console.print(table)
    console.print(Text.assemble(("wrote ", "dim"), str(manifest)), soft_wrap=True)
    next_step = f"cachefuse extract --dataset {manifest} --encoder ONE --encoder ANOTHER, then cachefuse align"
    console.print(Text.assemble(("next  ", "dim"), next_step), soft_wrap=True)
