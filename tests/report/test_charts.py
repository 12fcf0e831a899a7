import re

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from cachefuse.report.charts import MAIN, Line, line_chart, log_ticks, path, text, ticks
from cachefuse.report.curves import precision_recall


@pytest.mark.parametrize("seed", range(8))
def test_precision_and_recall_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(150).astype(np.float32)
    scores = scores.round(1) if seed % 2 else scores
    targets = rng.random(150) < 0.3
    recall, precision = precision_recall(targets, scores)
    theirs = precision_recall_curve(targets, scores)
    points = {(round(float(r), 9), round(float(p), 9)) for p, r in zip(theirs[0], theirs[1], strict=True)}
    assert {(round(float(r), 9), round(float(p), 9)) for r, p in zip(recall, precision, strict=True)} <= points
    assert len(recall) == len(np.unique(scores[targets]))
    assert recall[-1] == 1
    assert (np.diff(recall) > 0).all()


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    rng = np.random.default_rng(0)
    scores, targets = rng.random(50_000), rng.random(50_000) < 0.5
    recall, precision = precision_recall(targets, scores)
    assert len(recall) == 200
    assert recall[[0, -1]].tolist() == [1 / targets.sum(), 1]
    assert precision[-1] == targets.sum() / (scores >= scores[targets].min()).sum()
    assert np.diff(recall).max() < 0.0051


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (1e5, 1.3e5),
        (8e4, 2.2e5),
        (0.1, 0.9),
        (1, 12),
        (1, 5000),
        (-3.5, 1e-3),
        (0.95, 0.95001),
        (1e4, 1e6),
        (0, 1e-7),
    ],
)
@pytest.mark.parametrize("outward", [False, True])
def test_ticks_are_round_even_and_few(low, high, outward):
    found = ticks(low, high, outward=outward)
    steps = np.diff(found)
    assert 2 <= len(found) <= 9
    assert np.allclose(steps, steps[0], rtol=1e-3)
    assert f"{steps[0]:.0e}"[0] in "125"
    slack = 1e-6 * (high - low)
    if outward:
        assert found[0] <= low + slack
        assert found[-1] >= high - slack
    else:
        assert low - slack <= found[0] <= found[-1] <= high + slack
    assert all(x == int(x) for x in ticks(1, high + 1, whole=True))
    assert len({text(x) for x in found}) == len(found) or high - low < 1e-3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (100, 1000, [100, 200, 500, 1000]),
        (1, 40, [1, 2, 5, 10, 20]),
        (100, 10_000, [100, 200, 500, 1000, 2000, 5000, 10_000]),
        (1, 10_000, [1, 10, 100, 1000, 10_000]),
        (100, 117, [100, 105, 110, 115]),
    ],
)
def test_ticks_of_a_log_axis(low, high, expected):
    assert log_ticks(low, high) == expected


def test_on_a_log_axis_powers_of_ten_are_evenly_apart():
    line = Line(MAIN, np.array([1.0, 10, 100, 1000]), np.arange(4.0))
    chart = line_chart([line], title="", about="", x_label="", y_label="", log_x=True)
    places = [x for x, label in chart.x_ticks if label in ("1", "10", "100", "1,000")]
    assert places[0] == chart.left
    assert places[-1] == chart.right
    assert np.diff(places) == pytest.approx((chart.right - chart.left) / 3, abs=0.11)
    assert chart.paths[0][1].startswith(f"M{places[0]:.1f} ")


def test_a_line_breaks_where_it_is_not_defined():
    nan = float("nan")
    assert path(np.arange(5.0), np.array([1, nan, 2, 3, nan])) == "M0.0 1.0h2M2.0 2.0L3.0 3.0"
    assert path(np.zeros(0), np.zeros(0)) == ""


def test_lines_stay_within_the_chart():
    rng = np.random.default_rng(0)
    lines = [Line(MAIN, np.arange(1.0, 31), rng.normal(size=30), mark=29) for _ in range(3)]
    chart = line_chart(lines, title="", about="", x_label="", y_label="")
    points = [tuple(map(float, pair)) for _, d, _ in chart.paths for pair in re.findall(r"([-\d.]+) ([-\d.]+)", d)]
    assert len(points) == 90
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in points)
    assert [(x, y) for _, x, y in chart.dots] == [points[29], points[59], points[89]]
    flat = line_chart([Line(MAIN, np.ones(1), np.zeros(1))], title="", about="", x_label="", y_label="")
    assert all(np.isfinite(place) for place, _ in flat.x_ticks + flat.y_ticks)
