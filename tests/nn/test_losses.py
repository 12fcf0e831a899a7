import math

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.nn import LOSSES
from cachefuse.nn.losses import asl, bce, cross_entropy, focal
from fixtures.messages import naming

ALL = sorted(LOSSES)


def some(batch=7, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(batch, classes, generator=generator)
    targets = (torch.rand(batch, classes, generator=generator) < 0.3).float()
    return logits, targets


def one_hot(batch=7, classes=5):
    return torch.eye(classes)[torch.arange(batch) % classes]


def asl_in_float64(logits, targets, gamma_negative, gamma_positive, clip):
    x, y = logits.double().numpy(), targets.double().numpy()
    p = 1 / (1 + np.exp(-x))
    p_m = np.maximum(p - clip, 0)
    positive = (1 - p) ** gamma_positive * np.log(p)
    negative = p_m**gamma_negative * np.log(1 - p_m)
    return -(y * positive + (1 - y) * negative)


def test_by_hand():
    # A logit of log 3 is p = 3/4.
    logits, targets = torch.full((1, 2), math.log(3)), torch.tensor([[1.0, 0.0]])

    def pair(loss, **options):
        return loss(logits, targets, reduction="none", **options)[0].tolist()

    assert pair(bce) == pytest.approx([math.log(4 / 3), math.log(4)])
    assert pair(focal) == pytest.approx([math.log(4 / 3) / 4**3, math.log(4) * (3 / 4) ** 3])
    assert pair(focal, gamma=1) == pytest.approx([math.log(4 / 3) / 4, math.log(4) * 3 / 4])
    assert pair(asl) == pytest.approx([math.log(4 / 3) / 4, -math.log(0.3) * 0.7**4])
    assert pair(asl, gamma_negative=2, gamma_positive=0, clip=0.25) == pytest.approx(
        [math.log(4 / 3), math.log(2) * 0.5**2]
    )


def test_cross_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert cross_entropy(logits, targets, reduction="none").tolist() == pytest.approx([math.log(2), math.log(10)])
    assert cross_entropy(logits, targets).item() == pytest.approx((math.log(2) + math.log(10)) / 2)
    smoothed = cross_entropy(logits, targets, smoothing=0.3, reduction="none")[0].item()
    assert smoothed == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4))


@pytest.mark.parametrize("gamma", [0, 0.5, 2, 3])
def test_focal_is_torchvisions_without_alpha(gamma):
    logits, targets = some()
    expected = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma, reduction="none")
    torch.testing.assert_close(focal(logits, targets, gamma=gamma, reduction="none"), expected)


@pytest.mark.parametrize("gamma_negative", [0, 0.3, 1, 4])
@pytest.mark.parametrize("gamma_positive", [0, 0.3, 1])
@pytest.mark.parametrize("clip", [0, 0.05, 0.5])
def test_asl_against_float64(gamma_negative, gamma_positive, clip):
    logits, targets = some()
    actual = asl(
        logits,
        targets,
        gamma_negative=gamma_negative,
        gamma_positive=gamma_positive,
        clip=clip,
        reduction="none",
    )
    expected = asl_in_float64(logits, targets, gamma_negative, gamma_positive, clip)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=2e-7)


def test_asl_identities():
    logits, targets = some()
    plain = asl(logits, targets, gamma_negative=0, gamma_positive=0, clip=0, reduction="none")
    torch.testing.assert_close(plain, bce(logits, targets, reduction="none"))
    for gamma in (0.5, 2, 3):
        same = asl(logits, targets, gamma_negative=gamma, gamma_positive=gamma, clip=0)
        assert torch.equal(same, focal(logits, targets, gamma=gamma))
    # The shift is continuous: a clip of next to nothing changes next to nothing.
    torch.testing.assert_close(asl(logits, targets, clip=1e-7), asl(logits, targets, clip=0))


def test_asl_drops_easy_negatives():
    logits = torch.logit(torch.tensor([[0.01, 0.0499, 0.06]])).requires_grad_()
    loss = asl(logits, torch.zeros(1, 3), reduction="none")
    loss.sum().backward()
    assert loss[0, :2].tolist() == [0, 0]
    assert logits.grad[0, :2].tolist() == [0, 0]
    assert loss[0, 2] > 0
    assert logits.grad[0, 2] > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bce", {}),
        ("ce", {}),
        ("ce", {"smoothing": 0.1}),
        ("focal", {}),
        ("focal", {"gamma": 0.5}),
        ("asl", {}),
        ("asl", {"gamma_negative": 0.5, "gamma_positive": 0.5}),
        ("asl", {"gamma_negative": 0, "gamma_positive": 0}),
    ],
)
class TestGradients:
    def test_equal_finite_differences(self, name, options):
        loss = LOSSES[name]
        logits, targets = some(2, 4, scale=1.5)
        logits.requires_grad_()
        loss(logits, targets, reduction="sum", **options).backward()
        step = 1e-2
        for i in range(2):
            for j in range(4):
                nudge = torch.zeros(2, 4)
                nudge[i, j] = step
                with torch.no_grad():
                    up = loss(logits + nudge, targets, reduction="sum", **options)
                    down = loss(logits - nudge, targets, reduction="sum", **options)
                assert logits.grad[i, j].item() == pytest.approx((up - down).item() / (2 * step), abs=2e-3)

    def test_are_finite_for_any_logit(self, name, options):
        loss = LOSSES[name]
        edge = math.log(0.05 / 0.95)  # where p = clip
        around = [edge + d for d in (-1e-6, -1e-7, 0, 1e-7, 1e-6)]
        values = [0, 1e-30, 10, 17, 30, 88, 89, 100, 104, 1e3, 1e4]
        logits = torch.tensor([[v] * 3 for v in [*around, *values, *(-v for v in values)]])
        logits[:, 2] = 0  # so that a softmax sees them apart
        targets = torch.tensor([1.0, 0, 0]).expand_as(logits)
        logits.requires_grad_()
        total = loss(logits, targets, reduction="sum", **options)
        total.backward()
        assert total.isfinite()
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().max() < 10


@pytest.mark.parametrize("name", ALL)
def test_extreme_mistakes_keep_their_gradient(name):
    loss = LOSSES[name]
    logits = torch.tensor([[-1e4, 0.0]], requires_grad=True)
    value = loss(logits, torch.tensor([[1.0, 0.0]]), reduction="sum")
    value.backward()
    assert value.item() == pytest.approx(1e4, rel=1e-3)
    assert logits.grad[0, 0].item() == pytest.approx(-1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(name, dtype):
    loss = LOSSES[name]
    logits = some()[0].to(dtype).requires_grad_()
    targets = one_hot()
    value = loss(logits, targets.to(dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), targets))
    value.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_float64_stays_float64(name):
    logits = some()[0].double()
    value = LOSSES[name](logits, one_hot())
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, LOSSES[name](logits.float(), one_hot()).double())


@pytest.mark.parametrize("name", ALL)
def test_reductions(name):
    loss = LOSSES[name]
    logits, targets = some()[0], one_hot()
    each = loss(logits, targets, reduction="none")
    assert each.shape == ((7,) if name == "ce" else (7, 5))
    torch.testing.assert_close(loss(logits, targets), each.mean())
    torch.testing.assert_close(loss(logits, targets, reduction="sum"), each.sum())
    with pytest.raises(UnknownNameError, match=naming("reduction avg mean sum")):
        loss(logits, targets, reduction="avg")


@pytest.mark.parametrize("name", ALL)
def test_leaves_grad_mode_alone(name):
    loss = LOSSES[name]
    with torch.no_grad():
        loss(some()[0], one_hot())
        assert not torch.is_grad_enabled()
    loss(some()[0], one_hot())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ALL)
def test_shapes_must_agree(name):
    loss = LOSSES[name]
    with pytest.raises(ConfigError, match=naming("7 5 1")):
        loss(torch.zeros(7, 5), torch.zeros(7, 1))
    with pytest.raises(ConfigError, match=naming("7")):
        loss(torch.zeros(7), torch.zeros(7))


def test_options_out_of_range():
    logits, targets = some()
    for options in ({"gamma_negative": -1}, {"gamma_positive": -0.1}, {"clip": -0.1}, {"clip": 1}):
        with pytest.raises(ConfigError, match=naming("0 1")):
            asl(logits, targets, **options)
    with pytest.raises(ConfigError, match=naming("gamma 0 -2")):
        focal(logits, targets, gamma=-2)
    with pytest.raises(ConfigError, match=naming("smoothing 0 1")):
        cross_entropy(logits, targets, smoothing=1)
