"""What every encoder of an alignment must do with every fusion operation, and what each operation is."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import as_tokens
from cachefuse.alignment.model import Aligner
from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.fusion.dfe import EXPANSION, DeepFusionEncoder, Projection, TransformerBlock, masked_mean
from cachefuse.registry import ATTENTION_HEADS, METHODS, OPERATIONS, lookup

WIDTHS = (6, 5)
B, T, W = 4, 7, 8
ATTENTION = ("additive-attention", "dot-attention")

every = pytest.mark.parametrize(
    ("method", "op"), [(method, op) for method in sorted(METHODS) for op in sorted(OPERATIONS)]
)


def build(method, op, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return lookup(METHODS, method, "method")(WIDTHS, W, operation=op, dropout=dropout)


def align(method, op, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return Aligner(WIDTHS, AlignConfig(method=method, op=op, width=W, dropout=dropout))


def tokens(side, n_tokens=T, seed=0, lengths=True):
    """Return tokens (B, T, D) and a mask; with ``lengths`` a sample has T, T - 1, ... tokens, at least one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, n_tokens, WIDTHS[side], generator=generator)
    n = torch.arange(n_tokens, n_tokens - B, -1).clamp(min=1) if lengths else torch.full((B,), n_tokens)
    return x, torch.arange(n_tokens) < n[:, None]


def padded(x, mask, n, value):
    """Return tokens and mask with n more tokens, and ``value`` wherever a token is none."""
    x = torch.cat([x, x.new_zeros(len(x), n, x.shape[2])], 1)
    mask = torch.cat([mask, mask.new_zeros(len(x), n)], 1)
    return torch.where(mask[..., None], x, x.new_tensor(value)), mask


def gradients(model, side, x, mask):
    model.zero_grad()
    model(x, mask, side).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def unreached(model, n_tokens):
    model.zero_grad()
    for side in range(len(WIDTHS)):
        # Not the sum of squares: that of a vector that was just normalised would be constant.
        (model(*tokens(side, n_tokens), side) * torch.arange(W)).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


@every
def test_shape_and_dtype(method, op):
    model = build(method, op)
    for side in range(len(WIDTHS)):
        for n_tokens in (1, 2, T):
            out = model(*tokens(side, n_tokens), side)
            assert out.shape == (B, W)
            assert out.dtype == torch.float32
            assert out.isfinite().all()


@every
def test_gradients_reach_every_parameter(method, op):
    assert unreached(build(method, op), T) == set()


@every
def test_with_one_token_all_but_attention_can_matter(method, op):
    """Where there is nothing to choose from, the softmax is 1: neither scores nor the context have an effect."""
    idle = {"context.weight"} if op in ATTENTION else set()
    model = build(method, op)
    if op in ATTENTION:
        idle |= {f"operation.{name}" for name, _ in getattr(model, "operation", nn.Module()).named_parameters()}
    assert unreached(model, 1) == (idle if method == "dfe" else set())


@every
def test_the_gradient_is_that_of_the_formula(method, op):
    model = build(method, op).double()
    x, mask = tokens(0, 3)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, mask, 0), (x,))


@every
def test_same_seed_same_embeddings(method, op):
    x, mask = tokens(0)
    assert torch.equal(build(method, op)(x, mask, 0), build(method, op)(x, mask, 0))
    assert not torch.equal(build(method, op)(x, mask, 0), build(method, op, seed=1)(x, mask, 0))


@every
def test_dropout_is_drawn_by_the_seed_and_off_in_evaluation(method, op):
    x, mask = tokens(0)
    model = build(method, op, dropout=0.5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(x, mask, 0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(model(x, mask, 0), model(x, mask, 0))
    assert torch.equal(model(x, mask, 0), build(method, op)(x, mask, 0))


@every
def test_saves_and_loads(method, op, tmp_path):
    saved, loaded = align(method, op), align(method, op, seed=1)
    for side in range(len(WIDTHS)):
        saved.standardize[side].fit(tokens(side)[0].flatten(0, 1) * 2 + 1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for side in range(len(WIDTHS)):
        assert torch.equal(saved(side, tokens(side)), loaded(side, tokens(side)))


@every
@pytest.mark.parametrize("n_tokens", [1, T])
def test_rows_do_not_influence_one_another(method, op, n_tokens):
    model = build(method, op)
    x, mask = tokens(0, n_tokens)
    whole = model(x, mask, 0)
    torch.testing.assert_close(model(x[1:3], mask[1:3], 0), whole[1:3])
    others = torch.where(torch.arange(B)[:, None, None] == 1, x, 1e4)
    torch.testing.assert_close(model(others, mask, 0)[1], whole[1])


@every
@pytest.mark.parametrize("n", [0, 1, 200])
@pytest.mark.parametrize("value", [0.0, 1e4, -65504.0])
def test_padding_changes_nothing(method, op, n, value):
    model = build(method, op)
    x, mask = tokens(0)
    expected, of_expected = model(x, mask, 0), gradients(model, 0, *padded(x, mask, 0, 0.0))
    torch.testing.assert_close(model(*padded(x, mask, n, value), 0), expected, rtol=1e-5, atol=1e-5)
    for found, gradient in zip(gradients(model, 0, *padded(x, mask, n, value)), of_expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max() + 1e-6))


@every
@pytest.mark.parametrize("value", [0.0, 1e4, 65504.0])
def test_padding_of_stored_features_changes_nothing(method, op, value):
    """Through an alignment as it is used: float16, standardised, to unit vectors."""
    model = align(method, op)
    x, mask = tokens(1)
    x = (x * 3 + 1).half()
    model.standardize[1].fit(x[mask])
    alone = [model(1, (x[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())])) for i in range(B)]
    for n in (0, 1, 200):
        torch.testing.assert_close(model(1, padded(x, mask, n, value)), torch.cat(alone), rtol=1e-5, atol=1e-5)


@every
def test_a_pooled_feature_is_a_sequence_of_one(method, op):
    """One token goes a shorter way, where attention has nothing to choose; padding takes it the long way."""
    model = build(method, op)
    x = torch.randn(B, WIDTHS[0], generator=torch.Generator().manual_seed(0))
    one, mask = as_tokens(x, torch.arange(B))
    assert one.shape == (B, 1, WIDTHS[0])
    assert mask.all()
    expected, of_expected = model(one, mask, 0), gradients(model, 0, one, mask)
    for n in (1, 5):
        longer = padded(one, mask, n, 1e3)
        torch.testing.assert_close(model(*longer, 0), expected, rtol=1e-5, atol=1e-5)
        for found, gradient in zip(gradients(model, 0, *longer), of_expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@every
def test_the_order_of_tokens_makes_no_difference(method, op):
    model = build(method, op)
    x, mask = tokens(0)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x[:, order], mask[:, order], 0), model(x, mask, 0), rtol=1e-5, atol=1e-5)


@every
def test_a_token_left_out_is_as_if_it_were_not_there(method, op):
    model = build(method, op)
    x, _ = tokens(0)
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
def test_sides_of_the_same_width_differ_by_their_projection_and_context(method, op):
    torch.manual_seed(0)
    model = lookup(METHODS, method, "method")((6, 6), W, operation=op)
    x, mask = tokens(0)
    assert not torch.allclose(model(x, mask, 0), model(x, mask, 1))
    model.project[1].load_state_dict(model.project[0].state_dict())
    same = torch.allclose(model(x, mask, 0), model(x, mask, 1), atol=1e-6)
    assert same == (method == "projection")  # which has no context
    assert torch.allclose(model(x[:, :1], mask[:, :1], 0), model(x[:, :1], mask[:, :1], 1), atol=1e-6) == (
        method == "projection" or op in ATTENTION
    )


@every
def test_one_encoder_is_shared_by_both_sides(method, op):
    """Only the projections, and a DFE's contexts, are a side's own."""
    names = {name for name, _ in build(method, op).named_parameters()}
    own = {name for name in names if name.startswith(("project.0.", "project.1."))}
    assert len(own) == 8
    model = build(method, op)
    model(*tokens(0), 0).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name in own if name.startswith("project.1.")}


class TestOperations:
    """Each against arithmetic in NumPy."""

    def given(self, op):
        torch.manual_seed(0)
        operation = lookup(OPERATIONS, op, "operation")(W).double()
        x = torch.randn(2, 3, W, dtype=torch.float64)
        context = torch.randn(W, dtype=torch.float64)
        mask = torch.tensor([[True, True, True], [True, True, False]])
        weights = {name: value.detach().numpy() for name, value in operation.named_parameters()}
        return operation(x, context, mask).detach().numpy(), x.numpy(), context.numpy(), mask.numpy(), weights

    def attended(self, x, mask, score):
        """x + sum of the real tokens, each by the softmax of its score."""
        out = np.empty_like(x)
        for b in range(len(x)):
            real = [t for t in range(x.shape[1]) if mask[b, t]]
            powers = {t: math.exp(score(x[b, t])) for t in real}
            mean = sum(powers[t] / sum(powers.values()) * x[b, t] for t in real)
            out[b] = x[b] + mean
        return out

    def test_add(self):
        found, x, context, *_ = self.given("add")
        np.testing.assert_allclose(found, x + context)

    def test_multiply(self):
        found, x, context, *_ = self.given("mul")
        np.testing.assert_allclose(found, x * (1 + context))

    def test_concat(self):
        found, x, context, _, weights = self.given("concat")
        for b, t in np.ndindex(2, 3):
            both = np.concatenate([x[b, t], context])
            np.testing.assert_allclose(found[b, t], weights["linear.weight"] @ both + weights["linear.bias"])

    def test_additive_attention(self):
        found, x, context, mask, w = self.given("additive-attention")
        query = w["query.weight"] @ context + w["query.bias"]
        expected = self.attended(x, mask, lambda k: float(w["score.weight"][0] @ np.tanh(query + w["key.weight"] @ k)))
        np.testing.assert_allclose(found, expected)

    def test_dot_attention(self):
        found, x, context, mask, w = self.given("dot-attention")
        query = w["query.weight"] @ context + w["query.bias"]
        expected = self.attended(x, mask, lambda k: float(query @ (w["key.weight"] @ k)) / math.sqrt(W))
        np.testing.assert_allclose(found, expected)

    @pytest.mark.parametrize("op", ATTENTION)
    def test_attention_to_one_token_is_that_token(self, op):
        operation = lookup(OPERATIONS, op, "operation")(W)
        x, context = torch.randn(2, 1, W), torch.randn(W)
        torch.testing.assert_close(operation(x, context, torch.ones(2, 1, dtype=torch.bool)), 2 * x)

    def test_multiply_is_near_the_identity_at_the_start(self):
        torch.manual_seed(0)
        model = DeepFusionEncoder(WIDTHS, 64, operation="mul")
        x = torch.randn(3, 2, 64)
        fused = model.operation(x, model.context.weight[0], torch.ones(3, 2, dtype=torch.bool))
        assert ((fused - x).abs() <= 0.1 * x.abs()).all()


def reference_of(block):
    """Return torch's own layer, in float64, with a block's weights."""
    width = block.norm1.weight.shape[0]
    layer = nn.TransformerEncoderLayer(
        width, ATTENTION_HEADS, EXPANSION * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    own = block.state_dict()
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "mlp.0.", "linear2.": "mlp.3.",
             "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
    layer.load_state_dict(
        {theirs + kind: own[ours + kind] for theirs, ours in names.items() for kind in ("weight", "bias")}
    )
    return layer


@pytest.fixture
def block():
    """A transformer block, biases and norms as after some training."""
    torch.manual_seed(0)
    block = TransformerBlock(16).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_the_block_is_torchs_encoder_layer(block, n_tokens):
    x = torch.randn(5, n_tokens, 16, dtype=torch.float64)
    mask = torch.arange(n_tokens) < torch.tensor([n_tokens, 1, 1, n_tokens, max(1, n_tokens - 1)])[:, None]
    expected = reference_of(block)(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(block(x, mask)[mask], expected[mask])


def test_the_gradients_of_the_block_are_torchs(block):
    x, mask = torch.randn(3, 4, 16, dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    layer = reference_of(block)
    for one, out in ((block, block(x, mask)), (layer, layer(x))):
        one.zero_grad()
        out.square().sum().backward()
    torch.testing.assert_close(block.qkv.weight.grad, layer.self_attn.in_proj_weight.grad)
    torch.testing.assert_close(block.mlp[0].weight.grad, layer.linear1.weight.grad)


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_the_whole_encoder_is_what_the_paper_says(op):
    """Project, fuse with the side's context, LayerNorm, block, residual connection, mean over the real tokens."""
    model = build("dfe", op).double()
    x, mask = tokens(1)
    x = x.double()
    first, _, _, second = model.project[1]
    projected = second(torch.relu(first(x)))
    fused = model.operation(projected, model.context.weight[1], mask)
    through = fused + reference_of(model.block)(
        nn.functional.layer_norm(fused, (W,), model.norm.weight, model.norm.bias), src_key_padding_mask=~mask
    )
    expected = torch.stack([row[own].mean(0) for row, own in zip(through, mask, strict=True)])
    torch.testing.assert_close(model(x, mask, 1), expected)


def test_the_baseline_is_a_projection_alone():
    model = build("projection", "add")
    x, mask = tokens(0)
    expected = torch.stack([model.project[0](row[own]).mean(0) for row, own in zip(x, mask, strict=True)])
    torch.testing.assert_close(model(x, mask, 0), expected)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"project"}


def test_dropout_lies_within_the_projection_and_the_block():
    assert sum(isinstance(module, nn.Dropout) and module.p == 0.5 for module in Projection(3, 4, 0.5)) == 1
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in TransformerBlock(8, dropout=0.5).modules()) == 2


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_the_mean_is_over_real_tokens_whatever_the_others_hold(value):
    x, mask = tokens(0)
    expected = torch.stack([row[own].mean(0) for row, own in zip(x, mask, strict=True)])
    torch.testing.assert_close(masked_mean(*padded(x, mask, 3, value)), expected)
    assert not masked_mean(x, torch.zeros_like(mask)).any()  # where none is real there is nothing


@pytest.mark.parametrize("width", [6, 9, 1])
def test_widths_that_heads_can_not_share_are_refused(width):
    with pytest.raises(ConfigError, match=f"width must be a multiple of 4, the attention heads. Got {width} instead"):
        DeepFusionEncoder(WIDTHS, width)


def test_other_operations_are_refused():
    with pytest.raises(UnknownNameError, match=r"unknown operation 'ad' \(did you mean 'add'\?\)"):
        DeepFusionEncoder(WIDTHS, 8, operation="ad")
