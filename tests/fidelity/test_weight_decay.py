"""Weight decay leaves biases, norms, embeddings, learned scales and tokens alone, for every optimizer and model."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.model import Aligner
from cachefuse.feature_spec import pooled_specs
from cachefuse.fusion.late import ConcatFusion
from cachefuse.nn import HEADS
from cachefuse.training import OPTIMIZERS
from cachefuse.training.config import TrainConfig
from cachefuse.training.optim import decay_groups


def gmlp(layers=(8, 8)):
    head = partial(HEADS["gmlp"], layers=layers)
    return ConcatFusion(pooled_specs({"image": 6, "text": 5}), 3, head)


def zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["weights", "all"])
def test_without_a_gradient_only_weights_shrink(name, decay):
    """One step on a loss of 0: what changes is what decays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    before = {key: x.clone() for key, x in model.named_parameters()}
    optimizer = OPTIMIZERS[name](decay_groups(model, 0.1, decay), lr=0.01, weight_decay=0.1)

    def closure():
        zero_gradients(model)
        return torch.zeros(())

    closure()
    optimizer.step(closure)
    changed = {key for key, x in model.named_parameters() if not torch.equal(x, before[key])}
    assert changed == (set(before) if decay == "all" else {"0.weight", "3.weight"})


@pytest.mark.parametrize("model", [gmlp(), Aligner([6, 5], AlignConfig(width=32)), nn.TransformerEncoderLayer(8, 2)])
def test_what_decays_are_matrices_of_layers(model):
    """Biases and norms by the rule of nanoGPT (fewer than two dimensions); embeddings as in minGPT."""
    groups = decay_groups(model, 0.1, "weights")
    decayed = {id(x) for group in groups if group["weight_decay"] for x in group["params"]}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    assert decayed == {id(x) for x in model.parameters() if x.ndim > 1} - embeddings
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


class Own(nn.Module):
    """Matrices of its own, one a learned token."""

    no_weight_decay = ("token",)

    def __init__(self):
        super().__init__()
        self.w, self.token = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))
        self.scale, self.bias_k = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(1, 1, 4))


class AsTimm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.token = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))

    def no_weight_decay(self):
        return {"token"}


def tied(first, second):
    """A layer and an embedding that share a matrix, in either order."""
    layers = {"layer": nn.Linear(4, 6, bias=False), "embedding": nn.Embedding(6, 4)}
    layers["layer"].weight = layers["embedding"].weight
    return nn.ModuleDict({name: layers[name] for name in (first, second)})


@pytest.mark.parametrize(
    ("model", "spared"),
    [
        (nn.GRU(4, 4), {"bias_ih_l0", "bias_hh_l0"}),
        (nn.LSTMCell(4, 4), {"bias_ih", "bias_hh"}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"}),
        (nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), {"bias"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {"bias"}),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), {"bias"}),
        (nn.ParameterList([nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))]), {"1"}),
        (nn.Bilinear(3, 4, 2), {"bias"}),
        (nn.EmbeddingBag(5, 4), {"weight"}),
        (nn.LayerNorm((3, 4)), {"weight", "bias"}),
        (Own(), {"token", "scale", "bias_k"}),
        (AsTimm(), {"token"}),
        (tied("layer", "embedding"), {"layer.weight"}),
        (tied("embedding", "layer"), {"embedding.weight"}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_modules_of_a_users_own(model, spared):
    groups = decay_groups(nn.ModuleList([model, nn.Linear(2, 2, bias=False)]), 0.1, "weights")
    (kept,) = (group["params"] for group in groups if not group["weight_decay"])
    assert {name for name, x in model.named_parameters() if any(x is one for one in kept)} == spared


def test_a_frozen_weight_is_in_no_group():
    model = gmlp()
    model.head.classify.requires_grad_(False)
    params = [x for group in decay_groups(model, 0.1, "weights") for x in group["params"]]
    assert {id(x) for x in params} == {id(x) for x in model.parameters() if x.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_training_equals_torchs_with_groups(optimizer):
    """Three full-batch steps of a linear head, restated with torch's optimizers in float64."""
    from cachefuse import FusionClassifier

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    settings = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.5, "batch_size": 0, "schedule": "constant"}
    config = {"fusion": "concat", "head": "linear", **settings}
    start = FusionClassifier(**{**config, "lr": 1e-12, "weight_decay": 0.0}, epochs=1).fit(x, y).models_[0].fusion.head
    ours = FusionClassifier(**config, epochs=3).fit(x, y).models_[0].fusion.head
    weight, bias = (nn.Parameter(p.detach().double()) for p in (start.weight, start.bias))
    z = torch.tensor((x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64), dtype=torch.float64)
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    theirs = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    }[optimizer](groups, lr=0.1)
    for _ in range(3):
        theirs.zero_grad()
        nn.functional.cross_entropy(z @ weight.T + bias, torch.tensor(y)).backward()
        theirs.step()
    np.testing.assert_allclose(ours.weight.detach(), weight.detach(), atol=2e-5)
    np.testing.assert_allclose(ours.bias.detach(), bias.detach(), atol=2e-5)


def test_every_fusion_trains_with_decay_on_the_command_lines_default():
    assert TrainConfig().decay == AlignConfig().decay == "weights"
