"""Metrics of answers to questions: right in part, and of very many classes."""

import tracemalloc

import numpy as np
import pytest

from cachefuse.data.answers import N_ANSWERS, vqa_accuracy
from cachefuse.errors import DataError
from cachefuse.metrics import METRICS, evaluation_metrics
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.per_class import per_class
from fixtures.messages import naming


class TestAnswers:
    """Targets that say how right each answer is."""

    def test_accuracy_is_that_of_the_answers_given(self):
        rng = np.random.default_rng(0)
        answers = np.where((answers := rng.integers(-2, 5, (60, N_ANSWERS))) == -1, -2, answers)
        answers[0] = -2  # none of them is a class
        targets = np.stack([vqa_accuracy(np.full(60, c), answers) for c in range(5)], axis=1)
        np.testing.assert_allclose(targets[0], 0)
        scores = rng.random((60, 5))
        predictions = decide(scores, "vqa")
        assert (predictions.sum(1) == 1).all()
        right = vqa_accuracy(scores.argmax(1), answers)
        assert METRICS["vqa_accuracy"](targets, scores, predictions) == pytest.approx(right.mean())
        weights = rng.integers(0, 4, (60, 3)).astype(float)
        found = METRICS["vqa_accuracy"].weighted(targets, scores, predictions)(weights)
        np.testing.assert_allclose(found, weights.T @ right / weights.sum(0))

    def test_to_the_others_an_answer_is_right_if_it_is_wholly_so(self):
        targets = np.array([[1, 2 / 3], [1 / 3, 1], [2 / 3, 0]])
        predictions = np.array([[True, False], [True, False], [True, False]])
        figures = per_class(targets, np.array([[0.9, 0.1]] * 3), predictions)
        assert figures["support"].tolist() == [1, 1]
        np.testing.assert_allclose(figures["precision"], [1 / 3, 0])
        np.testing.assert_allclose(figures["recall"], [1, 0])

    @pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
    def test_what_is_no_share(self, value):
        with pytest.raises(DataError, match=naming(f"targets 0 1 {value}")):
            METRICS["vqa_accuracy"](np.array([[value]]), np.ones((1, 1)), np.ones((1, 1), bool))


@pytest.mark.parametrize("function", [*map(METRICS.__getitem__, evaluation_metrics("vqa", 3129)), per_class])
@pytest.mark.slow
def test_many_answers_take_little_memory_beside_the_scores(function, monkeypatch):
    monkeypatch.setattr("cachefuse.metrics.base.AT_ONCE", 1 << 16)
    monkeypatch.setattr("cachefuse.metrics.ranking.KEPT", 1 << 16)
    rng = np.random.default_rng(0)
    scores = rng.random((1500, 1000), np.float32)
    targets = np.eye(1000, dtype=np.float32)[rng.integers(1000, size=1500)]
    predictions = decide(scores, "vqa")
    function(targets[:9], scores[:9], predictions[:9])  # imports what it takes
    tracemalloc.start()
    function(targets, scores, predictions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * scores.nbytes
