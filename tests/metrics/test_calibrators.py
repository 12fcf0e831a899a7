import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from cachefuse.metrics import METRICS
from cachefuse.metrics.calibrators import Calibration, fit_calibration
from cachefuse.metrics.tasks import TaskSlice

LABELS = (TaskSlice("", "multilabel", slice(0, 4)),)
CLASSES = (TaskSlice("", "multiclass", slice(0, 5)),)
HALF = 8000


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def labels():
    """16,000 rows of four labels whose logits were divided by 2.5 and moved by 1: (targets, scores)."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(2 * HALF, 4)) + np.array([-3, -2, -1, 0])
    return (rng.random(logits.shape) < sigmoid(logits)).astype(np.int8), sigmoid(logits / 2.5 + 1).astype(np.float32)


@pytest.fixture(scope="module")
def classes():
    """16,000 rows of one class of five, with a temperature of 2.5: (targets, scores)."""
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(2 * HALF, 5))
    drawn = (softmax(logits).cumsum(axis=1) > rng.random((2 * HALF, 1))).argmax(axis=1)
    return np.eye(5, dtype=np.int8)[drawn], softmax(logits / 2.5).astype(np.float32)


def error(targets, scores, metric="calibration_error"):
    return METRICS[metric](targets, scores, scores > 0.5)


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_a_known_distortion_of_labels_is_undone_on_other_rows(kind, labels):
    targets, scores = labels
    calibration = fit_calibration(kind, targets[:HALF], scores[:HALF], LABELS)
    found = calibration(scores[HALF:], LABELS)
    assert found.dtype == np.float32
    assert error(targets[HALF:], scores[HALF:]) > 0.2
    assert error(targets[HALF:], found) < 0.02
    for name in ("macro_ap", "recall_at_p90"):  # each class's scores keep their order
        before, after = (METRICS[name](targets[HALF:], x, x > 0.5) for x in (scores[HALF:], found))
        assert after == pytest.approx(before, abs=0 if kind == "temperature" else 1e-4)
    np.testing.assert_allclose(calibration.slopes, 2.5, rtol=0.15)
    np.testing.assert_allclose(calibration.biases, -2.5, rtol=0.15)


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_a_known_temperature_of_classes_is_undone_on_other_rows(kind, classes):
    targets, scores = classes
    calibration = fit_calibration(kind, targets[:HALF], scores[:HALF], CLASSES)
    found = calibration(scores[HALF:], CLASSES)
    assert error(targets[HALF:], scores[HALF:], "top_calibration_error") > 0.2
    assert error(targets[HALF:], found, "top_calibration_error") < 0.02
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert calibration.slopes == pytest.approx(np.full(5, 2.5), rel=0.1)
    if kind == "temperature":
        highest = scores[HALF:].argmax(axis=1)[:, None]
        np.testing.assert_array_equal(np.take_along_axis(found, highest, axis=1)[:, 0], found.max(axis=1))


def test_temperatures_of_labels_are_the_optimum_that_scipy_finds(labels):
    targets, scores = (x[:200] for x in labels)
    logits = np.log(scores.astype(float)) - np.log1p(-scores.astype(float))

    def loss(parameters, x, truth):
        p = sigmoid(parameters[0] * x + parameters[1])
        likelihood = np.where(truth > 0, np.log(p), np.log1p(-p)).sum()
        return -likelihood + ((parameters - [1, 0]) ** 2).sum() / 2

    def optimum(x, truth):
        return minimize(loss, [1, 0], (x, truth), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}).x

    slope, bias = optimum(logits, targets)
    own = np.array([optimum(slope * logits[:, c] + bias, targets[:, c]) for c in range(4)])
    found = fit_calibration("temperature", targets, scores, LABELS)
    np.testing.assert_allclose(found.slopes, own[:, 0] * slope, rtol=1e-4)
    np.testing.assert_allclose(found.biases, own[:, 0] * bias + own[:, 1], rtol=1e-4)
    expected = sigmoid(found.slopes * logits + found.biases)
    np.testing.assert_allclose(found(scores, LABELS), expected, rtol=1e-5)


def test_the_temperature_of_classes_is_the_optimum_that_scipy_finds(classes):
    targets, scores = (x[:200] for x in classes)
    logs = np.log(scores.astype(float))
    best = minimize(
        lambda a: -np.log((softmax(a[0] * logs) * targets).sum(axis=1)).sum() + (a[0] - 1) ** 2 / 2,
        [1.0], method="Nelder-Mead", options={"xatol": 1e-8},
    )  # fmt: skip
    found = fit_calibration("temperature", targets, scores, CLASSES)
    np.testing.assert_allclose(found.slopes, best.x[0], rtol=1e-5)
    np.testing.assert_allclose(found(scores, CLASSES), softmax(best.x[0] * logs), rtol=1e-5)


def test_steps_are_those_of_scikit_learn_with_a_little_slope(labels):
    targets, scores = labels
    smooth = fit_calibration("temperature", targets, scores, LABELS)(scores, LABELS)
    found = fit_calibration("isotonic", targets, scores, LABELS)(scores, LABELS)
    for c in range(4):
        own = smooth[:, c].astype(float)
        steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(own, targets[:, c])
        np.testing.assert_allclose(found[:, c], 0.99 * steps.predict(own) + 0.01 * own, atol=1e-3)


def test_few_labels_change_little_from_the_others_and_have_no_steps(labels):
    targets, scores = (x.copy() for x in labels)
    targets[:, 0] = 0
    targets[:3, 0] = 1
    found = fit_calibration("isotonic", targets[:400], scores[:400], LABELS)
    assert 0 not in found.steps
    common = fit_calibration("temperature", targets[:0], scores[:0], LABELS)
    np.testing.assert_array_equal((common.slopes, common.biases), ([1] * 4, [0] * 4))  # of no rows: no change
    tiny = targets[:400, :1], scores[:400, :1]
    alone = fit_calibration("temperature", tiny[0], tiny[1], (TaskSlice("", "multilabel", slice(0, 1)),))
    assert found.slopes[0] > alone.slopes[0]  # drawn to the slope of 2.5 of the others


@pytest.mark.parametrize("truth", [np.zeros, np.ones])
def test_extreme_scores_and_labels_stay_finite_and_in_order(truth):
    scores = np.array([[0, 1e-38, 1e-9, 0.5, 1 - 2**-24, 1]], np.float32).T
    task = (TaskSlice("", "multilabel", slice(0, 1)),)
    calibration = fit_calibration("isotonic", truth(scores.shape), scores, task)
    found = calibration(scores, task)
    assert np.isfinite(found).all()
    assert (np.diff(found[:, 0].astype(float)) >= 0).all()
    assert (calibration.slopes > 0).all()


def test_rows_without_a_tasks_label_teach_it_nothing(labels, classes):
    targets = np.concatenate([labels[0], classes[0]], axis=1)
    scores = np.concatenate([labels[1], classes[1]], axis=1)
    tasks = (TaskSlice("a", "multilabel", slice(0, 4)), TaskSlice("b", "multiclass", slice(4, 9)))
    targets[1000:, :4], targets[:1000, 4:] = -1, -1
    both = fit_calibration("isotonic", targets, scores, tasks)
    first = fit_calibration("isotonic", labels[0][:1000], labels[1][:1000], LABELS)
    second = fit_calibration("isotonic", classes[0][1000:], classes[1][1000:], CLASSES)
    np.testing.assert_array_equal(both.slopes, [*first.slopes, *second.slopes])
    assert both.steps.keys() == first.steps.keys() | {4 + c for c in second.steps}
    expected = np.concatenate([first(labels[1], LABELS), second(classes[1], CLASSES)], axis=1)
    np.testing.assert_array_equal(both(scores, tasks), expected)


def test_pieces_of_rows_and_no_rows(labels, monkeypatch):
    calibration = fit_calibration("isotonic", *labels, LABELS)
    whole = calibration(labels[1], LABELS)
    monkeypatch.setattr("cachefuse.metrics.base.AT_ONCE", 400)
    np.testing.assert_array_equal(calibration(labels[1], LABELS), whole)
    assert calibration(labels[1][:0], LABELS).shape == (0, 4)


def test_as_plain_numbers():
    calibration = Calibration(np.array([1.0, 2.0]), np.zeros(2), {1: (np.array([0.1, 0.9]), np.array([0.0, 1.0]))})
    assert calibration.as_dict() == {
        "slopes": [1.0, 2.0], "biases": [0.0, 0.0], "steps": {"1": [[0.1, 0.9], [0.0, 1.0]]},
    }  # fmt: skip
