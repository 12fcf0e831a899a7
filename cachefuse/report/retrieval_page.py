"""The figures of an alignment's report: a sentence, a table, and precision over k, each with its value by chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cachefuse.alignment.run import Alignment, Direction, Retrieval
from cachefuse.alignment.train import CURVE, KS
from cachefuse.report.charts import MAIN, SECOND, THIN, Chart, Line, line_chart
from cachefuse.report.formatting import UNDEFINED, cut


@dataclass(frozen=True)
class Row:
    """The figures of one direction on a split; a query is compared with ``among`` items.

    ``recall`` and ``chance``, the recall of a random order, are by k of ``KS``.
    """

    split: str
    n_samples: int
    name: str
    figures: Direction
    among: int
    recall: Mapping[int, float]
    chance: Mapping[int, float]


@dataclass(frozen=True)
class Curve:
    """The precision within the top k of one direction and of a random order, by k: all (n,)."""

    name: str
    k: np.ndarray
    precision: np.ndarray
    chance: np.ndarray


def rows(run: Alignment) -> list[Row]:
    """Return a row for each split and direction."""
    return [
        Row(
            split,
            result.n_samples,
            name,
            direction,
            n_compared(run, result, direction),
            {k: direction.recall.get(k, math.nan) for k in KS},
            {k: direction.chance.get(k, math.nan) for k in KS},
        )
        for split, result in run.results.items()
        for name, direction in _text_first(result.directions)
    ]


def _text_first(directions: Mapping[str, Direction]) -> list[tuple[str, Direction]]:
    """Return the directions with "text to image" first."""
    return sorted(directions.items(), key=lambda item: item[0] != "text to image")


def chance(direction: Direction, k: int, among: int) -> float:
    """Return the recall at ``k`` of a random order of the ``among`` items that a query is compared with.

    If the run has no such figure, every query is assumed to have the mean number of right items.
    """
    if k in direction.chance or among < 1:
        return direction.chance.get(k, math.nan)
    right = direction.chance.get(1, math.nan) * among
    if not among - right >= k:
        return math.nan if math.isnan(right) else 1.0
    # P(none of the first k is right) = C(among - right, k) / C(among, k); k! cancels out.
    log_wrong = math.lgamma(among - right + 1) - math.lgamma(among - right - k + 1)
    return -math.expm1(log_wrong - math.lgamma(among + 1) + math.lgamma(among - k + 1))


def n_compared(run: Alignment, result: Retrieval, direction: Direction) -> int:
    """Return the number of items that a query is compared with.

    Two encoders of the same texts do not compare a text with itself, if samples have several texts.
    """
    return direction.n_gallery - (run.same_texts and direction.n_gallery > result.n_samples)


def verdict(run: Alignment, row: Row) -> str:
    """Return a sentence on the quality of a direction, or "" if its recall is not defined."""
    names = run.side_names
    sides = next(((q, o) for q, o in ((0, 1), (1, 0)) if row.name == f"{names[q]} to {names[o]}"), None)
    if sides is None or math.isnan(row.recall[1]):
        return ""
    query, target = (run.sides[side].modality for side in sides)
    several = row.figures.n_gallery > row.n_samples
    if run.same_texts:
        right = f"another {target} of their sample" if several else "themselves"
    else:
        right = f"one of their {target}s" if several else f"their {target}"
    n = row.figures.n_queries
    return (
        f"Of {n:,} {query}{'s' * (n != 1)}, {percent(row.recall[1])} find {right} first among "
        f"{row.among:,}; by chance it would be {percent(row.chance[1])}."
    )


def percent(share: float) -> str:
    """Write a share in percent with one digit after the point, or with more if a small share needs them."""
    if math.isnan(share):
        return UNDEFINED
    digits = 1 if share >= 0.001 or not share else min(9, -math.floor(math.log10(share)) - 2)
    return f"{100 * share:.{digits}f}%"


def curves(run: Alignment, split: str) -> list[Curve]:
    """Return the precision within the top k of each direction, for k from 100 on, or from 1 if no gallery has more."""
    result = run.results[split]
    start = CURVE[0] if any(len(direction.curve) > 1 for direction in result.directions.values()) else 1
    lines = []
    for name, direction in _text_first(result.directions):
        points = {k: v for k, v in direction.recall.items() if k <= direction.n_gallery} | dict(direction.curve)
        kept = sorted((k, value) for k, value in points.items() if k >= start)
        ks = [k for k, _ in kept]
        by_chance = [chance(direction, k, n_compared(run, result, direction)) for k in ks]
        lines.append(Curve(name, np.array(ks, float), np.array([v for _, v in kept], float), np.array(by_chance)))
    return [curve for curve in lines if np.isfinite(curve.precision).any()]


def retrieval_chart(run: Alignment, split: str) -> Chart | None:
    """Return a chart of each direction's precision within the top k, with a logarithmic axis; None without curves."""
    shown = curves(run, split)
    if not shown:
        return None
    lines = [Line(THIN, curve.k, curve.chance, f"{curve.name}, by chance") for curve in shown]
    kinds = [(MAIN, SECOND)[i % 2] for i in range(len(shown))]
    lines += [Line(kind, curve.k, curve.precision, curve.name) for kind, curve in zip(kinds, shown, strict=True)]
    return line_chart(
        lines,
        title=f"Precision within the top k, {cut(split, 40)}",
        about="Share of queries with an item of their own sample among the first k, over k, in each direction.",
        x_label="k",
        y_label="precision",
        legend=[(kind, cut(curve.name)) for kind, curve in zip(kinds, shown, strict=True)] + [(THIN, "by chance")],
        log_x=True,
    )
