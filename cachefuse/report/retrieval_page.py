"""What an alignment's report says of its figures: a sentence, a table, the precision over k, and what is by chance."""

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
    """The figures of one direction on a split; ``recall``, and ``chance`` of a random order, are by k of ``KS``."""

    split: str
    n_samples: int
    name: str
    figures: Direction
    among: int
    recall: Mapping[int, float]
    chance: Mapping[int, float]


@dataclass(frozen=True)
class Curve:
    """The precision within the top k of one direction, and that of a random order, by k: all (n,)."""

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
            one,
            looked_among(run, result, one),
            {k: one.recall.get(k, math.nan) for k in KS},
            {k: one.chance.get(k, math.nan) for k in KS},
        )
        for split, result in run.results.items()
        for name, one in _text_first(result.directions)
    ]


def _text_first(directions: Mapping[str, Direction]) -> list[tuple[str, Direction]]:
    """Return the directions with texts that look for images before images that look for texts."""
    return sorted(directions.items(), key=lambda one: one[0] != "text to image")


def chance(one: Direction, k: int, among: int) -> float:
    """Return the recall at any ``k`` of a random order of the items that a query is looked for ``among``.

    Where that was not measured, every query is taken to have as many right items as the mean one.
    """
    if k in one.chance or among < 1:
        return one.chance.get(k, math.nan)
    right = one.chance.get(1, math.nan) * among
    if not among - right >= k:
        return math.nan if math.isnan(right) else 1.0
    # None of the first k is right: C(among - right, k) / C(among, k).
    none = math.lgamma(among - right + 1) - math.lgamma(among - right - k + 1)
    return -math.expm1(none - math.lgamma(among + 1) + math.lgamma(among - k + 1))


def looked_among(run: Alignment, result: Retrieval, one: Direction) -> int:
    """Return how many items a query is compared with: of the same texts, all but itself where samples have several."""
    return one.n_gallery - (run.same_texts and one.n_gallery > result.n_samples)


def verdict(run: Alignment, row: Row) -> str:
    """Say in a sentence how good a direction is, or nothing where that is not defined."""
    names = run.side_names
    sides = next(((q, o) for q, o in ((0, 1), (1, 0)) if row.name == f"{names[q]} to {names[o]}"), None)
    if sides is None or math.isnan(row.recall[1]):
        return ""
    asks, found = (run.sides[side].modality for side in sides)
    several = row.figures.n_gallery > row.n_samples
    if run.same_texts:
        own = f"another {found} of their sample" if several else "themselves"
    else:
        own = f"one of their {found}s" if several else f"their {found}"
    n = row.figures.n_queries
    return (
        f"Of {n:,} {asks}{'s' * (n != 1)}, {percent(row.recall[1])} find {own} first among "
        f"{row.among:,}; by chance it would be {percent(row.chance[1])}."
    )


def percent(share: float) -> str:
    """Write a share in percent, with a digit after the point, or as many as show that it is not zero."""
    if math.isnan(share):
        return UNDEFINED
    digits = 1 if share >= 0.001 or not share else min(9, -math.floor(math.log10(share)) - 2)
    return f"{100 * share:.{digits}f}%"


def curves(run: Alignment, split: str) -> list[Curve]:
    """Return the precision within the top k of each direction, for k from 100 on; from 1 where no gallery has more."""
    result = run.results[split]
    start = CURVE[0] if any(len(one.curve) > 1 for one in result.directions.values()) else 1
    found = []
    for name, one in _text_first(result.directions):
        points = {k: value for k, value in one.recall.items() if k <= one.n_gallery} | dict(one.curve)
        kept = sorted((k, value) for k, value in points.items() if k >= start)
        ks = [k for k, _ in kept]
        by_chance = [chance(one, k, looked_among(run, result, one)) for k in ks]
        found.append(Curve(name, np.array(ks, float), np.array([v for _, v in kept], float), np.array(by_chance)))
    return [curve for curve in found if np.isfinite(curve.precision).any()]


def retrieval_chart(run: Alignment, split: str) -> Chart | None:
    """Return a chart of the precision within the top k of each direction, on a logarithmic axis; None without any."""
    found = curves(run, split)
    if not found:
        return None
    lines = [Line(THIN, curve.k, curve.chance, f"{curve.name}, by chance") for curve in found]
    kinds = [(MAIN, SECOND)[i % 2] for i in range(len(found))]
    lines += [Line(kind, curve.k, curve.precision, curve.name) for kind, curve in zip(kinds, found, strict=True)]
    return line_chart(
        lines,
        title=f"Precision within the top k, {cut(split, 40)}",
        about="Share of queries with an item of their own sample among the first k, over k, in each direction.",
        x_label="k",
        y_label="precision",
        legend=[(kind, cut(curve.name)) for kind, curve in zip(kinds, found, strict=True)] + [(THIN, "by chance")],
        log_x=True,
    )
