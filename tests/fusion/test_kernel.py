"""The kernel fusion against kernels of scikit-learn, and its many cases: tasks, groups, absent rows, few landmarks."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as Reference
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import normalize

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion import kernel
from cachefuse.fusion.kernel import KernelFusion
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.heads import Linear
from cachefuse.nn.kernel_ridge import fit_logits
from fixtures.messages import naming
from fixtures.specs import specs_of

N, C = 60, 4
SPECS = specs_of({"image": 5, "text": 3, "text_ngrams": (8, 6)})
ONE_TASK = [TaskSlice("", "multilabel", slice(0, C))]


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
    targets = (x["image"][:, :C] * image[:, None] + x["text"][:, [0]] * text[:, None] + 0.5 * noise > 0).float()
    return x, present, targets


@pytest.fixture
def equal_weights(monkeypatch):
    monkeypatch.setattr(kernel, "kernel_weights", lambda kernels, *_: torch.ones(len(kernels)))


def solve(data, names=tuple(SPECS), tasks=ONE_TASK, groups=None, seed=0, rows=None, **options):
    features, present, targets = data
    fusion = KernelFusion({name: SPECS[name] for name in names}, C, Linear, **options)
    rows = torch.arange(N) if rows is None else rows
    fusion.solve(lambda name, at: (features[name][at], present[name][at]), rows, targets[rows], tasks, groups, seed)
    return fusion


def logits(fusion, data):
    features, present, _ = data
    return fusion({m: features[m] for m in fusion.specs}, {m: present[m] for m in fusion.specs})


def test_logits_are_those_of_the_weighted_sum_and_product_of_kernels(data):
    features, present, targets = data
    fusion = solve(data, ("image", "text"), bandwidth=0.7)
    kernels = []
    for name in ("image", "text"):
        there = present[name].numpy()
        x = normalize(features[name].numpy())
        distance = 2 - 2 * x[there] @ x[there].T
        kernels.append(rbf_kernel(x, gamma=0.7 / distance.mean()) * np.outer(there, there))
    kernels.append(np.prod(kernels, axis=0))
    weights = fusion.kernel_weights.double().numpy()
    assert len(weights) == 3
    total, y = np.tensordot(weights, np.stack(kernels), 1), targets.double().numpy()
    values, left_out = np.empty((N, C)), np.empty((N, C))
    for c in range(C):
        errors = {}
        for penalty in (0.03, 0.3, 1.0, 3.0):
            out = np.empty(N)
            for i in range(N):
                rest = np.arange(N) != i
                ridge = Reference(alpha=penalty, kernel="precomputed").fit(
                    total[np.ix_(rest, rest)], (y[:, c] - y[:, c].mean())[rest]
                )
                out[i] = ridge.predict(total[[i]][:, rest])[0] + y[:, c].mean()
            errors[((out - y[:, c]) ** 2).mean()] = penalty, out
        penalty, left_out[:, c] = errors[min(errors)]
        ridge = Reference(alpha=penalty, kernel="precomputed").fit(total, y[:, c] - y[:, c].mean())
        values[:, c] = ridge.predict(total) + y[:, c].mean()
    scale, shift = fit_logits(torch.from_numpy(left_out), torch.from_numpy(y))
    expected = torch.from_numpy(values) * scale + shift
    torch.testing.assert_close(logits(fusion, data).double(), expected, atol=5e-3, rtol=5e-3)


def test_it_learns_from_each_feature(data):
    for names in (("image",), ("text",), ("text_ngrams",), tuple(SPECS)):
        fusion = solve(data, names)
        assert logits(fusion, data).std() > 0.05
        assert set(fusion.specs) == set(names)


def test_the_lexical_part_is_that_of_the_linear_kernel(data, equal_weights):
    """The weights of columns give what the landmarks' n-grams would, weighted by their coefficients."""
    features, present, _ = data
    counts = torch.nn.functional.one_hot(features["text_ngrams"][..., 0], 8) * present["text_ngrams"][..., None]
    targets = (counts.sum(1).float() @ torch.randn(8, C, generator=torch.Generator().manual_seed(1)) > 0).float()
    fusion = solve((features, present, targets), ("text_ngrams",))
    rows = fusion.tfidf.matrix([(features["text_ngrams"], present["text_ngrams"])]).toarray()
    y = targets.double().numpy()
    spread = logits(fusion, data).double().numpy() - fusion.bias.double().numpy()
    fits = [
        Reference(alpha=penalty, kernel="linear").fit(rows, y[:, c] - y[:, c].mean()).predict(rows)
        for c in range(C)
        for penalty in (0.03, 0.3, 1.0, 3.0)
    ]
    for c in range(C):  # up to the scale of its probabilities, it is one of the path
        likeness = [np.corrcoef(spread[:, c], fits[4 * c + i])[0, 1] for i in range(4)]
        assert max(likeness) > 1 - 1e-5


def test_a_weak_encoder_counts_little(data):
    """Each encoder of a modality has a kernel of its own, and the sizes of a solved model build it again."""
    features = data[0]
    noise = torch.randn(N, 40, generator=torch.Generator().manual_seed(4))
    features = {"image": torch.cat([features["image"], noise], 1)}
    specs = {"image": FeatureSpec("image", "pooled", 45, parts=(5, 40))}
    targets, everywhere = (features["image"][:, :C] > 0).float(), {"image": torch.ones(N, dtype=torch.bool)}
    fusion = KernelFusion(specs, C, Linear)
    fusion.solve(lambda name, at: (features[name][at], everywhere[name][at]), torch.arange(N), targets, ONE_TASK)
    strong, weak, _ = fusion.kernel_weights
    assert strong > 1.5 * weak
    again = KernelFusion(specs, C, Linear, **fusion.sizes())
    again.load_state_dict(fusion.state_dict())
    assert torch.equal(again(features, everywhere), fusion(features, everywhere))
    old = KernelFusion(specs, C, Linear, n_landmarks=N)  # solved before kernels had weights
    assert list(old.kernels) == ["image"]
    assert "kernels.image.landmarks" in old.state_dict()


def test_each_task_is_solved_on_its_own_rows(data, equal_weights):
    features, present, targets = data
    tasks = [TaskSlice("a", "multilabel", slice(0, 2)), TaskSlice("b", "multiclass", slice(2, 4))]
    targets = targets.clone()
    targets[:, 3] = 1 - targets[:, 2]
    targets[:20, 2:] = -1
    both = logits(solve((features, present, targets), tasks=tasks), data)
    other = targets.clone()
    other[:20, :2] = 1 - other[:20, :2]  # changes the first task alone
    changed = logits(solve((features, present, other), tasks=tasks), data)
    assert not torch.equal(both[:, :2], changed[:, :2])
    assert torch.equal(both[:, 2:], changed[:, 2:])
    assert (both[20:, 2:].argmax(1) == targets[20:, 2:].argmax(1)).float().mean() > 0.8


def test_few_landmarks_are_whole_groups_by_the_seed(data):
    groups = torch.arange(N) // 5
    fusion, again, other = (solve(data, landmarks=20, groups=groups, seed=seed) for seed in (0, 0, 1))
    assert fusion.sizes()["n_landmarks"] == 20
    kept = fusion.kernels["image"].landmarks
    x = torch.nn.functional.normalize(data[0]["image"] * data[1]["image"][:, None], dim=1)
    chosen = torch.tensor([bool((kept == row).all(1).any()) for row in x])
    assert chosen.view(-1, 5).all(1).sum() >= 3
    assert torch.equal(logits(fusion, data), logits(again, data))
    assert not torch.equal(logits(fusion, data), logits(other, data))


def test_labels_without_meaning_are_not_learnt(data):
    """New rows get about the share of each class, whatever the model made of the training rows."""
    features, present, _ = data
    generator = torch.Generator().manual_seed(3)
    targets = (torch.rand(N, C, generator=generator) < 0.3).float()
    fusion = solve((features, present, targets), rows=torch.arange(40))
    chances = logits(fusion, data).sigmoid()[40:]
    torch.testing.assert_close(chances.mean(0), targets[:40].mean(0), atol=0.15, rtol=0)
    assert chances.std(0).max() < 0.15


def test_a_class_that_all_or_no_rows_have(data):
    features, present, targets = data
    targets = targets.clone()
    targets[:, 0], targets[:, 1] = 0, 1
    scores = logits(solve((features, present, targets)), data).sigmoid()
    assert scores.isfinite().all()
    assert (scores[:, 0] < 0.1).all()
    assert (scores[:, 1] > 0.9).all()


@pytest.mark.parametrize("option", [{"landmarks": 0}, {"bandwidth": 0.0}, {"bandwidth": -1.0}])
def test_options_must_be_above_zero(option):
    with pytest.raises(ConfigError, match=naming("landmarks and bandwidth")):
        KernelFusion(SPECS, C, Linear, **option)


def test_it_needs_a_feature():
    with pytest.raises(ConfigError, match=naming("kernel")):
        KernelFusion(specs_of({"image_tokens": (5, 4)}), C, Linear)


def test_landmarks_that_all_lack_a_modality(data):
    features, present, targets = data
    rows = torch.nonzero(~present["image"]).flatten()[:3]
    rows = torch.cat([rows, torch.arange(20)]).unique()
    fusion = solve(
        (features, {**present, "image": torch.zeros(N, dtype=torch.bool)}, targets), ("image", "text"), rows=rows
    )
    assert logits(fusion, data).isfinite().all()
