"""The Deep Fusion Encoder and its loss against "Context-Based Multimodal Fusion" (CBMF), restated in NumPy, float64.

Equations 1 to 6 of the paper. The authors' later code (LightCRL, "Lightweight Cross-Modal Representation Learning")
adds a sixth operation, general attention (arXiv 1508.04025), and tells how they pair captions.
"""

import numpy as np
import pytest
import torch

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.pairs import mine_pairs
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.open_store import open_store
from cachefuse.nn.losses import contrastive
from cachefuse.store.writer import ViewWriter
from fixtures.columns import columns, texts_of

D, W, HEADS = (5, 7), 8, 4  # widths of the two sides, of the common space, and section IV-A's attention heads


def layer_norm(x, p, name):
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    erf = torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy()
    return x * (1 + erf) / 2


def self_attention(x, p):
    """Attention with 4 heads over the tokens (T, W) of one sample."""
    q, k, v = (part.reshape(len(x), HEADS, -1).swapaxes(0, 1) for part in np.split(linear(x, p, "qkv"), 3, axis=1))
    mixed = softmax(q @ k.swapaxes(1, 2) / np.sqrt(W / HEADS)) @ v  # (heads, T, W / heads)
    return linear(mixed.swapaxes(0, 1).reshape(len(x), W), p, "out")


def block(x, p):
    x = x + self_attention(layer_norm(x, p, "norm1"), p)
    return x + linear(gelu(linear(layer_norm(x, p, "norm2"), p, "mlp.0")), p, "mlp.3")


def fuse(op, x, c, p):
    """Equation 1's operation on tokens (T, W) and a context (W,); equation 2 for the three attentions."""
    match op:
        case "add":
            return x + c
        case "mul":
            return x * (1 + c)
        case "concat":
            return np.stack([linear(np.concatenate([row, c]), p, "linear") for row in x])
        case "additive-attention":  # W1 tanh(W2 Q + W3 K)
            scores = (np.tanh(linear(c, p, "query") + x @ p["key.weight"].T) @ p["score.weight"].T)[:, 0]
        case "dot-attention":  # Q K^T / sqrt(d)
            scores = (x @ p["key.weight"].T) @ linear(c, p, "query") / np.sqrt(W)
        case "general-attention":  # Q W K
            scores = np.array([c @ p["key.weight"] @ row for row in x])
    attended = sum(weight * row for weight, row in zip(softmax(scores), x, strict=True))
    return x + attended


def under(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def encode(op, side, tokens, p):
    """f(g_m(x) (*) g(c_m)) of one sample's tokens (T, D_m): the mean of the output tokens, of length 1."""
    g = under(p, f"encoder.project.{side}.")
    x = linear(np.maximum(linear(tokens, g, "0"), 0), g, "3")
    fused = fuse(op, x, p["encoder.context.weight"][side], under(p, "encoder.operation."))
    out = (fused + block(layer_norm(fused, p, "encoder.norm"), under(p, "encoder.block."))).mean(0)
    return out / np.linalg.norm(out)


def small(op, dtype=torch.float64):
    """An untrained encoder with contexts and norms as after some training; features are not standardised further."""
    torch.manual_seed(0)
    model = Aligner(D, AlignConfig(op=op, width=W, dropout=0.0, views="tokens")).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, {name: value.double().numpy() for name, value in model.state_dict().items()}


def unit(embeddings):
    x = embeddings.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


OPERATIONS = ("add", "mul", "concat", "additive-attention", "dot-attention", "general-attention")


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_encoder_is_the_papers(op, side):
    model, p = small(op)
    lengths = [4, 1, 3]
    x = torch.randn(3, 4, D[side], dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    found = unit(model.encoder(x, mask, side))
    expected = [encode(op, side, x[i, :n].numpy(), p) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_encoder_in_float32(op):
    model, p = small(op, torch.float32)
    x = torch.randn(2, 3, D[0])
    found = model(0, (x, torch.ones(2, 3, dtype=torch.bool))).detach().numpy()
    np.testing.assert_allclose(found, [encode(op, 0, row.double().numpy(), p) for row in x], atol=3e-6)


def test_the_operations_differ():
    """So that none of the above holds because all operations are alike."""
    x, mask = torch.randn(2, 4, D[0], dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    found = [unit(small(op)[0].encoder(x, mask, 0)) for op in OPERATIONS]
    for i in range(len(found)):
        for j in range(i):
            assert np.abs(found[i] - found[j]).max() > 1e-3


@pytest.mark.parametrize("tau", [0.07, 0.5, 1.0])
@pytest.mark.parametrize("targets", ["soft", "printed", "hard"])
def test_the_loss_is_equations_3_to_6(targets, tau):
    """Equation 5 prints "/ 2 . tau": "soft" divides by 2 tau; "printed" divides by 2 and multiplies by tau."""
    rng = np.random.default_rng(0)
    m = 6
    x, y = rng.normal(size=(m, 4)), rng.normal(size=(m, 4))
    ux, uy = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    l1, l2 = -np.log(softmax(ux @ uy.T / tau)), -np.log(softmax(uy @ ux.T / tau))
    both = ux @ ux.T + uy @ uy.T
    t = {"soft": softmax(both / (2 * tau)), "printed": softmax(both / 2 * tau), "hard": np.eye(m)}[targets]
    expected = sum(t[i, j] * l1[i, j] + t[j, i] * l2[i, j] for i in range(m) for j in range(m)) / (2 * m)
    found = contrastive(torch.from_numpy(x), torch.from_numpy(y), tau, targets=targets)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def captions(tmp_path):
    """A store with 30 samples of 0 to 5 captions near to one another, in two splits, and their arrays."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 6, 30)
    x = [rng.normal(size=6) + 0.5 * rng.normal(size=(n, 6)) for n in counts]
    x = [own.astype(np.float32) for own in x]
    splits = np.array(["train"] * 20 + ["val"] * 10)
    words = [tuple(f"caption {i} of {row}" for i in range(n)) for row, n in enumerate(counts)]
    words[1] = ("the same words",) * len(words[1])
    raw = Dataset(
        manifest=parse_manifest('name = "some"\ntask = "retrieval"\nreader = { kind = "shapes" }', "some.toml"),
        classes=(),
        ids=[f"row{row}" for row in range(30)],
        splits=splits,
        targets=np.full(30, -1, np.int32),
        modalities=columns(texts=words),
        name="some",
    )
    store = open_store(tmp_path / "some.zarr", raw)
    features = store.require_features(
        "toy", "text", {"dtype": "float32", "family": "toy"}, "toy", {"pooled": "float32"}
    )
    with ViewWriter(features, "pooled", ragged=False, dtype="float32") as writer:
        writer.add(np.arange(int(counts.sum())), list(np.concatenate(x)))
    return store, raw, x, splits


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_pairs_as_the_authors_take_them(captions, threshold):
    """Every two captions of an image with a cosine of .7 or more; LightCRL pairs no captions of two images."""
    store, raw, x, splits = captions
    pairs = mine_pairs(store.open_features("toy", "text"), texts_of(raw), threshold, within_samples=True, device="cpu")
    expected, first = {"train": {}, "val": {}}, 0
    for row, own in enumerate(x):
        unit = own.astype(np.float64) / np.linalg.norm(own.astype(np.float64), axis=1, keepdims=True)
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                if (cosine := float(unit[i] @ unit[j])) >= threshold:
                    expected[splits[row]][first + i, first + j] = cosine
        first += len(own)
    assert expected["train"]
    for split, of in expected.items():
        rows, cosines = pairs.rows.get(split, np.zeros((0, 2), int)), pairs.cosines.get(split, np.zeros(0))
        assert sorted(map(tuple, rows.tolist())) == sorted(of)
        np.testing.assert_allclose(cosines, [of[tuple(pair)] for pair in rows.tolist()], atol=1e-6)
        assert (np.diff(cosines) <= 0).all()
