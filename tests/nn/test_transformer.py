"""The transformer block against the pieces of torch it is made of, in float64, head by head."""

import math

import pytest
import torch
import torch.nn.functional as F

from cachefuse.errors import ConfigError
from cachefuse.nn.transformer import EXPANSION, TransformerBlock
from fixtures.messages import naming

B, T, W, HEADS = 5, 6, 12, 3


@pytest.fixture
def block():
    """A block as after some training, in evaluation mode: no bias is 0, no norm the identity."""
    torch.manual_seed(0)
    block = TransformerBlock(W, HEADS, dropout=0.3).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block


@pytest.fixture
def x():
    return torch.randn(B, T, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    """Rows of 1 to T tokens, the first one not always among them."""
    mask = torch.arange(T) < torch.tensor([6, 1, 3, 5, 4])[:, None]
    mask[2, 0] = False
    return mask


def attended(block, tokens, queries):
    """What some tokens (n, W) find among the tokens (T, W) of one sample, head by head."""
    width = W // HEADS
    normed = F.layer_norm(tokens, (W,), block.norm1.weight, block.norm1.bias)
    asking = F.layer_norm(queries, (W,), block.norm1.weight, block.norm1.bias)
    weights, biases = block.qkv.weight.split(W), block.qkv.bias.split(W)
    q = F.linear(asking, weights[0], biases[0])
    k, v = (F.linear(normed, weights[i], biases[i]) for i in (1, 2))
    found = []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        scores = q[:, own] @ k[:, own].T / math.sqrt(width)
        found.append(F.softmax(scores, dim=1) @ v[:, own])
    return F.linear(torch.cat(found, dim=1), block.out.weight, block.out.bias)


def by_hand(block, tokens, queries):
    """A block's output for some tokens (n, W) of one sample that has the tokens (T, W)."""
    x = queries + attended(block, tokens, queries)
    normed = F.layer_norm(x, (W,), block.norm2.weight, block.norm2.bias)
    hidden = F.gelu(F.linear(normed, block.mlp[0].weight, block.mlp[0].bias))
    assert hidden.shape[1] == EXPANSION * W
    return x + F.linear(hidden, block.mlp[3].weight, block.mlp[3].bias)


@pytest.mark.parametrize("n_queries", [None, 1, 2, T])
def test_each_token_is_mapped_as_by_hand(block, x, mask, n_queries):
    found = block(x, mask, n_queries)
    assert found.shape == (B, n_queries or T, W)
    for row in range(B):
        expected = by_hand(block, x[row][mask[row]], x[row, :n_queries])
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_queries", [1, 3, T, T + 4])
@pytest.mark.parametrize("masked", [True, False])
def test_the_first_tokens_alone_are_those_of_the_whole(block, x, mask, n_queries, masked):
    mask = mask if masked else None
    whole = block(x, mask)
    torch.testing.assert_close(block(x, mask, n_queries), whole[:, :n_queries], rtol=1e-12, atol=1e-12)


def test_gradients_of_the_first_tokens_alone_are_those_of_the_whole(block, x, mask):
    gradients = []
    for found in (block(x, mask, 2), block(x, mask)[:, :2]):
        block.zero_grad()
        found.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_queries", [None, 2])
def test_no_mask_is_a_mask_of_all(block, x, n_queries):
    everything = torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(block(x, None, n_queries), block(x, everything, n_queries), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, torch.ones(B, 1, dtype=torch.bool)])
def test_a_token_alone_attends_to_itself(block, x, mask):
    x = x[:, :1]
    expected = torch.stack([by_hand(block, row, row) for row in x])
    torch.testing.assert_close(block(x, mask), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block(x, mask, 1), expected, rtol=1e-10, atol=1e-10)


def test_what_is_masked_has_no_influence_on_the_rest(block, x, mask):
    other = torch.where(mask[..., None], x, 1e6)
    torch.testing.assert_close(block(other, mask)[mask], block(x, mask)[mask])
    (gradient,) = torch.autograd.grad(block(x.requires_grad_(), mask)[mask].sum(), x)
    assert not gradient[~mask].any()
    assert gradient[mask].any()


def test_the_order_of_other_tokens_does_not_matter(block, x, mask):
    """Attention knows no positions: those that matter are in the tokens."""
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    torch.testing.assert_close(block(x[:, order], mask[:, order], 1), block(x, mask, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x[:, order], mask[:, order]), block(x, mask)[:, order], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences(block, mask):
    x = torch.randn(2, 3, W, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    few = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda x: block(x, few, 2), x)


def test_dropout_acts_in_training_only_and_on_what_is_added(block, x):
    assert torch.equal(block(x, None), block(x, None))
    block.train()
    assert not torch.equal(block(x, None), block(x, None))
    for module in block.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1 - 1e-9
    torch.testing.assert_close(block(x, None), x, atol=1e-2, rtol=0)  # the way past both is open


@pytest.mark.parametrize(("width", "heads"), [(12, 5), (0, 3), (12, 0), (12, -3), (2, 3), (-12, 3)])
def test_widths_that_heads_can_not_share_are_refused(width, heads):
    with pytest.raises(ConfigError, match=naming(f"width {heads} heads {width}")):
        TransformerBlock(width, heads)


def test_heads_differ_from_one_wide_head(block, x):
    wide = TransformerBlock(W, 1).double().eval()
    wide.load_state_dict(block.state_dict())
    assert not torch.allclose(wide(x, None), block(x, None))
