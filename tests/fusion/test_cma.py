"""CMA-CLIP against the paper's arithmetic, sample by sample without padding, in float64 NumPy; ablations; options."""

import itertools
import math

import numpy as np
import pytest
import torch

from cachefuse.errors import ConfigError
from cachefuse.fusion.cma import MODALITY_ATTENTION, SEQUENCE_ATTENTION, CMAFusion
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.heads import Linear
from cachefuse.nn.transformer import TransformerBlock
from fixtures.messages import naming
from fixtures.specs import specs_of

MODALITIES = ("audio", "image", "text")
B, C, W, HEADS = 10, 3, 8, 2


class Reference:
    """The paper's section 2 for one sample at a time: what is absent or padding is not there at all."""

    def __init__(self, fusion, ablate, depth):
        self.w = {name: x.numpy() for name, x in fusion.state_dict().items()}
        self.ablate, self.depth = ablate, depth

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, name, x):
        parts = self.linear(f"{name}.qkv", x)
        q, k, v = (parts[:, i * W : (i + 1) * W] for i in range(3))
        out = np.zeros_like(x)
        size = W // HEADS
        for head, one in itertools.product(range(HEADS), range(len(x))):
            own = slice(head * size, (head + 1) * size)
            powers = [math.exp(q[one, own] @ k[other, own] / math.sqrt(size)) for other in range(len(x))]
            out[one, own] = sum(power * v[other, own] for other, power in enumerate(powers)) / sum(powers)
        return self.linear(f"{name}.out", out)

    def mlp(self, name, x):
        hidden = self.linear(f"{name}.mlp.0", x)
        gelu = np.vectorize(lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))))(hidden)
        return self.linear(f"{name}.mlp.3", gelu)

    def summaries(self, sample):
        """The class tokens after the transformer, by modality; ``sample`` is (pooled (D,), tokens (T, D)) by it."""
        names = list(sample)
        x = [self.linear(f"embed.{m}", sample[m][0]) for m in names]
        if SEQUENCE_ATTENTION not in self.ablate:
            x += [self.linear(f"embed.{m}_tokens", token) for m in names for token in sample[m][1]]
        x = np.stack(x)
        for i in range(0 if SEQUENCE_ATTENTION in self.ablate else self.depth):
            x = x + self.attention(f"blocks.{i}", self.norm(f"blocks.{i}.norm1", x))
            x = x + self.mlp(f"blocks.{i}", self.norm(f"blocks.{i}.norm2", x))
        return {m: self.norm("norm", x[i]) for i, m in enumerate(names)}

    def weights(self, summaries):
        if MODALITY_ATTENTION in self.ablate:
            return {m: 1 / len(summaries) for m in summaries}
        powers = {m: math.exp(self.w["relevance"] @ c) for m, c in summaries.items()}
        return {m: power / sum(powers.values()) for m, power in powers.items()}

    def logits(self, sample):
        if not sample:
            return self.w["head.bias"]
        summaries = self.summaries(sample)
        weights = self.weights(summaries)
        return self.linear("head", sum(weights[m] * c for m, c in summaries.items()))


def samples(features, present, modalities=MODALITIES):
    """Each row as (pooled, its real tokens) of the modalities that it has."""
    return [
        {
            m: (features[m][row].numpy(), features[f"{m}_tokens"][row][present[f"{m}_tokens"][row]].numpy())
            for m in modalities
            if present[m][row]
        }
        for row in range(B)
    ]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("modalities", [("text",), ("image", "text"), MODALITIES], ids=len)
def test_logits_and_weights_are_the_papers(modalities, depth, ablate, cma):
    fusion = cma.build(ablate, modalities, depth)
    features, present = cma.inputs()
    reference = Reference(fusion, ablate, depth)
    logits = fusion(*cma.of(fusion, features, present)).detach().numpy()
    weights = fusion.weights(*cma.of(fusion, features, present)).detach().numpy()
    for row, sample in enumerate(samples(features, present, modalities)):
        np.testing.assert_allclose(logits[row], reference.logits(sample), rtol=1e-9, atol=1e-9)
        expected = reference.weights(reference.summaries(sample)) if sample else {}
        np.testing.assert_allclose(weights[row], [expected.get(m, 0) for m in sorted(modalities)], atol=1e-12)


@pytest.mark.parametrize("filler", [0.0, torch.nan])
def test_pooled_tokens_join_in_place_of_their_own(filler, cma):
    fusion = cma.build(pool="image=mean:1,text=max:1")
    reduce = {"image": lambda x: x.mean(0), "text": lambda x: x.max(0), "audio": lambda x: x}
    reference, features, present = Reference(fusion, (), 2), *cma.inputs()
    found = fusion(*cma.inputs(filler=filler))
    for row, sample in enumerate(samples(features, present)):
        pooled = {m: (c, reduce[m](x).reshape(-1, x.shape[1]) if len(x) else x) for m, (c, x) in sample.items()}
        np.testing.assert_allclose(found[row].detach().numpy(), reference.logits(pooled), rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in fusion.parameters())


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_maps_class_tokens_alone_to_what_a_whole_one_does(depth, monkeypatch, cma):
    fusion, given = cma.build(depth=depth), cma.inputs()
    short, whole = fusion.summaries(*given)[0], []
    asked = []
    real = TransformerBlock.forward

    def forward(block, x, mask, n_queries=None):
        asked.append(n_queries)
        whole.append(real(block, x, mask))
        return whole[-1]

    monkeypatch.setattr(TransformerBlock, "forward", forward)
    torch.testing.assert_close(fusion.summaries(*given)[0][:, :3], short, rtol=1e-12, atol=1e-12)
    assert asked == [None] * (depth - 1) + [3]


def test_relevance_decides_between_modalities(cma):
    """With w along one modality's class token, that one comes to count alone."""
    fusion, given = cma.build(), cma.inputs()
    summaries, _ = fusion.summaries(*given)
    with torch.no_grad():
        fusion.relevance.copy_(summaries[0, 2] * 1e4 / summaries[0, 2].norm())
    expected = (summaries[0] @ fusion.relevance).argmax()
    assert fusion.weights(*given)[0].round().argmax() == expected == 2
    torch.testing.assert_close(fusion(*given)[0], fusion.head(summaries[0, 2]))


def test_it_starts_as_the_mean_of_what_is_there(cma):
    """w is 0 at first, so that the start is that of the fusion without modality attention."""
    torch.manual_seed(0)
    fusion = CMAFusion(cma.SPECS, C, Linear, width=W, heads=HEADS).double().eval()
    assert not fusion.relevance.any()
    given = cma.inputs()
    here = torch.stack([given[1][m] for m in MODALITIES], dim=1).double()
    torch.testing.assert_close(fusion.weights(*given), here / here.sum(1, keepdim=True).clamp(min=1))
    plain = CMAFusion(cma.SPECS, C, Linear, width=W, heads=HEADS, ablate=(MODALITY_ATTENTION,)).double().eval()
    plain.load_state_dict({name: x for name, x in fusion.state_dict().items() if name != "relevance"})
    torch.testing.assert_close(plain(*given), fusion(*given), rtol=1e-12, atol=1e-12)


def test_without_modality_attention_it_is_the_plain_mean(cma):
    fusion, given = cma.build((MODALITY_ATTENTION,)), cma.inputs()
    assert "relevance" not in fusion.state_dict()
    summaries, here = fusion.summaries(*given)
    for row in range(B - 1):
        torch.testing.assert_close(fusion(*given)[row], fusion.head(summaries[row, here[row]].mean(0)))


def test_without_sequence_attention_no_tokens_are_read(cma):
    options = {"ablate": (SEQUENCE_ATTENTION,)}
    assert CMAFusion.views("image", options) == ("pooled",)
    assert CMAFusion.views("image", {"ablate": (MODALITY_ATTENTION,)}) == ("pooled", "tokens")
    assert CMAFusion.views("image", {}) == ("pooled", "tokens")
    fusion = cma.build((SEQUENCE_ATTENTION,))
    assert list(fusion.specs) == list(FusionModel(fusion).specs) == list(MODALITIES)
    assert sorted(FusionModel(fusion).standardize) == list(MODALITIES)
    assert not len(fusion.blocks)
    pooled = CMAFusion(
        specs_of({"image": 6, "text": 4}), C, Linear, width=W, heads=HEADS, **options
    )  # a store without tokens
    assert sorted(pooled.embed) == ["image", "text"]
    assert list(FusionModel(cma.build()).specs) == [
        "audio", "audio_tokens", "image", "image_tokens", "text", "text_tokens",
    ]  # fmt: skip


def test_without_either_it_is_arithmetic_by_hand():
    fusion = CMAFusion(
        specs_of({"image": 1, "text": 2}), 1, Linear, width=2, heads=1, ablate=(MODALITY_ATTENTION, SEQUENCE_ATTENTION)
    ).double()
    numbers = {
        "embed.image.weight": [[3.0], [1]], "embed.image.bias": [1.0, 1], "embed.text.weight": [[1.0, 0], [0, 2]],
        "embed.text.bias": [0.0, -1], "norm.weight": [2.0, 3], "norm.bias": [1.0, 0], "head.weight": [[10.0, 1]],
        "head.bias": [0.5],
    }  # fmt: skip
    fusion.load_state_dict({name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})
    features = {"image": torch.tensor([[2.0]] * 4), "text": torch.tensor([[1.0, 5]] * 4)}
    present = {"image": torch.tensor([True, True, False, False]), "text": torch.tensor([True, False, True, False])}
    # c_image = (7, 3): LN gives (1, -1), then (3, -3). c_text = (1, 9): LN gives (-1, 1), then (-1, 3).
    found = fusion({m: x.double() for m, x in features.items()}, present)
    expected = [10 * 1 + 0 + 0.5, 30 - 3 + 0.5, -10 + 3 + 0.5, 0.5]  # of the mean (1, 0), the image, the text, neither
    np.testing.assert_allclose(found.detach().numpy()[:, 0], expected, rtol=1e-4)


def test_its_options_are_keywords_with_their_defaults(cma):
    options = CMAFusion.options()
    assert options.keys() >= {"depth", "width", "heads", "dropout"}
    assert "ablate" not in options
    assert len(CMAFusion(cma.SPECS, C, Linear).blocks) == options["depth"]
    assert CMAFusion(cma.SPECS, C, Linear).head.in_features == options["width"]
    assert CMAFusion.parts == (MODALITY_ATTENTION, SEQUENCE_ATTENTION)
    fusion = CMAFusion(cma.SPECS, C, Linear, depth=3, width=10, heads=5)
    assert len(fusion.blocks) == 3
    assert {block.heads for block in fusion.blocks} == {5}
    assert fusion.head.in_features == fusion.relevance.numel() == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth 1 0 --ablate"),
        ({"depth": -1}, "depth 1 -1"),
        ({"width": 9}, "width 2 heads 9"),
        ({"heads": 0}, "width 0 heads 8"),
        ({"width": 0}, "width 1 0"),
        ({"width": -8}, "width 1 -8"),
        ({"width": -8, "ablate": (SEQUENCE_ATTENTION,)}, "width 1 -8"),
        ({"width": 0, "ablate": (SEQUENCE_ATTENTION,)}, "width 1 0"),
        ({"dropout": 1.0}, "dropout 0 1 1.0"),
        ({"dropout": -0.1}, "dropout 0 1 -0.1"),
        ({"dropout": 7.0}, "dropout 0 1 7.0"),
        ({"dropout": math.nan}, "dropout 0 1 nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message, cma):
    with pytest.raises(ConfigError, match=naming(message)):
        CMAFusion(cma.SPECS, C, Linear, **{"width": W, "heads": HEADS, **options})


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"image": 6, "text": 4, "text_tokens": (3, 7)}, "image_tokens"),
        ({"image_tokens": (5, 4)}, "fusion cma image image_tokens"),
        ({}, "fusion cma"),
    ],
)
def test_says_which_features_it_needs(widths, message):
    with pytest.raises(ConfigError, match=naming(message)):
        CMAFusion(specs_of(widths), C, Linear, width=W, heads=HEADS)
