import itertools

import numpy as np
import pytest

from cachefuse.errors import ConfigError, DataError, UnknownNameError
from cachefuse.metrics import METRICS
from cachefuse.metrics import thresholds as module
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.thresholds import THRESHOLD_METRICS, choose_thresholds, crossfit_decisions
from fixtures.messages import naming

ABOVE = 9.0
AXES = {"micro_f1": None, "macro_f1": 0, "samples_f1": 1}
SHAPES = [(1, 1), (1, 4), (7, 1), (6, 3), (10, 4)]

every_metric = pytest.mark.parametrize("metric", THRESHOLD_METRICS)
either_way = pytest.mark.parametrize("per_class", [False, True], ids=["one", "per-class"])


def data(seed, shape, ties=False, dtype=np.float32):
    """Return targets and scores that tell something of them; some rows, classes or all of them are negative."""
    rng = np.random.default_rng(seed)
    targets = rng.random(shape) < rng.choice([0.2, 0.5, 0.9])
    targets[:, rng.random(shape[1]) < 0.2] = False
    targets[rng.random(shape[0]) < 0.2] = False
    scores = np.clip(rng.random(shape) + rng.choice([0, 0.3]) * targets, 0, 1)
    return targets.astype(np.uint8), (scores.round(1) if ties else scores).astype(dtype)


def f1(metric, targets, predictions):
    """Return the metric by its definition."""
    hits = (targets & predictions).sum(AXES[metric])
    total = targets.sum(AXES[metric], dtype=int) + predictions.sum(AXES[metric])
    return np.mean(2 * hits / np.maximum(total, 1))


def cuts(scores):
    """Return a threshold for each way to split the scores."""
    return np.append(np.unique(scores), ABOVE)


def reached(metric, targets, scores, threshold, min_labels=0):
    """Return the metric's value, as the rest of the package works it out."""
    predictions = decide(scores, "multilabel", threshold, min_labels)
    value = METRICS[metric](targets, scores, predictions)
    assert value == pytest.approx(f1(metric, targets, predictions))
    return value


@every_metric
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_labels", [0, 1, 2])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.one_in(3)
def test_one_threshold_is_the_best_of_all(metric, shape, min_labels, ties):
    for seed in range(25):
        targets, scores = data(seed, shape, ties)
        chosen = choose_thresholds(targets, scores, metric, per_class=False, min_labels=min_labels)
        assert chosen.shape == (shape[1],)
        assert chosen.dtype == np.float64
        assert np.ptp(chosen) == 0
        best = max(f1(metric, targets, decide(scores, "multilabel", cut, min_labels)) for cut in cuts(scores))
        assert reached(metric, targets, scores, chosen, min_labels) == pytest.approx(best)
        assert reached(metric, targets, scores, float(chosen[0]), min_labels) == pytest.approx(best)


@pytest.mark.parametrize("metric", ["macro_f1", "micro_f1"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (9, 1), (30, 2), (4, 3), (3, 5)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.one_in(3)
def test_a_threshold_for_each_class_is_the_best_of_all(metric, shape, ties):
    for seed in range(15):
        targets, scores = data(seed, shape, ties)
        chosen = choose_thresholds(targets, scores, metric, per_class=True)
        assert chosen.shape == (shape[1],)
        assert chosen.dtype == np.float64
        best = max(
            f1(metric, targets, scores >= np.array(combination))
            for combination in itertools.product(*(cuts(column) for column in scores.T))
        )
        assert reached(metric, targets, scores, chosen) == pytest.approx(best)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_samples_f1_gains_from_no_change_of_one_threshold(shape, ties):
    for seed in range(15):
        targets, scores = data(seed, shape, ties)
        start = choose_thresholds(targets, scores, "samples_f1", per_class=False)
        chosen = choose_thresholds(targets, scores, "samples_f1", per_class=True)
        value = reached("samples_f1", targets, scores, chosen)
        assert value >= reached("samples_f1", targets, scores, start) - 1e-12
        for c, cut in ((c, cut) for c, column in enumerate(scores.T) for cut in cuts(column)):
            moved = chosen.copy()
            moved[c] = cut
            assert f1("samples_f1", targets, scores >= moved) <= value + 1e-12


def test_samples_f1_ends_after_so_many_rounds(monkeypatch):
    targets, scores = data(3, (300, 6))
    values = []
    for rounds in (0, 1, 100):
        monkeypatch.setattr(module, "MAX_ROUNDS", rounds)
        chosen = choose_thresholds(targets, scores, "samples_f1", per_class=True)
        values.append(reached("samples_f1", targets, scores, chosen))
    one = choose_thresholds(targets, scores, "samples_f1", per_class=False)
    assert values[0] == reached("samples_f1", targets, scores, one)
    assert values[0] < values[1] <= values[2]


@every_metric
@either_way
def test_many_rows(metric, per_class):
    targets, scores = data(1, (5000, 7))
    chosen = choose_thresholds(targets, scores, metric, per_class)
    best = reached(metric, targets, scores, chosen)
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = chosen + rng.normal(scale=0.02, size=7) if per_class else rng.choice(scores.ravel())
        assert f1(metric, targets, scores >= other) <= best + 1e-9


@every_metric
@either_way
@pytest.mark.parametrize("ties", [False, True])
def test_neither_order_nor_dtype_of_the_targets_matters(metric, per_class, ties):
    targets, scores = data(2, (500, 5), ties)
    expected = choose_thresholds(targets, scores, metric, per_class)
    rows = np.random.default_rng(0).permutation(500)
    np.testing.assert_array_equal(choose_thresholds(targets[rows], scores[rows], metric, per_class), expected)
    for dtype in (bool, np.int8, np.float32):
        np.testing.assert_array_equal(choose_thresholds(targets.astype(dtype), scores, metric, per_class), expected)


class TestPlace:
    """Where between two scores a threshold lies, and which of several it is."""

    @every_metric
    @pytest.mark.parametrize("shape", SHAPES)
    def test_midway_and_nearest_to_a_half(self, metric, shape):
        for seed in range(20):
            targets, scores = data(seed, shape, ties=True)
            levels = np.unique(scores).astype(float)
            midway = (np.append(0, levels) + np.append(levels, 2 if levels[-1] == 1 else 1)) / 2
            values = np.array([f1(metric, targets, scores >= t) for t in midway])
            best = midway[values > values.max() - 1e-9]
            chosen = choose_thresholds(targets, scores, metric, per_class=False)[0]
            assert min(abs(best - chosen)) < 1e-7
            assert abs(chosen - 0.5) == pytest.approx(min(abs(best - 0.5)))

    @pytest.mark.parametrize(
        ("targets", "scores", "threshold"),
        [
            ([0, 1, 1], [0.25, 0.5, 0.75], 0.375),
            ([1, 1], [0.25, 0.5], 0.125),
            ([1, 0], [0.0, 0.0], 0.0),
            ([1, 0, 0], [1.0, 1.0, 0.25], 0.625),
            ([1, 1, 1], [-2.0, 3.0, 5.0], -2.0),
        ],
    )
    @every_metric
    @either_way
    def test_by_hand(self, targets, scores, threshold, metric, per_class):
        column = np.array(targets)[:, None], np.array(scores, np.float32)[:, None]
        assert choose_thresholds(*column, metric, per_class).tolist() == [threshold]

    @pytest.mark.parametrize(("top", "threshold"), [(0.5, 0.75), (1.0, 1.5), (4.0, 6.0)])
    @pytest.mark.parametrize("metric", ["micro_f1", "samples_f1"])
    def test_above_all_scores_of_a_class_that_only_does_harm(self, metric, top, threshold):
        targets = np.array([[1, 0], [1, 0]])
        scores = np.array([[0.75, top], [0.75, top]], np.float32)
        assert choose_thresholds(targets, scores, metric, per_class=True).tolist() == [0.375, threshold]

    def test_a_class_without_positives_keeps_a_half_for_macro_f1(self):
        targets, scores = data(0, (20, 3))
        targets[:, 1] = 0
        assert choose_thresholds(targets, scores, "macro_f1", per_class=True)[1] == 0.5

    @every_metric
    @either_way
    @pytest.mark.parametrize("ties", [False, True])
    def test_without_positives_all_are_near_a_half(self, metric, per_class, ties):
        targets, scores = data(0, (200, 3), ties)
        chosen = choose_thresholds(np.zeros_like(targets), scores, metric, per_class)
        np.testing.assert_allclose(chosen, 0.5, atol=0.06)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("per_class", [False, True])
    def test_neighbouring_floats_are_told_apart(self, dtype, per_class):
        below = dtype(0.3)
        for _ in range(4):
            above = np.nextafter(below, dtype(1))
            scores, targets = np.array([[below], [above]]), np.array([[0], [1]])
            chosen = choose_thresholds(targets, scores, "micro_f1", per_class)
            for threshold in (chosen, chosen[0], float(chosen[0])):
                assert decide(scores, "multilabel", threshold).tolist() == [[False], [True]]
            below = above


@every_metric
@pytest.mark.parametrize("min_labels", [3, 9])
def test_when_every_label_is_predicted_anyway(metric, min_labels):
    targets, scores = data(0, (5, 3))
    assert choose_thresholds(targets, scores, metric, per_class=False, min_labels=min_labels).tolist() == [0.5] * 3


@every_metric
def test_min_labels_do_not_enter_the_search_by_class(metric):
    targets, scores = data(4, (50, 3))
    expected = choose_thresholds(targets, scores, metric, per_class=True)
    np.testing.assert_array_equal(choose_thresholds(targets, scores, metric, per_class=True, min_labels=2), expected)


def test_min_labels_change_the_best_threshold():
    # Alone, 0.4 is needed for the second row; with a label in every row anyway, it only costs the third's 0.45.
    targets = np.array([[1, 0], [1, 0], [1, 0]])
    scores = np.array([[0.9, 0.1], [0.4, 0.2], [0.8, 0.45]], np.float32)
    one = choose_thresholds(targets, scores, "micro_f1", per_class=False)
    assert one == pytest.approx([0.3, 0.3])
    with_labels = choose_thresholds(targets, scores, "micro_f1", per_class=False, min_labels=1)
    assert with_labels == pytest.approx([0.725, 0.725])


@either_way
@every_metric
class TestCrossfit:
    def test_each_part_by_the_thresholds_of_the_others(self, metric, per_class):
        targets, scores = data(5, (90, 4))
        parts = np.random.default_rng(0).choice([7, 2, 4], size=90)
        predictions = crossfit_decisions(targets, scores, parts, metric, per_class, min_labels=1)
        assert predictions.dtype == bool
        for part in (2, 4, 7):
            others = choose_thresholds(targets[parts != part], scores[parts != part], metric, per_class, min_labels=1)
            for i in np.flatnonzero(parts == part):
                np.testing.assert_array_equal(predictions[i], decide(scores[i : i + 1], "multilabel", others, 1)[0])

    def test_min_labels_fill_up_the_rows(self, metric, per_class):
        targets, scores = data(5, (90, 4))
        scores = 0.6 * targets + 0.3 * scores
        parts = np.arange(90) % 3
        np.testing.assert_array_equal(crossfit_decisions(targets, scores, parts, metric, per_class), targets)
        predictions = crossfit_decisions(targets, scores, parts, metric, per_class, min_labels=2)
        np.testing.assert_array_equal(predictions.sum(axis=1), np.maximum(targets.sum(axis=1), 2))

    def test_a_row_never_sees_its_own_targets(self, metric, per_class):
        targets, scores = data(5, (60, 4))
        parts = np.arange(60) % 3
        expected = crossfit_decisions(targets, scores, parts, metric, per_class)
        turned = np.where(parts[:, None] == 1, 1 - targets, targets)
        predictions = crossfit_decisions(turned, scores, parts, metric, per_class)
        np.testing.assert_array_equal(predictions[parts == 1], expected[parts == 1])
        assert (predictions != expected).any()

    def test_one_part_alone_has_no_others(self, metric, per_class):
        targets, scores = data(0, (4, 2))
        with pytest.raises(DataError, match="thresholds"):
            crossfit_decisions(targets, scores, np.zeros(4, int), metric, per_class)

    @pytest.mark.parametrize("shape", [(3,), (4, 2), ()])
    def test_parts_must_be_one_for_each_row(self, metric, per_class, shape):
        targets, scores = data(0, (4, 2))
        with pytest.raises(ConfigError, match=naming("parts 4")):
            crossfit_decisions(targets, scores, np.zeros(shape, int), metric, per_class)


@either_way
class TestErrors:
    @every_metric
    def test_no_rows(self, metric, per_class):
        with pytest.raises(DataError, match="thresholds"):
            choose_thresholds(np.zeros((0, 3)), np.zeros((0, 3), np.float32), metric, per_class)

    def test_unknown_metric(self, per_class):
        with pytest.raises(UnknownNameError, match=naming("threshold macro-f1 macro_f1 micro_f1 samples_f1")):
            choose_thresholds(*data(0, (4, 2)), "macro-f1", per_class)

    @pytest.mark.parametrize(("first", "second"), [((4, 2), (4, 3)), ((4,), (4,)), ((4, 1), (4, 2)), ((0, 2), (1, 2))])
    def test_shapes_that_differ(self, first, second, per_class):
        with pytest.raises(ConfigError, match=naming("targets scores")):
            choose_thresholds(np.zeros(first), np.zeros(second), "micro_f1", per_class)

    @pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
    def test_scores_that_are_not_finite(self, bad, per_class):
        targets, scores = data(0, (4, 2))
        scores[2, 1] = float(bad)
        with pytest.raises(DataError, match=naming(f"scores {bad}")):
            choose_thresholds(targets, scores, "samples_f1", per_class)
