import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.nn import ACTIVATIONS, HEADS
from cachefuse.nn.heads import (
    MLP,
    ChannelGate,
    Dropout,
    GatedBlock,
    GatedMLP,
    Linear,
    SpatialGate,
)
from fixtures.messages import naming


@pytest.mark.parametrize("name", sorted(HEADS))
def test_maps_width_to_classes(name):
    head = HEADS[name](6, 3)
    assert head(torch.randn(4, 6)).shape == (4, 3)
    assert head(torch.randn(0, 6)).shape == (0, 3)


def test_linear_is_a_linear_layer():
    head = Linear(6, 3)
    x = torch.randn(4, 6)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)
    with pytest.raises(ConfigError, match=naming("head linear layers 8")):
        Linear(6, 3, layers=(8,))


def test_mlp_is_linear_activation_dropout():
    head = MLP(6, 3, layers=(8, 5), activation="relu", dropout=0.4)
    assert [type(module) for module in head.layers] == [
        *(nn.Linear, nn.ReLU, Dropout),
        *(nn.Linear, nn.ReLU, Dropout),
        nn.Linear,
    ]
    assert [tuple(module.weight.shape) for module in head.layers[::3]] == [(8, 6), (5, 8), (3, 5)]
    assert head.layers[2].p == 0.4


def test_dropout_acts_in_training_only():
    x = torch.randn(4, 6)
    for kind in (MLP, GatedMLP):
        head = kind(6, 3, layers=(64,), dropout=0.5)
        assert not torch.equal(head(x), head(x))
        head.eval()
        assert torch.equal(head(x), head(x))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name):
    kind = ACTIVATIONS[name]
    assert isinstance(MLP(6, 3, layers=(8,), activation=name).layers[1], kind)
    assert isinstance(GatedMLP(6, 3, layers=(8,), activation=name).blocks[0].activation, kind)


def test_gate_opens_as_the_identity():
    gate = ChannelGate(16)
    z = 3 * torch.randn(5, 16)
    torch.testing.assert_close(gate(z), z[:, :8], rtol=5e-3, atol=0)


def test_gate_by_hand():
    gate = ChannelGate(4)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    # LN([5, 9]) = [-1, 1], so W LN(v) + b = [-1, 2 * -1 + 3 * 1] + 1 = [0, 2].
    torch.testing.assert_close(gate(torch.tensor([[7.0, 4, 5, 9]])), torch.tensor([[0.0, 8]]), rtol=1e-5, atol=1e-5)


def test_gated_block_has_a_residual():
    block = GatedBlock(6, 8, nn.GELU(), dropout=0.0)
    nn.init.zeros_(block.project.weight)
    nn.init.zeros_(block.project.bias)
    x = torch.randn(4, 6)
    assert torch.equal(block(x), x)


def test_gated_mlp_has_a_block_for_each_layer():
    head = GatedMLP(6, 3, layers=(8, 4))
    assert [type(module) for module in head.children()] == [nn.Sequential, nn.Linear]
    assert [(type(block), block.expand.out_features) for block in head.blocks] == [(GatedBlock, 8), (GatedBlock, 4)]
    with pytest.raises(ConfigError, match=naming("layers 8 5")):
        GatedMLP(6, 3, layers=(8, 5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    drop, x = Dropout(p), torch.full((1000, 333), 2.0, requires_grad=True)
    y = drop(x)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.005)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - p)), atol=1e-3, rtol=1e-3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept * (y.detach() / 2))
    assert not torch.equal(drop(x), y)
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)  # by torch's own seed
    assert drop.eval()(x) is x or torch.equal(drop(x), x)


def test_the_spatial_gate_follows_its_equation_and_opens_as_the_identity():
    torch.manual_seed(0)
    gate, z = SpatialGate(8, tokens=5), torch.randn(3, 5, 8)
    u, v = z[..., :4], z[..., 4:]
    normed = (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    mixed = torch.einsum("st,btc->bsc", gate.linear.weight, normed) + gate.linear.bias[:, None]
    torch.testing.assert_close(gate(z), u * mixed)
    torch.testing.assert_close(gate(z), u, atol=0.02, rtol=0)
    assert gate.linear.weight.abs().max() <= 1e-3 / 5


def test_a_gated_head_over_tokens_mixes_them():
    torch.manual_seed(0)
    head = GatedMLP(30, 3, layers=(8,), n_tokens=5)
    x = torch.randn(2, 30)
    logits = head(x)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in head.parameters())
    with torch.no_grad():
        head.blocks[0].gate.linear.weight.normal_()
        moved = head(x.view(2, 5, 6).flip(1).flatten(1))
    assert not torch.allclose(moved, head(x), atol=1e-3)  # the gate tells tokens apart by their place
    with pytest.raises(RuntimeError):
        head(torch.randn(2, 24))


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_options_out_of_range(kind):
    with pytest.raises(ConfigError, match=naming("layers 1 8 0")):
        kind(6, 3, layers=(8, 0))
    with pytest.raises(ConfigError, match=naming("dropout 0 1")):
        kind(6, 3, layers=(8,), dropout=1)
    with pytest.raises(UnknownNameError, match=naming("gelo gelu")):
        kind(6, 3, layers=(8,), activation="gelo")
