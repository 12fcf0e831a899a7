"""What every encoder of an alignment must do with every fusion operation, and what each operation is."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cachefuse.alignment import METHODS, OPERATIONS
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import as_tokens
from cachefuse.alignment.model import Aligner
from cachefuse.registry import lookup

WIDTHS = (6, 5)
B, T, W = 4, 7, 8
ATTENTION = ("additive-attention", "dot-attention", "general-attention")

every = pytest.mark.parametrize(
    ("method", "op"), [(method, op) for method in sorted(METHODS) for op in sorted(OPERATIONS)]
)


def align(method, op, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return Aligner(WIDTHS, AlignConfig(method=method, op=op, width=W, dropout=dropout))


def gradients(model, side, x, mask):
    model.zero_grad()
    model(x, mask, side).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def unreached(dfe, model, n_tokens):
    model.zero_grad()
    for side in range(len(WIDTHS)):
        # Not the sum of squares: that of a vector that was just normalised would be constant.
        (model(*dfe.tokens(side, n_tokens), side) * torch.arange(W)).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


@every
def test_shape_and_dtype(method, op, dfe):
    model = dfe.build(method, op)
    for side in range(len(WIDTHS)):
        for n_tokens in (1, 2, T):
            out = model(*dfe.tokens(side, n_tokens), side)
            assert out.shape == (B, W)
            assert out.dtype == torch.float32
            assert out.isfinite().all()


@every
def test_gradients_reach_every_parameter(method, op, dfe):
    assert unreached(dfe, dfe.build(method, op), T) == set()


@every
def test_with_one_token_all_but_attention_can_matter(method, op, dfe):
    """Where there is nothing to choose from, the softmax is 1: neither scores nor the context have an effect."""
    idle = {"context.weight"} if op in ATTENTION else set()
    model = dfe.build(method, op)
    if op in ATTENTION:
        idle |= {f"operation.{name}" for name, _ in getattr(model, "operation", nn.Module()).named_parameters()}
    assert unreached(dfe, model, 1) == (idle if method == "dfe" else set())


@every
def test_the_gradient_is_that_of_the_formula(method, op, dfe):
    model = dfe.build(method, op).double()
    x, mask = dfe.tokens(0, 3)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, mask, 0), (x,))


@every
def test_same_seed_same_embeddings(method, op, dfe):
    x, mask = dfe.tokens(0)
    assert torch.equal(dfe.build(method, op)(x, mask, 0), dfe.build(method, op)(x, mask, 0))
    assert not torch.equal(dfe.build(method, op)(x, mask, 0), dfe.build(method, op, seed=1)(x, mask, 0))


@every
def test_dropout_is_drawn_by_the_seed_and_off_in_evaluation(method, op, dfe):
    x, mask = dfe.tokens(0)
    model = dfe.build(method, op, dropout=0.5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(x, mask, 0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(model(x, mask, 0), model(x, mask, 0))
    assert torch.equal(model(x, mask, 0), dfe.build(method, op)(x, mask, 0))


@every
def test_saves_and_loads(method, op, tmp_path, dfe):
    saved, loaded = align(method, op), align(method, op, seed=1)
    for side in range(len(WIDTHS)):
        saved.standardize[side].fit(dfe.tokens(side)[0].flatten(0, 1) * 2 + 1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for side in range(len(WIDTHS)):
        assert torch.equal(saved(side, dfe.tokens(side)), loaded(side, dfe.tokens(side)))


@every
@pytest.mark.parametrize("n_tokens", [1, T])
def test_rows_do_not_influence_one_another(method, op, n_tokens, dfe):
    model = dfe.build(method, op)
    x, mask = dfe.tokens(0, n_tokens)
    whole = model(x, mask, 0)
    torch.testing.assert_close(model(x[1:3], mask[1:3], 0), whole[1:3])
    others = torch.where(torch.arange(B)[:, None, None] == 1, x, 1e4)
    torch.testing.assert_close(model(others, mask, 0)[1], whole[1])


@every
@pytest.mark.parametrize("n", [0, 1, 200])
@pytest.mark.parametrize("value", [0.0, 1e4, -65504.0])
@pytest.mark.one_in(3)
def test_padding_changes_nothing(method, op, n, value, dfe):
    model = dfe.build(method, op)
    x, mask = dfe.tokens(0)
    expected, of_expected = model(x, mask, 0), gradients(model, 0, *dfe.padded(x, mask, 0, 0.0))
    torch.testing.assert_close(model(*dfe.padded(x, mask, n, value), 0), expected, rtol=1e-5, atol=1e-5)
    for found, gradient in zip(gradients(model, 0, *dfe.padded(x, mask, n, value)), of_expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max() + 1e-6))


@every
@pytest.mark.parametrize("value", [0.0, 1e4, 65504.0])
def test_padding_of_stored_features_changes_nothing(method, op, value, dfe):
    """Through an alignment as it is used: float16, standardised, to unit vectors."""
    model = align(method, op)
    x, mask = dfe.tokens(1)
    x = (x * 3 + 1).half()
    model.standardize[1].fit(x[mask])
    alone = [model(1, (x[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())])) for i in range(B)]
    for n in (0, 1, 200):
        torch.testing.assert_close(model(1, dfe.padded(x, mask, n, value)), torch.cat(alone), rtol=1e-5, atol=1e-5)


@every
def test_a_pooled_feature_is_a_sequence_of_one(method, op, dfe):
    """One token goes a shorter way, where attention has nothing to choose; padding takes it the long way."""
    model = dfe.build(method, op)
    x = torch.randn(B, WIDTHS[0], generator=torch.Generator().manual_seed(0))
    one, mask = as_tokens(x, torch.arange(B))
    assert one.shape == (B, 1, WIDTHS[0])
    assert mask.all()
    expected, of_expected = model(one, mask, 0), gradients(model, 0, one, mask)
    for n in (1, 5):
        longer = dfe.padded(one, mask, n, 1e3)
        torch.testing.assert_close(model(*longer, 0), expected, rtol=1e-5, atol=1e-5)
        for found, gradient in zip(gradients(model, 0, *longer), of_expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@every
def test_the_order_of_tokens_makes_no_difference(method, op, dfe):
    model = dfe.build(method, op)
    x, mask = dfe.tokens(0)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x[:, order], mask[:, order], 0), model(x, mask, 0), rtol=1e-5, atol=1e-5)


@every
def test_a_token_left_out_is_as_if_it_were_not_there(method, op, dfe):
    model = dfe.build(method, op)
    x, _ = dfe.tokens(0)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, [0, 3]] = False
    rest = [i for i in range(T) if i not in (0, 3)]
    torch.testing.assert_close(model(x, mask, 0), model(x[:, rest], mask[:, rest], 0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x, mask, 0), model(x, torch.ones_like(mask), 0))


@every
def test_float16_never_gives_nan(method, op):
    """The extremes of what a store holds, in every place, before and after the statistics are taken."""
    extremes = torch.tensor([65504, -65504, 0, 6e-8, -6e-8, 1], dtype=torch.float16)
    model = align(method, op)
    generator = torch.Generator().manual_seed(0)
    for fitted in (False, True, "constant", "tiny"):
        x = extremes[torch.randint(len(extremes), (64, 3, WIDTHS[0]), generator=generator)]
        x[:6] = extremes[:, None, None]  # and rows that are all alike
        mask = torch.arange(3) < torch.randint(1, 4, (64, 1), generator=generator)
        if fitted:
            tiny = 1.2e-7 * (torch.arange(10) % 2)[:, None].expand(10, WIDTHS[0])  # the largest scale that there can be
            of = {True: x[mask], "constant": torch.full((5, WIDTHS[0]), 65504.0), "tiny": tiny}
            model.standardize[0].fit(of[fitted].half())
            assert (model.standardize[0].scale > 1e7).all() == (fitted == "tiny")
        for n_tokens in (3, 1):
            model.zero_grad()
            out = model(0, (x[:, :n_tokens], mask[:, :n_tokens]))
            assert ((out.norm(dim=1) - 1).abs() < 1e-4).all()
            (out * torch.arange(W)).sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every
def test_sides_of_the_same_width_differ_by_their_projection_and_context(method, op, dfe):
    torch.manual_seed(0)
    model = lookup(METHODS, method, "method")((6, 6), W, operation=op)
    x, mask = dfe.tokens(0)
    assert not torch.allclose(model(x, mask, 0), model(x, mask, 1))
    model.project[1].load_state_dict(model.project[0].state_dict())
    same = torch.allclose(model(x, mask, 0), model(x, mask, 1), atol=1e-6)
    assert same == (method == "projection")  # which has no context
    assert torch.allclose(model(x[:, :1], mask[:, :1], 0), model(x[:, :1], mask[:, :1], 1), atol=1e-6) == (
        method == "projection" or op in ATTENTION
    )


@every
def test_one_encoder_is_shared_by_both_sides(method, op, dfe):
    """Only the projections, and a DFE's contexts, are a side's own."""
    names = {name for name, _ in dfe.build(method, op).named_parameters()}
    own = {name for name in names if name.startswith(("project.0.", "project.1."))}
    assert len(own) == 8
    model = dfe.build(method, op)
    model(*dfe.tokens(0), 0).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name in own if name.startswith("project.1.")}
