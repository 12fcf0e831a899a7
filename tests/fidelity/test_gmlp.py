"""The block of gMLP (arXiv 2105.08050, figure 1), in float64 NumPy, and runs from before its input norm."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from cachefuse.nn.heads import ChannelGate, GatedBlock, GatedMLP, SpatialGate
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig


def normalised(x, weight, bias):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    return x / 2 * (1 + erf(x / np.sqrt(2)))


def reference(x, w, along_tokens):
    """shortcut + proj(spatial_gating_unit(gelu(proj(norm(x)))))."""
    z = gelu(normalised(x, w["norm.weight"], w["norm.bias"]) @ w["expand.weight"].T + w["expand.bias"])
    u, v = np.split(z, 2, axis=-1)
    v = normalised(v, w["gate.norm.weight"], w["gate.norm.bias"])
    if along_tokens:
        v = np.swapaxes(np.swapaxes(v, -1, -2) @ w["gate.linear.weight"].T + w["gate.linear.bias"], -1, -2)
    else:
        v = v @ w["gate.linear.weight"].T + w["gate.linear.bias"]
    return x + (u * v) @ w["project.weight"].T + w["project.bias"]


@pytest.mark.parametrize("n_tokens", [0, 5])
def test_a_block_is_the_papers(n_tokens):
    rng = np.random.default_rng(0)
    block = GatedBlock(12, 16, nn.GELU(), dropout=0.0, n_tokens=n_tokens).double().eval()
    weights = {name: rng.normal(size=tuple(tensor.shape)) for name, tensor in block.state_dict().items()}
    block.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    assert isinstance(block.gate, SpatialGate if n_tokens else ChannelGate)
    x = rng.normal(size=(7, n_tokens, 12) if n_tokens else (7, 12))
    expected = reference(x, weights, bool(n_tokens))
    np.testing.assert_allclose(block(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-10)


def test_a_head_is_blocks_and_a_linear_layer():
    head = GatedMLP(12, 3, layers=(8, 16)).double().eval()
    x = torch.randn(4, 12, dtype=torch.float64)
    y = x.numpy()
    for block in head.blocks:
        y = reference(y, {name: tensor.detach().numpy() for name, tensor in block.state_dict().items()}, False)
    expected = y @ head.classify.weight.detach().numpy().T + head.classify.bias.detach().numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-10)


def test_a_run_from_before_the_norm_predicts_as_it_did(toy_store, tmp_path):
    store = toy_store()
    run = train_head(store, TrainConfig(head="gmlp", layers=(8,), epochs=2))
    [member] = run.members
    blocks = [block for block in member.model.modules() if isinstance(block, GatedBlock)]
    assert blocks
    for block in blocks:
        block.norm = nn.Identity()
    old = replace(run, name="old")
    loaded = load_run(save_run(old, tmp_path))
    [again] = loaded.members
    assert all(isinstance(block.norm, nn.Identity) for block in again.model.modules() if isinstance(block, GatedBlock))
    for name, tensor in member.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
