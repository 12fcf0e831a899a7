"""Paired comparisons against the definitions of their tests in float64, and scikit-learn's metrics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, poisson
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from cachefuse.experiments import verdict
from cachefuse.experiments.results import SettingResult, SweepResult, Trial
from cachefuse.experiments.verdict import judge
from cachefuse.metrics import METRICS
from cachefuse.metrics.bootstrap import bootstrap_intervals, resample
from cachefuse.metrics.paired import difference, holm, mcnemar, not_worse, right_rows, worse
from cachefuse.metrics.tasks import OfTask, TaskSlice
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.held_out import HeldOut
from cachefuse.training.resolved import resolve

REFERENCES = {
    "micro_f1": lambda t, s, p: f1_score(t, p, average="micro", zero_division=0),
    "samples_f1": lambda t, s, p: f1_score(t, p, average="samples", zero_division=0),
    "exact_match": lambda t, s, p: accuracy_score(t, p),
    "micro_ap": lambda t, s, p: average_precision_score(t.ravel(), s.ravel()),
}


def two_models(n=60, classes=5, seed=0):
    """Targets, and scores and predictions of two models that share most of their errors."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, classes)) < 0.3).astype(np.int8)
    shared = rng.normal(size=(n, classes))
    both = []
    for _ in range(2):
        scores = 1 / (1 + np.exp(-(2 * targets - 1 + shared + 0.4 * rng.normal(size=(n, classes)))))
        both.append((scores, scores >= 0.5))
    return targets, *both


def paired(targets, first, second, name, n_resamples=300, seed=0, groups=None):
    figures = [
        resample(METRICS[name].weighted(targets, *model), len(targets), n_resamples, seed, 64, groups)
        for model in (first, second)
    ]
    return figures[0] - figures[1]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_difference_is_that_of_the_same_repeated_rows(name):
    targets, first, second = two_models()
    value = METRICS[name](targets, *first) - METRICS[name](targets, *second)
    found = difference(value, paired(targets, first, second, name, 50))
    rng, apart = np.random.default_rng(0), []
    for _ in range(50):
        rows = rng.integers(60, size=60)
        a, b = (REFERENCES[name](targets[rows], s[rows], p[rows]) for s, p in (first, second))
        apart.append(a - b)
    apart = np.array(apart, np.float64)
    low, high = np.quantile(apart, [0.025, 0.975])
    below, above = sum(x <= 1e-12 for x in apart), sum(x >= -1e-12 for x in apart)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert found.p == pytest.approx(min(1, 2 * (min(below, above) + 1) / 51))


def test_an_interval_has_the_difference_in_it():
    """Average precision of a poor model is higher on rows drawn again, so the resampled differences lie below it."""
    targets = np.random.default_rng(0).random((400, 200)) < 0.01
    scores = [np.where(targets, 1, 0) * 0.9 + 0.01, np.random.default_rng(1).random(targets.shape)]
    models = [(x, x >= 0.5) for x in scores]
    value = METRICS["macro_ap"](targets, *models[0]) - METRICS["macro_ap"](targets, *models[1])
    apart = paired(targets, *models, "macro_ap")
    assert np.quantile(apart, 0.975) < value
    found = difference(value, apart)
    assert (found.low, found.high) == (pytest.approx(np.quantile(apart, 0.025)), value)


def test_pairing_is_what_makes_it_narrow():
    targets, first, second = two_models(400)
    apart = paired(targets, first, second, "micro_f1")
    alone = [
        resample(METRICS["micro_f1"].weighted(targets, *m), 400, 300, i, 64) for i, m in enumerate((first, second))
    ]
    assert apart.std() < 0.7 * (alone[0] - alone[1]).std()


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (10, 3), (2, 12), (40, 22), (0, 6)])
def test_mcnemar_is_a_binomial_test(b, c):
    first = np.array([True] * b + [False] * c + [True] * 7 + [False] * 4)
    second = np.array([False] * b + [True] * c + [True] * 7 + [False] * 4)
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    expected = min(1.0, 2 * sum(chances[: min(b, c) + 1]))
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_counts_the_rows_that_the_metric_counts():
    targets = np.array([[1, 0, 1, 0], [0, 1, -1, -1], [1, 0, 0, 1]])
    scores = np.ones((3, 4))
    predictions = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]], bool)
    task = TaskSlice("b", "multiclass", slice(2, 4))
    assert right_rows(OfTask(METRICS["accuracy"], task), targets, scores, predictions).tolist() == [True, False]
    assert right_rows(METRICS["exact_match"], targets[::2], scores[::2], predictions[::2]).tolist() == [True, False]
    assert right_rows(METRICS["micro_f1"], targets[::2], scores[::2], predictions[::2]) is None


def test_holm_is_the_step_down_of_1979():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([])).tolist() == []
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(rng.integers(1, 9)) ** 3
        rejected = np.zeros(len(p), bool)
        for step, i in enumerate(np.argsort(p)):  # at alpha = .05: stop at the first that is not rejected
            if p[i] > 0.05 / (len(p) - step):
                break
            rejected[i] = True
        assert ((holm(p) <= 0.05) == rejected).all()


@pytest.mark.parametrize(("n", "margin"), [(20, 0.01), (200, 0.01), (300, 0.01), (500, 0.01), (100, 0.05)])
def test_models_that_agree_on_all_rows_may_still_differ_elsewhere(n, margin):
    """The resamples of equal predictions are all 0: only the number of rows bounds what was not seen."""
    found = not_worse(np.zeros(20_000), margin, n)
    assert found == pytest.approx(poisson.sf(math.ceil(n * margin - 1e-9) - 1, 1), abs=0.01)
    assert (found <= 0.025) >= (binom.pmf(0, n, margin) <= 0.01)
    if n * margin < 3:  # with 2% to 82% no such row is drawn
        assert found > 0.05


def test_worse_and_not_worse_exclude_each_other():
    rng = np.random.default_rng(0)
    for centre, (is_not, is_worse) in {0.0: (True, False), 0.01: (False, False), 0.03: (False, True)}.items():
        behind = rng.normal(centre, 0.003, 4000)
        assert (not_worse(behind, 0.01, 5000) < 0.025) == is_not
        assert (worse(behind, 0.01, 5000) < 0.025) == is_worse


def test_copies_of_a_row_are_no_further_rows():
    """Four copies of each row as a group give the interval of the rows themselves; as rows they would halve it."""
    targets, first, second = two_models()
    once = paired(targets, first, second, "micro_f1")
    copied = [
        np.repeat(targets, 4, axis=0),
        *(tuple(np.repeat(x, 4, axis=0) for x in model) for model in (first, second)),
    ]
    groups = np.repeat(np.arange(60)[::-1], 4)
    grouped = paired(*copied, "micro_f1", groups=100 - groups)
    np.testing.assert_allclose(grouped, once, atol=1e-12)
    assert paired(*copied, "micro_f1").std() < 0.6 * once.std()
    metric = {"micro_f1": METRICS["micro_f1"]}
    whole = bootstrap_intervals(targets, *first, metric, 100)["micro_f1"]
    assert bootstrap_intervals(copied[0], *copied[1], metric, 100, groups=100 - groups)["micro_f1"] == pytest.approx(
        whole
    )


def judged(targets, scores, task="multiclass", metric="accuracy", groups=None, margin=0.01):
    """What ``judge`` says of models with these scores (N, C), in the order of their speed."""
    n, classes = targets.shape
    table = FeatureTable(
        features={},
        specs={},
        present={},
        targets=torch.from_numpy(targets),
        labelled=np.ones(n, bool),
        splits=np.array(["train"] * n),
    )
    data = TrainingData.of_one_task("made", table, tuple(map(str, range(classes))), task, (metric,))
    data = replace(data, groups=groups)
    held_out, settings = {}, []
    for name, x in zip(("image", "text", "sum", "concat", "mixed"), scores, strict=False):
        config = resolve(TrainConfig(fusion=name, thresholds="none" if task == "multilabel" else "auto"), task, n)
        of_method = HeldOut("oof", np.arange(n), np.zeros(n, np.int64), x.astype(np.float32))
        predictions = of_method.predictions(data, config)
        figure = METRICS[metric](targets, x, predictions)
        held_out[name] = of_method
        settings.append(SettingResult({}, config, (Trial(name, 0, {metric: figure}, 1.0, 1.0),)))
    result = SweepResult("made", ("fusion",), (metric,), "oof", n, (0,), tuple(settings))
    return judge(result, data, torch.arange(n), lambda setting: held_out[setting.config.fusion], margin)


def answers(rng, targets, accuracies, shared=0.8):
    """Scores of models that are right with these chances, ``shared`` of the time on the same rows."""
    n, classes = targets.shape
    hard = rng.random(n)
    for accuracy in accuracies:
        right = np.where(rng.random(n) < shared, hard, rng.random(n)) < accuracy
        label = np.where(
            right, targets.argmax(1), (targets.argmax(1) + 1 + rng.integers(classes - 1, size=n)) % classes
        )
        yield np.eye(classes)[label]


def one_hot(rng, n, classes=4):
    return np.eye(classes, dtype=np.int8)[rng.integers(classes, size=n)]


def test_models_that_answer_the_same_are_enough_with_many_rows_only():
    rng = np.random.default_rng(0)
    for n, within in ((100, "undecided"), (3000, "yes")):
        targets = one_hot(rng, n)
        (scores,) = answers(rng, targets, [0.8])
        found = judged(targets, [scores, scores, scores])
        assert [standing.within for standing in found.standings] == [within] * 3
        assert (found.enough is None) == (within == "undecided")


def test_the_verdict_counts_groups_not_rows():
    rng = np.random.default_rng(0)
    targets = one_hot(rng, 3000)
    (scores,) = answers(rng, targets, [0.8])
    found = judged(targets, [scores, scores], groups=np.arange(3000) // 30)
    assert (found.n_rows, found.n_groups, found.enough) == (3000, 100, None)


def test_a_difference_that_is_seen_but_small_is_undecided():
    """As text and mixed on comp5329: better for sure, but perhaps by more than the margin, perhaps by less."""
    targets = one_hot(np.random.default_rng(1), 3000)
    label = targets.argmax(1)
    scores = []
    for wrong in (630, 600):
        answer = label.copy()
        answer[:wrong] = (answer[:wrong] + 1) % 4
        scores.append(np.eye(4)[answer])
    image, text = judged(targets, scores, margin=0.011).standings
    assert image.behind.value == pytest.approx(0.01)
    assert (image.behind.p, image.behind.test) == (pytest.approx(2 * 0.5**30), "exact McNemar")
    assert (image.within, text.within) == ("undecided", "yes")
    assert judged(targets, scores, margin=0.02).standings[0].within == "yes"
    assert judged(targets, scores, margin=0.005).standings[0].within == "no"


@pytest.mark.parametrize(("task", "metric"), [("multilabel", "micro_f1"), ("multilabel", "macro_ap")])
def test_other_metrics_are_bootstrapped(task, metric):
    targets, first, second = two_models(300)
    found = judged(targets, [first[0], second[0]], task, metric)
    behind = max(found.standings, key=lambda standing: standing.behind.value).behind
    assert behind.test == "paired bootstrap"
    assert behind.low < behind.value < behind.high


@pytest.mark.slow
def test_claims_are_false_as_rarely_as_they_say(monkeypatch):
    """Five equally good models: rarely is any pair said to differ. One worse by the margin: rarely is it enough."""
    monkeypatch.setattr(verdict, "RESAMPLES", 1000)
    rng, repeats = np.random.default_rng(0), 100
    differ = enough = 0
    for _ in range(repeats):
        targets = one_hot(rng, 500)
        found = judged(targets, list(answers(rng, targets, [0.8] * 5)))
        differ += any(standing.p_corrected <= 0.05 for standing in found.standings)
        found = judged(targets, list(answers(rng, targets, [0.75, 0.8])), margin=0.05)
        enough += found.standings[0].within == "yes"
    assert binom.sf(differ - 1, repeats, 0.05) > 0.001
    assert binom.sf(enough - 1, repeats, 0.025) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["micro_f1", "accuracy"])
def test_the_two_sided_p_is_right_one_time_in_twenty(metric):
    """Two equally good models, several hundred times: p is at most .05 in about 5% of them; McNemar's never in more."""
    rng, repeats = np.random.default_rng(0), 150
    false, exact = 0, 0
    for i in range(repeats):
        targets = one_hot(rng, 300)
        models = [(x, x.astype(bool)) for x in answers(rng, targets, [0.8, 0.8])]
        false += difference(0.0, paired(targets, *models, metric, 500, seed=i)).p <= 0.05
        exact += mcnemar(*(right_rows(METRICS["accuracy"], targets, *model) for model in models)) <= 0.05
    assert 0.02 < false / repeats < 0.09
    assert binom.sf(exact - 1, repeats, 0.05) > 0.001
