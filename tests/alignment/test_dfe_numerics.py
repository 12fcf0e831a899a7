"""The Deep Fusion Encoder in numbers: operations by hand, the block against torch's, the whole against the paper."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.alignment import OPERATIONS
from cachefuse.alignment.dfe import DeepFusionEncoder, Projection
from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.nn import ATTENTION_HEADS
from cachefuse.nn.masking import masked_mean
from cachefuse.nn.transformer import EXPANSION, TransformerBlock
from cachefuse.registry import lookup
from fixtures.messages import naming

WIDTHS = (6, 5)
W = 8
ATTENTION = ("additive-attention", "dot-attention", "general-attention")


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

    def test_general_attention(self):
        found, x, context, mask, w = self.given("general-attention")
        expected = self.attended(x, mask, lambda k: float(context @ (w["key.weight"] @ k)))
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
def test_the_whole_encoder_is_what_the_paper_says(op, dfe):
    """Project, fuse with the side's context, LayerNorm, block, residual connection, mean over the real tokens."""
    model = dfe.build("dfe", op).double()
    x, mask = dfe.tokens(1)
    x = x.double()
    first, _, _, second = model.project[1]
    projected = second(torch.relu(first(x)))
    fused = model.operation(projected, model.context.weight[1], mask)
    through = fused + reference_of(model.block)(
        nn.functional.layer_norm(fused, (W,), model.norm.weight, model.norm.bias), src_key_padding_mask=~mask
    )
    expected = torch.stack([row[own].mean(0) for row, own in zip(through, mask, strict=True)])
    torch.testing.assert_close(model(x, mask, 1), expected)


def test_the_baseline_is_a_projection_alone(dfe):
    model = dfe.build("projection", "add")
    x, mask = dfe.tokens(0)
    expected = torch.stack([model.project[0](row[own]).mean(0) for row, own in zip(x, mask, strict=True)])
    torch.testing.assert_close(model(x, mask, 0), expected)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"project"}


def test_dropout_lies_within_the_projection_and_the_block():
    assert sum(isinstance(module, nn.Dropout) and module.p == 0.5 for module in Projection(3, 4, 0.5)) == 1
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in TransformerBlock(8, dropout=0.5).modules()) == 2


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_the_mean_is_over_real_tokens_whatever_the_others_hold(value, dfe):
    x, mask = dfe.tokens(0)
    expected = torch.stack([row[own].mean(0) for row, own in zip(x, mask, strict=True)])
    torch.testing.assert_close(masked_mean(*dfe.padded(x, mask, 3, value)), expected)
    assert not masked_mean(x, torch.zeros_like(mask)).any()  # where none is real there is nothing


@pytest.mark.parametrize("width", [6, 9, 1])
def test_widths_that_heads_can_not_share_are_refused(width):
    with pytest.raises(ConfigError, match=naming(f"width 4 heads {width}")):
        DeepFusionEncoder(WIDTHS, width)


def test_other_operations_are_refused():
    with pytest.raises(UnknownNameError, match=naming("ad add")):
        DeepFusionEncoder(WIDTHS, 8, operation="ad")
