"""Weights of classes, and the losses that they are built into."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.nn import LOSSES
from cachefuse.nn.losses import CLASS_WEIGHTS, asl, bce, build_loss, class_weights, cross_entropy, focal
from fixtures.messages import naming

ALL = sorted(LOSSES)
ONE_HOT = torch.eye(5)[torch.arange(7) % 5]


def random_logits(batch=7, classes=5):
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(0))


def skewed(n=200, seed=0):
    """Multi-hot targets (n, 4) uint8 whose labels go from half of the rows to a single one."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 4)) < [0.5, 0.2, 0.05, 0]).astype(np.uint8)
    targets[n // 2, 3] = 1
    return torch.from_numpy(targets)


def skewed_classes(n=200, seed=0):
    """One-hot targets (n, 4) uint8, and their class numbers."""
    numbers = np.random.default_rng(seed).choice(4, size=n, p=[0.6, 0.25, 0.1, 0.05])
    return torch.eye(4, dtype=torch.uint8)[torch.from_numpy(numbers)], numbers


class TestClassWeights:
    def test_balanced_is_scikit_learns_by_label(self):
        targets = skewed()
        expected = [compute_class_weight("balanced", classes=np.array([0, 1]), y=y) for y in targets.T.numpy()]
        np.testing.assert_allclose(class_weights(targets, "balanced", "multilabel"), np.transpose(expected), rtol=1e-6)

    def test_balanced_is_scikit_learns_by_class(self):
        targets, numbers = skewed_classes()
        expected = compute_class_weight("balanced", classes=np.arange(4), y=numbers)
        np.testing.assert_allclose(class_weights(targets, "balanced", "multiclass"), expected, rtol=1e-6)

    @pytest.mark.parametrize("n", [200, 5000])
    def test_effective_numbers_are_the_papers(self, n):
        """E_n = (1 - b^n) / (1 - b) is the sum of the first n powers of b."""
        targets, numbers = skewed_classes(n)
        counts = np.bincount(numbers)
        effective = np.array([sum(0.999**i for i in range(count)) for count in counts])
        expected = n / effective / (counts / effective).sum()
        np.testing.assert_allclose(class_weights(targets, "effective", "multiclass"), expected, rtol=1e-5)
        both = class_weights(targets, "effective", "multilabel")
        counts = np.stack([n - counts, counts])
        effective = np.vectorize(lambda count: sum(0.999**i for i in range(count)))(counts)
        np.testing.assert_allclose(both, n / effective / (counts / effective).sum(axis=0), rtol=1e-5)

    def test_effective_numbers_lie_between_equal_and_balanced(self):
        targets, _ = skewed_classes(5000)
        balanced, effective = (class_weights(targets, kind, "multiclass") for kind in ("balanced", "effective"))
        assert 1 < effective.max() / effective.min() < balanced.max() / balanced.min()
        # What occurs far more often than 1,000 times counts as 1,000.
        often = torch.eye(2, dtype=torch.uint8)[(torch.arange(100_000) < 30_000).long()]
        np.testing.assert_allclose(class_weights(often, "effective", "multiclass"), 1, rtol=1e-6)

    @pytest.mark.parametrize("kind", CLASS_WEIGHTS)
    @pytest.mark.parametrize("task", ["multilabel", "multiclass"])
    def test_the_mean_weight_is_one(self, kind, task):
        targets = skewed() if task == "multilabel" else skewed_classes()[0]
        weights = class_weights(targets, kind, task)
        assert weights.dtype == torch.float32
        of_each = torch.where(targets > 0, *weights.flip(0)) if task == "multilabel" else targets.float() @ weights
        torch.testing.assert_close(of_each.mean(0), torch.ones(of_each.shape[1:]))

    @pytest.mark.parametrize("kind", CLASS_WEIGHTS)
    def test_a_label_that_all_rows_have_or_none(self, kind):
        targets = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.uint8)
        assert class_weights(targets, kind, "multilabel").tolist() == [[0, 1, 1], [1, 0, 1]]

    @pytest.mark.parametrize("kind", CLASS_WEIGHTS)
    def test_a_class_without_rows_weighs_nothing(self, kind):
        targets = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.uint8)
        assert class_weights(targets, kind, "multiclass").tolist() == [1, 0, 1]

    def test_more_rows_than_small_numbers_hold(self):
        targets = torch.ones(70_000, 1, dtype=torch.uint8)
        targets[:300] = 0
        weights = class_weights(targets, "balanced", "multilabel")
        np.testing.assert_allclose(weights[:, 0], [70_000 / 600, 70_000 / 2 / 69_700], rtol=1e-6)

    def test_an_unknown_kind(self):
        with pytest.raises(ConfigError, match=naming("weights equal")):
            class_weights(skewed(), "equal", "multilabel")


class TestBuildLoss:
    @pytest.mark.parametrize(
        ("name", "options", "loss"),
        [
            ("bce", {}, bce),
            ("focal", {"gamma": 1.5}, lambda x, y: focal(x, y, gamma=1.5)),
            ("asl", {"clip": 0.2, "reduction": "sum"}, lambda x, y: asl(x, y, clip=0.2, reduction="sum")),
            ("ce", {"smoothing": 0.1}, lambda x, y: cross_entropy(x, y, smoothing=0.1)),
        ],
    )
    def test_sets_the_options(self, name, options, loss):
        logits, targets = random_logits(), ONE_HOT
        assert torch.equal(build_loss(name, options)(logits, targets), loss(logits, targets))

    def test_an_unknown_loss_or_option(self):
        with pytest.raises(UnknownNameError, match=naming("loss hinge asl bce ce focal")):
            build_loss("hinge", {})
        for weights in (None, torch.ones(2, 5)):
            with pytest.raises(ConfigError, match=naming("loss focal alpha gamma reduction")):
                build_loss("focal", {"gamma": 2, "alpha": 1}, weights)
            for taken in ("logits", "targets"):
                with pytest.raises(ConfigError, match=naming(f"loss bce {taken} reduction")):
                    build_loss("bce", {taken: 1}, weights)
            with pytest.raises(UnknownNameError, match=naming("reduction avg mean sum")):
                build_loss("bce", {"reduction": "avg"}, weights)(random_logits(), ONE_HOT)

    @pytest.mark.parametrize("name", ["bce", "focal", "asl"])
    def test_weights_of_negatives_and_positives(self, name):
        logits, targets = random_logits(), (random_logits().roll(1, 0) > 1).float()
        weights = torch.tensor([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50]])
        each = LOSSES[name](logits, targets, reduction="none")
        expected = [[float(each[b, c] * weights[int(targets[b, c]), c]) for c in range(5)] for b in range(len(targets))]
        weighted = {r: build_loss(name, {"reduction": r}, weights)(logits, targets) for r in ("none", "mean", "sum")}
        np.testing.assert_allclose(weighted["none"], expected, rtol=1e-6)
        np.testing.assert_allclose(weighted["mean"], np.mean(expected), rtol=1e-6)
        np.testing.assert_allclose(weighted["sum"], np.sum(expected), rtol=1e-5)
        assert torch.equal(build_loss(name, {}, weights)(logits, targets), weighted["mean"])

    @pytest.mark.parametrize("name", ALL)
    def test_weights_of_rows(self, name):
        """In multi-class a row weighs what its class does, in all of its terms: in those of the other classes too."""
        logits, targets = random_logits(), ONE_HOT
        weights = torch.tensor([1.0, 2, 3, 4, 5])
        each = LOSSES[name](logits, targets, reduction="none")
        expected = torch.stack([weights[row % 5] * each[row] for row in range(7)])
        weighted = build_loss(name, {"reduction": "none"}, weights)(logits, targets)
        torch.testing.assert_close(weighted, expected)
        torch.testing.assert_close(build_loss(name, {}, weights)(logits, targets), expected.mean())

    @pytest.mark.parametrize("name", ALL)
    def test_weights_of_1_change_nothing_where_labels_are_right_in_part(self, name):
        logits = random_logits()
        targets = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) * 4).floor() / 3
        weights = torch.ones(5) if name == "ce" else torch.ones(2, 5)
        torch.testing.assert_close(build_loss(name, {}, weights)(logits, targets), LOSSES[name](logits, targets))

    @pytest.mark.parametrize("kind", CLASS_WEIGHTS)
    def test_the_mean_weight_is_one_where_labels_are_right_in_part(self, kind):
        targets = (torch.rand((90, 5), generator=torch.Generator().manual_seed(0)) * 4).floor() / 3
        weights = class_weights(targets, kind, "multilabel")
        blank = torch.zeros(90, 5)
        each = build_loss("bce", {"reduction": "none"}, weights)(blank, targets)
        torch.testing.assert_close(each.mean(0) / math.log(2), torch.ones(5))

    def test_the_weighted_softmax_is_torchs(self):
        """torch divides by the sum of the weights, which is that of the rows where their mean is 1."""
        targets, numbers = skewed_classes()
        logits = random_logits(200, 4)
        weights = class_weights(targets, "balanced", "multiclass")
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(numbers), weight=weights)
        torch.testing.assert_close(build_loss("ce", {}, weights)(logits, targets), expected)

    @pytest.mark.parametrize("name", ALL)
    def test_balanced_classes_do_not_care_how_often_each_occurs(self, name):
        """Rows of a class, taken three times, change the weights and not the loss."""
        targets, numbers = skewed_classes()
        logits = random_logits(200, 4)
        rows = torch.cat([torch.arange(200), *[torch.from_numpy(np.flatnonzero(numbers == 3))] * 2])
        for task in ("multiclass",) if name == "ce" else ("multiclass", "multilabel"):
            values = []
            for x, y in ((logits, targets), (logits[rows], targets[rows])):
                weights = class_weights(y, "balanced", task)
                values.append(build_loss(name, {"reduction": "none"}, weights)(x, y))
            if task == "multiclass":
                torch.testing.assert_close(values[0].mean(), values[1].mean())
            else:
                torch.testing.assert_close(values[0][:, 3].mean(), values[1][:, 3].mean())

    @pytest.mark.parametrize(
        ("name", "task"),
        [*((name, "multiclass") for name in ALL), *((name, "multilabel") for name in ("asl", "bce", "focal"))],
    )
    def test_the_weighted_optimum_is_that_of_a_balanced_set(self, name, task):
        """With nothing to go by, balanced weights leave every class as likely as any other."""
        targets = skewed(1000) if task == "multilabel" else skewed_classes(1000)[0]
        loss = build_loss(name, {}, class_weights(targets, "balanced", task))
        bias = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(bias.expand(1000, 4), targets)
            value.backward()
            return value

        optimizer.step(closure)
        assert bias.detach().abs().max() < 10
        assert np.ptp(bias.detach().numpy()) < 1e-2

    def test_targets_may_be_small_integers(self):
        targets, _ = skewed_classes()
        logits = random_logits(200, 4).requires_grad_()
        for name in ALL:
            for weights in (None, torch.tensor([1.0, 2, 3, 400])):
                value = build_loss(name, {}, weights)(logits, targets)
                torch.testing.assert_close(value, build_loss(name, {}, weights)(logits, targets.float()))
