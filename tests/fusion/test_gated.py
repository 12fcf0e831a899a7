import math

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError
from cachefuse.fusion.gated import GatedFusion
from cachefuse.nn.heads import Linear
from fixtures.messages import naming
from fixtures.specs import specs_of

WIDTHS = {"text": 3, "audio": 4, "image": 2}
SPECS = specs_of(WIDTHS)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(6, width, generator=generator) for m, width in WIDTHS.items()}


@pytest.fixture
def present():
    """Every modality in rows 0 and 1, then fewer and fewer: none in row 5."""
    return {
        "audio": torch.tensor([True, True, False, True, False, False]),
        "image": torch.tensor([True, True, True, False, False, False]),
        "text": torch.tensor([True, True, True, False, True, False]),
    }


@pytest.fixture
def fusion():
    """Gated as after some training: the gate is no longer even."""
    torch.manual_seed(0)
    model = GatedFusion(SPECS, 4, Linear)
    nn.init.normal_(model.gate.weight)
    nn.init.normal_(model.gate.bias)
    return model


def test_starts_as_the_plain_mean(features, present):
    fusion = GatedFusion(SPECS, 4, Linear)
    logits = {m: head(features[m]) for m, head in fusion.heads.items()}
    everywhere = {m: torch.ones(6, dtype=torch.bool) for m in WIDTHS}
    torch.testing.assert_close(fusion(features, everywhere), sum(logits.values()) / 3)
    of_present = torch.stack([logits[m] * present[m][:, None] for m in logits]).sum(0)
    n = torch.stack([present[m] for m in logits]).sum(0)
    torch.testing.assert_close(fusion(features, present)[:5], of_present[:5] / n[:5, None])


def test_the_weights_by_hand(features, present, fusion):
    """A softmax over the modalities present, of a linear map of all features, absent ones as 0."""
    order = ["audio", "image", "text"]
    weights = fusion.weights(features, present)
    assert weights.shape == (6, 3)
    w, b = fusion.gate.weight.tolist(), fusion.gate.bias.tolist()
    for row in range(6):
        x = [v if present[m][row] else 0.0 for m in order for v in features[m][row].tolist()]
        scores = [b[m] + sum(w[m][d] * x[d] for d in range(9)) for m in range(3)]
        there = [math.exp(scores[m]) if present[order[m]][row] else 0.0 for m in range(3)]
        expected = [value / sum(there) if any(there) else 0.0 for value in there]
        assert weights[row].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_logits_by_hand(features, present, fusion):
    weights = fusion.weights(features, present)
    logits = fusion(features, present)
    for row in range(6):
        expected = torch.zeros(4)
        for i, modality in enumerate(["audio", "image", "text"]):
            expected += weights[row, i] * fusion.heads[modality](features[modality][row])
        torch.testing.assert_close(logits[row], expected)


def test_weights_add_up_to_one_over_what_is_present(features, present, fusion):
    weights = fusion.weights(features, present)
    here = torch.stack([present[m] for m in sorted(WIDTHS)], dim=1)
    assert torch.equal(weights > 0, here)
    torch.testing.assert_close(weights.sum(1), here.any(1).float())
    assert weights[3].tolist() == [1, 0, 0]  # one alone takes all
    assert weights[4].tolist() == [0, 0, 1]


def test_weights_depend_on_the_row(features, present, fusion):
    weights = fusion.weights(features, present)
    assert not torch.allclose(weights[0], weights[1], atol=0.01)


def test_a_row_without_anything_has_logits_of_zero(features, present, fusion):
    features = {m: torch.full_like(x, torch.nan) for m, x in features.items()}
    nothing = {m: torch.zeros_like(x) for m, x in present.items()}
    logits = fusion(features, nothing)
    assert logits.tolist() == [[0] * 4] * 6
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("scale", [1e3, 1e20])
def test_a_gate_that_is_certain_stays_finite(features, present, fusion, scale):
    with torch.no_grad():
        fusion.gate.weight *= scale
    logits = fusion(features, present)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())
    weights = fusion.weights(features, present)
    assert not weights[~torch.stack([present[m] for m in sorted(WIDTHS)], dim=1)].any()


def test_a_gate_that_is_shut_for_what_is_present(features, present, fusion):
    """However low the score of a modality, where it is the only one it takes all."""
    with torch.no_grad():
        fusion.gate.bias[0] = -1e30
    assert fusion.weights(features, present)[3].tolist() == [1, 0, 0]


def test_each_head_alone_is_the_fusion_without_the_others(features, present, fusion):
    alone = fusion.unimodal_heads()
    assert sorted(alone) == sorted(WIDTHS)
    everywhere = torch.ones(6, dtype=torch.bool)
    for modality, head in alone.items():
        only = {m: everywhere if m == modality else ~everywhere for m in WIDTHS}
        torch.testing.assert_close(head(features, only), fusion(features, only))
        assert set(head.parameters()) == set(fusion.heads[modality].parameters())


def test_one_modality_needs_no_gate(features):
    fusion = GatedFusion(specs_of({"image": 2}), 4, Linear)
    here = {"image": torch.tensor([True] * 5 + [False])}
    x = {"image": features["image"]}
    np.testing.assert_array_equal(fusion.weights(x, here).detach()[:, 0], [1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(fusion(x, here)[:5], fusion.heads["image"](features["image"][:5]))


def test_needs_something_to_weigh():
    with pytest.raises(ConfigError, match=naming("fusion gated")):
        GatedFusion(specs_of({}), 4, Linear)


def test_learns_which_modality_to_trust():
    """Where each row's label shows in one modality, and another feature says in which, a gate beats the mean."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    label = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    in_image = torch.rand(n, generator=generator) < 0.5
    noise = 4 * torch.randn(2, n, generator=generator)
    flag = in_image * 2.0 - 1
    features = {
        "image": torch.stack([torch.where(in_image, label, noise[0]), flag], dim=1),
        "text": torch.stack([torch.where(in_image, noise[1], label), flag], dim=1),
    }
    present = {m: torch.ones(n, dtype=torch.bool) for m in features}

    def accuracy(gated):
        torch.manual_seed(0)
        fusion = GatedFusion(specs_of({"image": 2, "text": 2}), 1, Linear)
        fusion.gate.requires_grad_(gated)
        optimizer = torch.optim.Adam([p for p in fusion.parameters() if p.requires_grad], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.soft_margin_loss(fusion(features, present)[:, 0], label).backward()
            optimizer.step()
        return ((fusion(features, present)[:, 0] > 0) == (label > 0)).float().mean().item(), fusion

    (even, _), (weighed, fusion) = accuracy(False), accuracy(True)
    assert even < 0.8
    assert weighed > 0.95
    image_weight = fusion.weights(features, present)[:, 0]
    assert image_weight[in_image].mean() > 0.9
    assert image_weight[~in_image].mean() < 0.1
