"""The contrastive loss, against the paper's equations 3 to 6 written out in plain loops."""

import math

import numpy as np
import pytest
import torch

from cachefuse.errors import ConfigError
from cachefuse.nn import TARGETS
from cachefuse.nn.losses import contrastive
from fixtures.messages import naming


def some(m, d, seed=0, dtype=torch.float64, lengths=(0.1, 10)):
    """Return two sides of m pairs (m, d), that resemble one another somewhat, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(m, d, generator=generator, dtype=torch.float64)
    sides = []
    for length in lengths:
        own = torch.randn(m, d, generator=generator, dtype=torch.float64)
        sides.append((length * (shared + own) * (0.5 + torch.rand(m, 1, generator=generator))).to(dtype))
    return sides


def cosine(a, b):
    dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a)) / math.sqrt(sum(float(q) ** 2 for q in b))


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def soft_targets(x, y, temperature):
    """Equation 5, (M, M)."""
    m = len(x)
    return [
        softmax([(cosine(x[i], x[j]) + cosine(y[i], y[j])) / (2 * temperature) for j in range(m)]) for i in range(m)
    ]


def by_hand(x, y, temperature, targets):
    """Equations 3, 4 and 6, given targets (M, M)."""
    m = len(x)
    first = [softmax([cosine(x[i], y[j]) / temperature for j in range(m)]) for i in range(m)]
    second = [softmax([cosine(y[i], x[j]) / temperature for j in range(m)]) for i in range(m)]
    total = 0.0
    for i in range(m):
        for j in range(m):
            total += -targets[i][j] * math.log(first[i][j]) - targets[j][i] * math.log(second[i][j])
    return total / (2 * m)


def all_targets(name, x, y, temperature):
    """Printed targets are soft ones with half the sum times the temperature: a division by its inverse."""
    if name == "hard":
        return np.eye(len(x)).tolist()
    return soft_targets(x, y, temperature if name == "soft" else 1 / temperature)


def arrays(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def gradients(x, y, temperature, **options):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = contrastive(x, y, temperature, **options)
    return value, torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("m", "d"), [(1, 3), (2, 1), (2, 5), (3, 2), (7, 4), (12, 16)])
def test_is_what_the_equations_say(name, temperature, m, d):
    x, y = some(m, d, seed=m)
    expected = by_hand(*arrays(x, y), temperature, all_targets(name, *arrays(x, y), temperature))
    assert contrastive(x, y, temperature, targets=name).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    in_float32 = contrastive(x.float(), y.float(), torch.tensor(temperature), targets=name)
    assert in_float32.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_two_pairs_by_hand():
    """Unit vectors at right angles, T = 1: what is right has e against 1."""
    x = torch.eye(2, dtype=torch.float64)
    right, wrong = -math.log(math.e / (math.e + 1)), -math.log(1 / (math.e + 1))
    t = math.e / (math.e + 1)  # cosines of both sides agree: (1 + 1) / 2 against 0
    assert contrastive(x, x, 1.0, targets="hard").item() == pytest.approx(right)
    assert contrastive(x, x, 1.0, targets="soft").item() == pytest.approx(t * right + (1 - t) * wrong)


def test_soft_targets_are_not_symmetric():
    """t_ji stands beside l2_ij: of three pairs the second is near both others, and its row is not its column."""
    x = torch.tensor([[1.0, 0], [1, 1], [0, 1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.2], [0.3, 1], [-1, 1]], dtype=torch.float64)
    t = np.array(soft_targets(*arrays(x, y), 0.3))
    assert np.abs(t - t.T).max() > 0.03
    value = contrastive(x, y, 0.3).item()
    assert value == pytest.approx(by_hand(*arrays(x, y), 0.3, t.tolist()))
    assert value != pytest.approx(by_hand(*arrays(x, y), 0.3, t.T.tolist()), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_hard_targets_are_torchs_cross_entropy_both_ways(temperature):
    x, y = some(9, 5, dtype=torch.float32)
    unit = [torch.nn.functional.normalize(side, dim=1) for side in (x, y)]
    scores = unit[0] @ unit[1].T / temperature
    each = [torch.nn.functional.cross_entropy(s, torch.arange(9)) for s in (scores, scores.T)]
    torch.testing.assert_close(contrastive(x, y, temperature, targets="hard"), sum(each) / 2)


@pytest.mark.parametrize(
    ("name", "detach"),
    [("hard", True), ("hard", False), ("soft", False)],
)
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_gradients_are_those_of_the_formula(name, detach, temperature):
    inputs = [side.requires_grad_() for side in some(4, 3, lengths=(0.7, 2))]
    inputs.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))

    def loss(x, y, t):
        return contrastive(x, y, t, targets=name, detach=detach)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_detached_targets_are_constants(temperature):
    """The gradient is the numeric one with the targets held where they are, in x, y and the temperature."""
    x, y = some(4, 3, lengths=(0.7, 2))
    t = soft_targets(*arrays(x, y), temperature)
    inputs = [*(side.requires_grad_() for side in (x, y)), torch.tensor(temperature).double().requires_grad_()]
    found = torch.autograd.grad(contrastive(*inputs), inputs)
    values = arrays(*inputs)
    step = 1e-6
    for value, gradient in zip(values, found, strict=True):
        for place in np.ndindex(value.shape):
            kept, around = value[place].copy(), []
            for moved in (kept + step, kept - step):
                value[place] = moved
                around.append(by_hand(values[0], values[1], float(values[2]), t))
            value[place] = kept
            assert gradient[place].item() == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-7)


def test_detaching_changes_the_gradient_and_not_the_loss():
    x, y = some(6, 4)
    (held_out, of_held), (free, of_free) = (gradients(x, y, 0.2, detach=detach) for detach in (True, False))
    assert held_out.item() == free.item()
    assert not torch.allclose(of_held[0], of_free[0])


@pytest.mark.parametrize("name", TARGETS)
def test_the_order_of_the_batch_makes_no_difference(name):
    x, y = some(8, 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    value, found = gradients(x, y, 0.1, targets=name)
    permuted, found_permuted = gradients(x[order], y[order], 0.1, targets=name)
    torch.testing.assert_close(permuted, value)
    for whole, part in zip(found, found_permuted, strict=True):
        torch.testing.assert_close(part, whole[order])


def test_hard_targets_treat_both_sides_alike():
    x, y = some(8, 5)
    value, (of_x, of_y) = gradients(x, y, 0.1, targets="hard")
    swapped, (swapped_y, swapped_x) = gradients(y, x, 0.1, targets="hard")
    torch.testing.assert_close(swapped, value)
    torch.testing.assert_close((swapped_x, swapped_y), (of_x, of_y))


@pytest.mark.parametrize("name", TARGETS)
def test_only_directions_count(name):
    x, y = some(6, 4)
    longer = x * torch.arange(1, 7, dtype=torch.float64)[:, None], y * 1e-3
    torch.testing.assert_close(contrastive(*longer, 0.1, targets=name), contrastive(x, y, 0.1, targets=name))
    for side, gradient in zip((x, y), gradients(x, y, 0.1, targets=name)[1], strict=True):
        assert (side * gradient).sum(1).abs().max() < 1e-12  # along a vector there is nothing to gain


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_half_precision_is_computed_in_float32(name, dtype, temperature):
    x, y = some(32, 16, dtype=dtype)
    value, found = gradients(x, y, temperature, targets=name)
    assert value.dtype == torch.float32
    assert torch.equal(value, contrastive(x.float(), y.float(), temperature, targets=name))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_stays(dtype):
    assert contrastive(*some(3, 2, dtype=dtype), 0.1).dtype == dtype


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-20, 1e-7, 1e4, 1e15, 1e19, 1e25, 3e38])
def test_is_finite_for_any_length(name, temperature, value):
    x, y = some(5, 4, dtype=torch.float32, lengths=(1, 1))
    for rows in (slice(0, 1), slice(None)):
        for side in ("x", "y", "both"):
            a, b = x.clone(), y.clone()
            for one in {"x": (a,), "y": (b,), "both": (a, b)}[side]:
                one[rows] = value * one[rows].sign()
            loss, found = gradients(a, b, temperature, targets=name)
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("value", [65504.0, 6e-8, 0.0])
def test_is_finite_for_the_extremes_of_float16(value):
    x, y = some(5, 4, dtype=torch.float16)
    x[:2], y[1:3] = value, -value
    assert contrastive(x, y, 0.01).isfinite()


@pytest.mark.parametrize("name", TARGETS)
def test_vectors_without_direction_are_as_near_to_any(name):
    nothing = torch.zeros(4, 3)
    assert contrastive(nothing, nothing, 0.07, targets=name).item() == pytest.approx(math.log(4))
    assert contrastive(nothing, some(4, 3, dtype=torch.float32)[0], 0.07, targets=name).item() == pytest.approx(
        math.log(4)
    )


@pytest.mark.parametrize("name", TARGETS)
def test_pairs_that_are_all_alike_are_at_chance(name):
    x = torch.ones(4, 3, dtype=torch.float64)
    value, found = gradients(x, x, 0.07, targets=name)
    assert value.item() == pytest.approx(math.log(4))
    assert max(gradient.abs().max() for gradient in found) < 1e-12


def test_identical_pairs_cost_what_their_likeness_does():
    """x_i = y_i is no zero: InfoNCE leaves what the others take of the softmax, soft targets leave their entropy."""
    x, _ = some(6, 8)
    t = np.array(soft_targets(*arrays(x, x), 0.1))  # which, of identical sides, is the softmax of either
    assert contrastive(x, x, 0.1, targets="hard").item() == pytest.approx(-np.log(np.diag(t)).mean())
    expected = (t * -np.log(t)).sum() / 12 + (t.T * -np.log(t)).sum() / 12
    assert contrastive(x, x, 0.1, targets="soft").item() == pytest.approx(expected)


@pytest.mark.parametrize("name", TARGETS)
def test_matched_pairs_cost_less_than_unmatched_ones(name):
    x, y = some(8, 16, lengths=(1, 1))
    near = x + 0.1 * y
    assert contrastive(x, near, 0.1, targets=name) < contrastive(x, near.roll(1, 0), 0.1, targets=name)


@pytest.mark.parametrize("name", TARGETS)
def test_one_pair_has_nothing_to_learn(name):
    value, found = gradients(*some(1, 5), 0.07, targets=name)
    assert value.item() == 0
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize(
    ("x", "y", "shapes"),
    [((3, 4), (4, 4), "(3, 4) (4, 4)"), ((3, 4), (3, 5), "(3, 4) (3, 5)"),
     ((4,), (4,), "(4,)"), ((2, 3, 4), (2, 3, 4), "(2, 3, 4)"),
     ((1, 4), (3, 4), "(1, 4) (3, 4)")],
)  # fmt: skip
def test_other_shapes_are_refused(x, y, shapes):
    with pytest.raises(ConfigError, match=naming(f"x y {shapes}")):
        contrastive(torch.ones(x), torch.ones(y), 0.1)


@pytest.mark.parametrize("name", ["", "Soft", "semi"])
def test_other_targets_are_refused(name):
    with pytest.raises(ConfigError, match=naming(f"targets {name!r}")):
        contrastive(torch.ones(2, 3), torch.ones(2, 3), 0.1, targets=name)
