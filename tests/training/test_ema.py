import math

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.training.optim import EMA


def moved(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9, 0.999])
def test_follows_the_weights_as_the_formula_says(decay):
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay)
    expected = {name: x.detach().numpy().copy() for name, x in model.named_parameters()}
    rng = np.random.default_rng(0)
    for t in range(1, 31):
        moved(model, rng.normal())
        ema.update()
        d = min(decay, (1 + t) / (10 + t))
        for name, x in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * x.detach().numpy()
    for name, x in ema.model.named_parameters():
        np.testing.assert_allclose(x.detach().numpy(), expected[name], rtol=1e-12)


def test_warms_up_by_hand():
    """From 0, with weights of 1 ever after: 1 less the product of d = 2/11, 3/12, 4/13, and then 0.3 twice."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.3)
    nn.init.ones_(model.weight)
    seen = []
    for _ in range(5):
        ema.update()
        seen.append(ema.model.weight.item())
    lag = [2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # 4/13 is more than 0.3
    assert seen == pytest.approx((1 - np.cumprod(lag)).tolist(), rel=1e-6)
    assert ema.steps == 5


def test_forgets_the_start_within_a_few_steps():
    """Without the warm-up, a decay of 0.999 would leave 0.99 of the start after 10 steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.999)
    nn.init.zeros_(model.weight)
    for _ in range(10):
        ema.update()
    assert ema.model.weight.item() == pytest.approx(math.prod((1 + t) / (10 + t) for t in range(1, 11)), rel=1e-5)
    assert ema.model.weight.item() < 1e-4


def test_is_a_copy_that_evaluates():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = EMA(model, 0.9)
    assert not any(module.training for module in ema.model.modules())
    assert model.training
    before = [x.clone() for x in model.parameters()]
    moved(ema.model, 1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    moved(model, 5)
    ema.update()
    assert all(torch.equal(x, y + 5) for x, y in zip(model.parameters(), before, strict=True))
    assert torch.is_grad_enabled()


def test_weights_that_stay_stay_to_the_bit():
    """Frozen heads of a staged training are averaged too, with themselves."""
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    ema = EMA(model.requires_grad_(False), 0.999)
    for _ in range(100):
        ema.update()
    assert all(torch.equal(x, y) for x, y in zip(ema.model.parameters(), model.parameters(), strict=True))


def test_leaves_no_trace_in_the_gradients():
    model = nn.Linear(2, 1)
    ema = EMA(model, 0.9)
    model(torch.ones(1, 2)).sum().backward()
    ema.update()
    assert all(x.grad is None and x.grad_fn is None for x in ema.model.parameters())
    assert all(x.grad is not None for x in model.parameters())
