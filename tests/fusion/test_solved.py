"""Fusions without a head beside the kernel: logistic regression, nearest rows, class means, against scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.options import typed_options
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.heads import Linear
from fixtures.messages import naming
from fixtures.specs import specs_of

N, C = 80, 3
SPECS = specs_of({"image": 5, "text": 4, "text_ngrams": (8, 6)})
ONE_TASK = [TaskSlice("", "multilabel", slice(0, C))]
NAMES = ("logistic", "neighbours", "prototype")


@pytest.fixture
def data():
    """Features and presence of N rows, and targets that follow from them; some rows lack a modality."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(N, spec.width, generator=generator) for name, spec in SPECS.items() if spec.view == "pooled"}
    x["text_ngrams"] = torch.randint(1, 8, (N, 6, 2), generator=generator)
    image, text = torch.rand(N, generator=generator) < 0.9, torch.rand(N, generator=generator) < 0.8
    mask = (torch.rand(N, 6, generator=generator) < 0.7) & text[:, None]
    present = {"image": image, "text": text, "text_ngrams": mask}
    noise = torch.randn(N, C, generator=generator)
    targets = (x["image"][:, :C] * image[:, None] + x["text"][:, [0]] * text[:, None] + 0.3 * noise > 0).float()
    return x, present, targets


def solve(fusion, data, names=tuple(SPECS), tasks=ONE_TASK, groups=None, seed=0, **options):
    features, present, targets = data
    model = FUSIONS[fusion]({name: SPECS[name] for name in names}, targets.shape[1], Linear, **options)
    rows = torch.arange(len(targets))
    model.solve(lambda name, at: (features[name][at], present[name][at]), rows, targets, tasks, groups, seed)
    return model


def logits(model, data):
    features, present, _ = data
    return model({m: features[m] for m in model.specs}, {m: present[m] for m in model.specs})


def unit_rows(data):
    features, present, _ = data
    sides = [normalize(features[name].numpy()) * present[name].numpy()[:, None] for name in ("image", "text")]
    return np.concatenate(sides, axis=1)


@pytest.mark.parametrize("with_ngrams", [False, True])
def test_logistic_is_the_library_s(data, with_ngrams):
    model = solve("logistic", data, tuple(SPECS) if with_ngrams else ("image", "text"), penalty=0.5)
    x = unit_rows(data)
    if with_ngrams:
        features, present, _ = data
        x = np.hstack([x, model.tfidf.matrix([(features["text_ngrams"], present["text_ngrams"])]).toarray()])
    found = logits(model, data).numpy()
    for c in range(C):
        expected = LogisticRegression(C=2, tol=1e-10, max_iter=10_000).fit(x, data[2][:, c].numpy())
        np.testing.assert_allclose(found[:, c], expected.decision_function(x), atol=5e-3)


def test_neighbours_are_the_nearest_rows(data):
    model = solve("neighbours", data, ("image", "text"), k=7)
    x, y = unit_rows(data), data[2].numpy()
    nearest = np.argsort(-x @ x.T, axis=1, kind="stable")[:, :7]
    weight = np.clip(np.take_along_axis(x @ x.T, nearest, axis=1), 0, None)
    shares = ((weight[:, :, None] * y[nearest]).sum(1) + y.mean(0)) / (weight.sum(1, keepdims=True) + 1)
    expected = shares * model.scale.numpy() + model.shift.numpy()
    np.testing.assert_allclose(logits(model, data).numpy(), expected, atol=1e-4)
    _, found = NearestNeighbors(n_neighbors=1, metric="cosine").fit(x).kneighbors(x)
    assert (nearest[:, 0] == found[:, 0]).mean() > 0.9  # the same where no modality is absent


def test_prototypes_are_the_means_of_rows(data):
    model = solve("prototype", data, ("image", "text"))
    x, y = unit_rows(data), data[2].numpy() > 0
    apart = np.stack([x[y[:, c]].mean(0) - x[~y[:, c]].mean(0) for c in range(C)], axis=1)
    directions = model.weight.numpy() / np.linalg.norm(model.weight.numpy(), axis=0)
    np.testing.assert_allclose(directions, apart / np.linalg.norm(apart, axis=0), atol=1e-4)


@pytest.mark.parametrize("fusion", ["neighbours", "prototype"])
def test_values_are_of_other_groups(data, fusion):
    """Each row twice: if its copy counted, the values would look sure, and scores would be too."""
    features, present, _ = data
    twice = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in features.items()}
    here = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in present.items()}
    noise = (torch.rand(N, C, generator=torch.Generator().manual_seed(5)) < 0.5).float().repeat(2, 1)
    groups = torch.arange(N).repeat(2)
    together, apart = (
        logits(solve(fusion, (twice, here, noise), ("image", "text"), groups=given), (twice, here, noise))
        for given in (groups, None)
    )
    assert together.abs().mean() < apart.abs().mean()


@pytest.mark.parametrize("fusion", NAMES)
def test_scores_are_probabilities(data, fusion):
    """On average over new rows of the same kind."""
    features, present, targets = data
    rows = torch.arange(N) < 50
    some = {m: x[rows] for m, x in features.items()}, {m: x[rows] for m, x in present.items()}, targets[rows]
    model = solve(fusion, some)
    scores = expit(logits(model, data).numpy())[~rows.numpy()]
    assert abs(scores.mean() - targets[~rows].mean()) < 0.12
    positive = targets[~rows].numpy() > 0
    assert scores[positive].mean() > scores[~positive].mean() + 0.05


@pytest.mark.parametrize("fusion", NAMES)
def test_one_label_a_row(data, fusion):
    features, present, _ = data
    labels = features["image"][:, :C].argmax(1)
    targets = torch.nn.functional.one_hot(labels, C).float()
    there = present["image"]
    task = [TaskSlice("", "multiclass", slice(0, C))]
    found = logits(solve(fusion, (features, present, targets), tasks=task), (features, present, targets))
    assert (found.argmax(1) == labels)[there].float().mean() > 0.55


@pytest.mark.parametrize("fusion", NAMES)
def test_each_task_learns_from_its_own_rows(data, fusion):
    features, present, targets = data
    tasks = [TaskSlice("a", "multilabel", slice(0, 1)), TaskSlice("b", "multilabel", slice(1, C))]
    missing = targets.clone()
    missing[::4, 0] = -1
    whole, less = (
        logits(solve(fusion, (features, present, y), tasks=tasks, **({"k": 9} if fusion == "neighbours" else {})), data)
        for y in (targets, missing)
    )
    assert not torch.allclose(whole[:, 0], less[:, 0])
    torch.testing.assert_close(whole[:, 1:], less[:, 1:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fusion", NAMES)
def test_fewer_rows_to_compare_with(data, fusion):
    options = {"logistic": {"rows": 40, "landmarks": 20}, "neighbours": {"rows": 40}, "prototype": {}}[fusion]
    found = logits(solve(fusion, data, **options), data)
    assert found.isfinite().all()
    assert (found.max(0).values > found.min(0).values).all()


@pytest.mark.parametrize("fusion", NAMES)
def test_one_positive_is_enough(data, fusion):
    features, present, targets = data
    few = torch.zeros_like(targets)
    few[3, 0] = few[5, 1] = 1
    assert logits(solve(fusion, (features, present, few)), data).isfinite().all()


def test_n_grams_alone(data):
    for fusion in ("logistic", "prototype"):
        found = logits(solve(fusion, data, ("text_ngrams",)), data)
        assert (found.std(0) > 0).all()
    with pytest.raises(ConfigError, match=naming("neighbours pooled none")):
        solve("neighbours", data, ("text_ngrams",))


@pytest.mark.parametrize(
    ("fusion", "options", "named"),
    [
        ("logistic", {"penalty": -1.0}, "penalty at least 0 -1.0"),
        ("logistic", {"rows": 0}, "rows above 0"),
        ("neighbours", {"k": -1}, "k at least 0 -1"),
        ("neighbours", {"rows": 0}, "rows above 0"),
    ],
)
def test_options_out_of_range_are_refused(data, fusion, options, named):
    with pytest.raises(ConfigError, match=naming(named)):
        solve(fusion, data, **options)


def test_options_that_are_no_numbers_are_refused():
    for fusion, option in (("logistic", "penalty"), ("kernel", "bandwidth")):
        with pytest.raises(ConfigError, match=naming(f"{option} number nan")):
            typed_options(FUSIONS[fusion], {option: "nan"})
