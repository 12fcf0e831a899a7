"""The weights of a blend: against a search over all weights, by parts, for several tasks."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import log_loss as reference

from cachefuse.metrics.tasks import TaskSlice
from cachefuse.training.blend import blend, join, log_loss, select
from cachefuse.training.held_out import HeldOut

N, C = 400, 3
TASK = TaskSlice("", "multilabel", slice(0, C))


@pytest.fixture
def targets():
    return (np.random.default_rng(0).random((N, C)) < 0.4).astype(np.int8)


def scores_of(targets, noises, seed=1):
    """Probabilities (K, n, C) of models that are right but for noise of these sizes."""
    rng = np.random.default_rng(seed)
    logits = [2 * targets - 1 + noise * rng.normal(size=targets.shape) for noise in noises]
    return 1 / (1 + np.exp(-np.stack(logits)))


def test_log_loss_is_that_of_scikit_learn(targets):
    scores = scores_of(targets, [1.0])[0]
    expected = sum(reference(targets[:, c], scores[:, c]) for c in range(C))
    assert log_loss(targets, scores, [TASK]) == pytest.approx(expected)
    label, odds = np.arange(N) % C, scores / scores.sum(1, keepdims=True)
    one = TaskSlice("", "multiclass", slice(0, C))
    assert log_loss(np.eye(C)[label], odds, [one]) == pytest.approx(reference(label, odds))


def test_rows_without_a_label_do_not_count(targets):
    tasks = [TaskSlice("a", "multilabel", slice(0, 2)), TaskSlice("b", "multilabel", slice(2, 3))]
    scores, some = scores_of(targets, [1.0])[0], targets.copy()
    some[:100, 2] = -1
    expected = log_loss(targets[:, :2], scores[:, :2], [TaskSlice("", "multilabel", slice(0, 2))])
    expected += log_loss(targets[100:, 2:], scores[100:, 2:], [TaskSlice("", "multilabel", slice(0, 1))])
    assert log_loss(some, scores, tasks) == pytest.approx(expected)


def test_weights_are_nearly_the_best_of_all(targets):
    scores = scores_of(targets, [1.0, 1.5, 4.0])
    weights = select(targets, scores, [TASK])
    assert weights.sum() == pytest.approx(1)
    tried = [np.array([a, b, 10 - a - b]) / 10 for a, b in itertools.product(range(11), repeat=2) if a + b <= 10]
    best = min(log_loss(targets, np.einsum("k,knc->nc", w, scores), [TASK]) for w in tried)
    assert log_loss(targets, np.einsum("k,knc->nc", weights, scores), [TASK]) < best + 0.005
    assert weights[0] > weights[1] > weights[2]


def test_a_model_that_knows_nothing_gets_no_weight(targets):
    good = scores_of(targets, [0.3])[0]
    noise = np.random.default_rng(2).random(good.shape)
    assert select(targets, np.stack([noise, good]), [TASK]).tolist() == [0, 1]


def test_no_row_helps_to_choose_its_own_weights(targets):
    """Each half is right about its own model only, so that nested weights must take the wrong one."""
    parts = np.arange(N) % 2
    a, b = (np.where((parts == part)[:, None], targets, 1 - targets) * 0.8 + 0.1 for part in (0, 1))
    rows = np.arange(N)
    held_out = [HeldOut("oof", rows, parts, x.astype(np.float32)) for x in (a, b)]
    data = SimpleNamespace(targets=lambda rows: targets, tasks=[TASK])
    weights, joint = join(data, held_out)
    assert weights.tolist() == [0.5, 0.5]
    assert (joint.scores[targets > 0] < 0.5).all()  # by weights of the rows themselves they would be above
    assert joint.split == "oof"
    assert (joint.parts == parts).all()


def test_a_model_that_is_better_alone_gets_all_the_weight(targets):
    """Weights from few rows may be worse than none."""
    parts = np.arange(N) % 2
    a, b = (np.where((parts == part)[:, None], targets, 1 - targets) * 0.8 + 0.1 for part in (0, 1))
    held_out = [HeldOut("oof", np.arange(N), parts, x.astype(np.float32)) for x in (a, b)]
    data = SimpleNamespace(targets=lambda rows: targets, tasks=[TASK])
    weights, scores = blend(data, held_out)
    assert sorted(weights) == [0, 1]
    assert (scores.scores == held_out[int(weights.argmax())].scores).all()
    only_b = blend(data, held_out, lambda counts: not counts[0])
    assert only_b[0].tolist() == [0, 1]
