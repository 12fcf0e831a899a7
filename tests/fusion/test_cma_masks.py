"""CMA-CLIP's gradients, and what is absent or padding: of no influence, finite, and masked only where it must be."""

from functools import partial

import pytest
import torch

from cachefuse.fusion.cma import CMAFusion
from cachefuse.nn.heads import MLP, Linear
from cachefuse.nn.transformer import TransformerBlock

MODALITIES = ("audio", "image", "text")
B, C, W, HEADS = 10, 3, 8, 2
NONE = 9  # the row that has no modality


def test_where_nothing_is_masked_no_mask_is_needed(cma):
    """The path without a mask, of rows that have everything, is that with one."""
    fusion = cma.build(modalities=("image",))
    features, present = cma.inputs()
    rows = torch.tensor([0, 1, 4])
    assert present["image_tokens"][rows].all()
    few = [{name: x[rows] for name, x in part.items()} for part in cma.of(fusion, features, present)]
    torch.testing.assert_close(fusion(*few), fusion(*cma.of(fusion, features, present))[rows], rtol=1e-12, atol=1e-12)


def test_lambda_adds_up_to_1_over_what_is_there(ablate, cma):
    fusion = cma.build(ablate)
    features, present = cma.inputs(filler=torch.nan)
    weights = fusion.weights(*cma.of(fusion, features, present))
    here = torch.stack([present[m] for m in MODALITIES], dim=1)
    assert weights.shape == (B, 3)
    assert not weights[~here].any()
    assert (weights[here] > 0).all()
    torch.testing.assert_close(weights.sum(1), here.any(1).double())
    assert (weights[here.sum(1) == 1].max(1).values == 1).all()


@pytest.mark.parametrize("head", [Linear, partial(MLP, layers=(6,), dropout=0.2)], ids=["linear", "mlp"])
def test_gradients_reach_every_parameter(ablate, head, cma):
    torch.manual_seed(0)
    fusion = CMAFusion(cma.SPECS, C, head, width=W, heads=HEADS, ablate=ablate)  # from its own start, in training
    fusion(*cma.of(fusion, *cma.inputs(torch.float32))).square().sum().backward()
    assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_of_the_whole_reach_each_part_of_queries_keys_and_values(cma):
    fusion = cma.build(depth=2)
    fusion(*cma.inputs()).square().sum().backward()
    for block in fusion.blocks:
        assert all(part.any() for part in block.qkv.weight.grad.split(W))


@pytest.mark.parametrize("filler", [0.0, torch.inf, torch.nan])
def test_a_row_of_nothing_is_finite_in_value_and_gradient(ablate, filler, cma):
    fusion = cma.build(ablate, dtype=torch.float32)
    features, present = cma.inputs(torch.float32, filler)
    outcomes = []
    for rows in (slice(None), slice(NONE, None)):  # with others, and a batch of it alone
        x = {name: x[rows].clone().requires_grad_() for name, x in features.items() if name in fusion.specs}
        fusion.zero_grad()
        logits = fusion(x, {name: here[rows] for name, here in present.items()})
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in fusion.parameters() if p.grad is not None)
        assert all(part.grad.isfinite().all() and not part.grad[-1].any() for part in x.values())
        outcomes.append(logits[-1])
    torch.testing.assert_close(outcomes[0], fusion.head.bias)  # it is told nothing: what the head says of zeros
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_every_row_has_something_to_attend_to(monkeypatch, cma):
    """What a softmax over nothing comes to, 0 or NaN, depends on torch's version and the device."""
    fusion, masks = cma.build(), []
    real = TransformerBlock.forward
    monkeypatch.setattr(
        TransformerBlock, "forward", lambda block, x, mask, n=None: masks.append(mask) or real(block, x, mask, n)
    )
    features, present = cma.inputs()
    fusion(features, present)
    assert len(masks) == 2
    for mask in masks:
        assert mask.any(1).all()
        assert mask.sum(1).tolist() == [
            max(1, sum(int(here[row].sum()) for here in present.values())) for row in range(B)
        ]


def test_what_is_absent_has_no_influence(ablate, cma):
    fusion = cma.build(ablate)
    outcomes = []
    for filler in (0.0, 1e6, torch.nan):
        fusion.zero_grad()
        logits = fusion(*cma.of(fusion, *cma.inputs(filler=filler)))
        logits.square().sum().backward()
        outcomes.append([logits, *(p.grad.clone() for p in fusion.parameters())])
    for others in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcomes[0], others, strict=True))


def test_masks_are_left_as_they_were(cma):
    """The row of nothing is given a token to attend to, but not in the caller's presence."""
    fusion, (features, present) = cma.build(), cma.inputs()
    before = {name: x.clone() for name, x in present.items()}
    fusion(features, present)
    fusion.weights(features, present)
    assert all(torch.equal(x, before[name]) for name, x in present.items())


@pytest.mark.parametrize("depth", [1, 2])
def test_every_token_counts_and_every_modality_sees_the_others(depth, cma):
    fusion = cma.build(depth=depth)
    features, present = cma.inputs()
    tokens = features["text_tokens"].clone().requires_grad_()
    pooled = features["image"].clone().requires_grad_()
    summaries, _ = fusion.summaries({**features, "text_tokens": tokens, "image": pooled}, present)
    (of_tokens,) = torch.autograd.grad(summaries[0, 1].sum(), tokens, retain_graph=True)  # the image's class token
    assert of_tokens[0].any(1).all()
    assert not of_tokens[1:].any()
    (of_image,) = torch.autograd.grad(summaries[0, 2].sum(), pooled)  # the text's
    assert of_image[0].any()


def test_the_order_of_features_does_not_matter(cma):
    torch.manual_seed(0)
    one = CMAFusion(cma.SPECS, C, Linear, width=W, heads=HEADS)
    torch.manual_seed(0)
    two = CMAFusion(dict(reversed(cma.SPECS.items())), C, Linear, width=W, heads=HEADS)
    assert list(one.state_dict()) == list(two.state_dict())
    features, present = cma.inputs(torch.float32)
    backwards = dict(reversed(features.items())), dict(reversed(present.items()))
    assert torch.equal(one.eval()(features, present), two.eval()(*backwards))


def test_dropout_acts_in_training_only(cma):
    fusion, given = cma.build(dropout=0.5), cma.inputs()
    assert torch.equal(fusion(*given), fusion(*given))
    fusion.train()
    assert not torch.equal(fusion(*given), fusion(*given))
    assert {m.p for m in fusion.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
