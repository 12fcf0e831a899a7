"""TIRG by hand, its batch normalisation, and the fusion around it."""

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError
from cachefuse.fusion.model import FusionModel
from cachefuse.fusion.tirg import TIRG, BatchNorm, TIRGFusion
from cachefuse.nn.heads import Linear
from cachefuse.training.optim import EMA
from fixtures.messages import naming
from fixtures.specs import specs_of

WIDTHS = {"image": 3, "text": 4}
SPECS = specs_of(WIDTHS)
EPS = 1e-5  # of batch normalisation


def trained(module, seed=0):
    """A module as after some training: no weight, bias or running statistic is as it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += torch.randn(buffer.shape, generator=generator)
            elif name.endswith("running_var"):
                buffer += torch.rand(buffer.shape, generator=generator)
    return module


def fill(module, values):
    """Set parameters and statistics by name; those that are not named stay."""
    state = {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}
    assert not module.load_state_dict(state, strict=False).unexpected_keys


@pytest.fixture
def by_hand():
    """A TIRG of width 1 whose every product can be followed; the variances are less by eps, so that roots are whole."""
    tirg = TIRG(1).double().eval()
    fill(tirg, {
        "gate.0.running_mean": [1, -5], "gate.0.running_var": [4 - EPS, 4 - EPS],
        "gate.0.weight": [2, 1], "gate.0.bias": [0, -3], "gate.2.weight": [[3, 7]], "gate.2.bias": [-3],
        "residual.0.running_var": [1 - EPS, 1 - EPS],
        "residual.2.weight": [[1, 9], [-1, 9]], "residual.2.bias": [0.5, 1],
        "residual.4.weight": [[0.4, 5]], "residual.4.bias": [-0.9],
    })  # fmt: skip
    return tirg


def test_gate_and_residual_by_hand(by_hand):
    assert (by_hand.gate_weight.item(), by_hand.residual_weight.item()) == (1, 10)
    # g = 2, f = -3. Gate: normalised (0.5, 1), scaled (1, -2), ReLU (1, 0), 3 - 3 = 0: half of g is let through, 1.
    # Residual: ReLU (2, 0), hidden (2.5, -1), ReLU (2.5, 0), 1 - 0.9 = 0.1, times 10: 1.
    # g = -1, f = 1. Gate: (-1, 3), scaled (-2, 0), ReLU (0, 0), -3: sigmoid(-3) of -1.
    # Residual: ReLU (0, 1), hidden (9.5, 10), 3.8 + 50 - 0.9 = 52.9, times 10: 529.
    query, modifier = torch.tensor([[2.0], [-1]]).double(), torch.tensor([[-3.0], [1]]).double()
    expected = [[1 + 1], [-1 / (1 + np.exp(3)) + 529]]
    np.testing.assert_allclose(by_hand(query, modifier).detach().numpy(), expected, rtol=1e-12)


def test_the_two_weights_are_learnt(by_hand):
    query, modifier = torch.tensor([[2.0]]).double(), torch.tensor([[-3.0]]).double()
    by_hand(query, modifier).sum().backward()
    assert by_hand.gate_weight.grad.item() == pytest.approx(0.5 * 2)
    assert by_hand.residual_weight.grad.item() == pytest.approx(0.1)
    fill(by_hand, {"gate_weight": 3, "residual_weight": -2})
    assert by_hand(query, modifier).item() == pytest.approx(3 * 1 - 2 * 0.1)


def norm(x, weight, bias, mean, var):
    return (x - mean) / np.sqrt(var + EPS) * weight + bias


def reference(w, query, modifier, *, statistics=None):
    """TIRG in NumPy, normalised by the running statistics, or by (mean, var) of a batch."""
    both = np.concatenate([query, modifier], axis=1)

    def normed(name):
        mean, var = statistics or (w[f"{name}.0.running_mean"], w[f"{name}.0.running_var"])
        return np.maximum(norm(both, w[f"{name}.0.weight"], w[f"{name}.0.bias"], mean, var), 0)

    gate = normed("gate") @ w["gate.2.weight"].T + w["gate.2.bias"]
    hidden = np.maximum(normed("residual") @ w["residual.2.weight"].T + w["residual.2.bias"], 0)
    residual = hidden @ w["residual.4.weight"].T + w["residual.4.bias"]
    return w["gate_weight"] * query / (1 + np.exp(-gate)) + w["residual_weight"] * residual


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 3)), rng.normal(2, 3, size=(7, 3))


def numbers(module):
    return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}


def test_evaluation_goes_by_the_running_statistics(pair):
    tirg = trained(TIRG(3).double()).eval()
    before = numbers(tirg)
    found = tirg(*map(torch.from_numpy, pair)).detach().numpy()
    np.testing.assert_allclose(found, reference(before, *pair), rtol=1e-10)
    assert all((x == before[name]).all() for name, x in numbers(tirg).items())


def test_training_goes_by_the_batch_and_keeps_count(pair):
    tirg = trained(TIRG(3).double()).train()
    before = numbers(tirg)
    both = np.concatenate(pair, axis=1)
    found = tirg(*map(torch.from_numpy, pair)).detach().numpy()
    statistics = both.mean(0), both.var(0)
    np.testing.assert_allclose(found, reference(before, *pair, statistics=statistics), rtol=1e-10)
    after = numbers(tirg)
    for name in ("gate.0", "residual.0"):
        kept = {kind: before[f"{name}.running_{kind}"] for kind in ("mean", "var")}
        np.testing.assert_allclose(after[f"{name}.running_mean"], 0.9 * kept["mean"] + 0.1 * both.mean(0))
        np.testing.assert_allclose(after[f"{name}.running_var"], 0.9 * kept["var"] + 0.1 * both.var(0, ddof=1))
        assert after[f"{name}.num_batches_tracked"] == 1


def test_a_batch_of_one_row_is_trained_by_the_running_statistics(pair):
    tirg = trained(TIRG(3).double()).train()
    before = numbers(tirg)
    one = [torch.from_numpy(x[:1]) for x in pair]
    found = tirg(*one)
    np.testing.assert_allclose(found.detach().numpy(), reference(before, *(x[:1] for x in pair)), rtol=1e-10)
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tirg.parameters())
    # It has no deviation to learn the statistics from.
    assert all((x == before[name]).all() for name, x in numbers(tirg).items())
    torch.testing.assert_close(tirg.eval()(*one), found)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_batch_normalisation_is_torchs_but_for_one_row(n):
    """torch refuses to train on one row; what it says of more rows, or none, is what we say."""
    torch.manual_seed(0)
    ours, theirs = trained(BatchNorm(4)), nn.BatchNorm1d(4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(n, 4)
    if n == 1:
        with pytest.raises(ValueError, match=naming("1")):
            theirs(x)
    elif n:
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# The fusion


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(6, width, generator=generator, dtype=torch.float64) for m, width in WIDTHS.items()}


def everywhere(n=6):
    return {m: torch.ones(n, dtype=torch.bool) for m in WIDTHS}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return trained(TIRGFusion(SPECS, 2, Linear, width=5, **options).double()).eval()


@pytest.mark.parametrize("query", ["image", "text"])
def test_the_query_is_adjusted_by_the_other_modality(query, features):
    fusion = build(query=query)
    assert (fusion.query, {fusion.query, fusion.modifier}) == (query, {"image", "text"})
    x = {m: fusion.project[m](features[m]).detach().numpy() for m in WIDTHS}
    other = {"image": "text", "text": "image"}[query]
    adjusted = reference(numbers(fusion.tirg), x[query], x[other])
    expected = adjusted @ fusion.head.weight.detach().numpy().T + fusion.head.bias.detach().numpy()
    np.testing.assert_allclose(fusion(features, everywhere()).detach().numpy(), expected, rtol=1e-10)


def test_the_image_is_the_query_unless_told():
    assert TIRGFusion.options() == {"query": "image", "width": 512}
    assert (build().query, build().modifier) == ("image", "text")
    assert TIRGFusion(SPECS, 2, Linear).head.in_features == 512


def test_query_and_modifier_are_not_interchangeable(features):
    one, two = build(query="image"), build(query="text")
    two.load_state_dict(one.state_dict())
    assert not torch.allclose(one(features, everywhere()), two(features, everywhere()))


@pytest.mark.parametrize("value", [0.0, 1e6, torch.inf, torch.nan])
def test_what_is_absent_counts_as_0_after_its_map(value, features):
    """Not as the map's bias, which is what 0 would come to."""
    fusion, present = build(), everywhere()
    present["image"][[0, 2]] = False
    present["text"][[1, 2]] = False
    given = {m: torch.where(present[m][:, None], x, value).requires_grad_() for m, x in features.items()}
    x = {m: (fusion.project[m](features[m]) * present[m][:, None]).detach().numpy() for m in WIDTHS}
    adjusted = reference(numbers(fusion.tirg), x["image"], x["text"])
    found = fusion(given, present)
    expected = adjusted @ fusion.head.weight.detach().numpy().T + fusion.head.bias.detach().numpy()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in fusion.parameters())
    assert all(not given[m].grad[~present[m]].any() and given[m].grad[present[m]].any() for m in WIDTHS)


@pytest.mark.parametrize("n", [1, 6])
def test_gradients_reach_every_parameter_in_training(n, features):
    fusion = build().train()
    fusion({m: x[:n] for m, x in features.items()}, everywhere(n)).square().sum().backward()
    assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ({"image": 3}, {}, "fusion tirg image"),
        ({"text": 3}, {}, "fusion tirg image text"),
        ({"audio": 2, **WIDTHS}, {}, "image audio text"),
        (WIDTHS, {"query": "audio"}, "audio image text"),
        (WIDTHS, {"query": "image_tokens"}, "image_tokens image"),
        ({}, {}, "fusion tirg"),
        (WIDTHS, {"width": 0}, "width 1 0"),
        (WIDTHS, {"width": -1}, "width 1 -1"),
    ],
    ids=str,
)
def test_says_what_it_needs(widths, options, message):
    with pytest.raises(ConfigError, match=naming(message)):
        TIRGFusion(specs_of(widths), 2, Linear, **{"width": 5, **options})


def test_averaged_weights_come_with_the_running_statistics(features):
    """Those that the batches had: with the ones of the start, averaged weights would be of no use."""
    torch.manual_seed(0)
    model = FusionModel(TIRGFusion(SPECS, 2, Linear, width=5)).train()
    ema = EMA(model, 0.5)
    x = {m: 10 + 3 * part.float() for m, part in features.items()}
    for _ in range(20):
        model(x, everywhere())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01
        ema.update()
    own, averaged = (dict(part.named_buffers()) for part in (model, ema.model))
    assert all(torch.equal(averaged[name], buffer) for name, buffer in own.items())
    name = "fusion.tirg.gate.0.running_mean"
    assert averaged[name].abs().max() > 1
    assert averaged["fusion.tirg.gate.0.num_batches_tracked"] == 20
    assert all((p != q).any() for p, q in zip(model.parameters(), ema.model.parameters(), strict=True))
    before = averaged[name].clone()
    model(x, everywhere())
    assert not torch.equal(own[name], before)
    assert torch.equal(averaged[name], before)  # a copy: it follows by update alone
