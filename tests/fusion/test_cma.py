"""CMA-CLIP against the paper's arithmetic, sample by sample without padding, in float64 NumPy; and its ablations."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from cachefuse.cache.tokens import SequenceWidth
from cachefuse.errors import ConfigError
from cachefuse.fusion.base import feature_name
from cachefuse.fusion.cma import MODALITY_ATTENTION, SEQUENCE_ATTENTION, CMAFusion
from cachefuse.fusion.model import FusionModel
from cachefuse.fusion.transformer import TransformerBlock
from cachefuse.heads import MLP, Linear

WIDTHS = {
    "text_tokens": SequenceWidth(3, 7), "text": 4, "image": 6, "audio_tokens": SequenceWidth(2, 3),
    "image_tokens": SequenceWidth(5, 4), "audio": 3,
}  # fmt: skip
MODALITIES = ("audio", "image", "text")
B, C, W, HEADS = 10, 3, 8, 2
NONE = 9  # the row that has no modality
ABLATIONS = [
    without
    for n in range(3)
    for without in itertools.combinations((MODALITY_ATTENTION, SEQUENCE_ATTENTION), n)
]  # fmt: skip
every_ablation = pytest.mark.parametrize("without", ABLATIONS, ids=lambda parts: "-".join(parts) or "whole")


def build(without=(), modalities=MODALITIES, depth=2, dtype=torch.float64, **options):
    """A fusion as after some training: its relevance is no longer 0, nor any bias, nor a norm the identity."""
    torch.manual_seed(0)
    widths = {name: width for name, width in WIDTHS.items() if name.partition("_")[0] in modalities}
    fusion = CMAFusion(widths, C, Linear, width=W, heads=HEADS, depth=depth, without=without, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return fusion.to(dtype).eval()


def inputs(dtype=torch.float64, filler=0.0):
    """Ten rows, in which modalities are absent in every combination; texts have 0 to 7 tokens, images all 4.

    What is absent, and padding, holds ``filler``.
    """
    generator = torch.Generator().manual_seed(0)
    here = {
        "audio": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, 1, 0]).bool(),
        "image": torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 0]).bool(),
        "text": torch.tensor([1, 0, 1, 0, 1, 0, 1, 1, 1, 0]).bool(),
    }
    lengths = {"audio": [3, 1, 2, 3, 3, 3, 1, 1, 0, 3], "image": [4] * B, "text": [7, 5, 1, 2, 3, 6, 4, 0, 0, 7]}
    features, present = {}, {}
    for modality in MODALITIES:
        tokens = feature_name(modality, "tokens")
        features[modality] = torch.randn(B, WIDTHS[modality], generator=generator, dtype=dtype)
        present[modality] = here[modality]
        n, width = WIDTHS[tokens].n_tokens, WIDTHS[tokens]
        features[tokens] = torch.randn(B, n, width, generator=generator, dtype=dtype)
        present[tokens] = (torch.arange(n) < torch.tensor(lengths[modality])[:, None]) & here[modality][:, None]
    features = {name: torch.where(present[name].unsqueeze(-1), x, filler) for name, x in features.items()}
    return features, present


def of(fusion, features, present):
    """The inputs that a fusion reads."""
    return {name: features[name] for name in fusion.widths}, {name: present[name] for name in fusion.widths}


class Reference:
    """The paper's section 2 for one sample at a time: what is absent or padding is not there at all."""

    def __init__(self, fusion, without, depth):
        self.w = {name: x.numpy() for name, x in fusion.state_dict().items()}
        self.without, self.depth = without, depth

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
        if SEQUENCE_ATTENTION not in self.without:
            x += [self.linear(f"embed.{m}_tokens", token) for m in names for token in sample[m][1]]
        x = np.stack(x)
        for i in range(0 if SEQUENCE_ATTENTION in self.without else self.depth):
            x = x + self.attention(f"blocks.{i}", self.norm(f"blocks.{i}.norm1", x))
            x = x + self.mlp(f"blocks.{i}", self.norm(f"blocks.{i}.norm2", x))
        return {m: self.norm("norm", x[i]) for i, m in enumerate(names)}

    def weights(self, summaries):
        if MODALITY_ATTENTION in self.without:
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


@every_ablation
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("modalities", [("text",), ("image", "text"), MODALITIES], ids=len)
def test_logits_and_weights_are_the_papers(modalities, depth, without):
    fusion = build(without, modalities, depth)
    features, present = inputs()
    reference = Reference(fusion, without, depth)
    logits = fusion(*of(fusion, features, present)).detach().numpy()
    weights = fusion.weights(*of(fusion, features, present)).detach().numpy()
    for row, sample in enumerate(samples(features, present, modalities)):
        np.testing.assert_allclose(logits[row], reference.logits(sample), rtol=1e-9, atol=1e-9)
        expected = reference.weights(reference.summaries(sample)) if sample else {}
        np.testing.assert_allclose(weights[row], [expected.get(m, 0) for m in sorted(modalities)], atol=1e-12)


@pytest.mark.parametrize("filler", [0.0, torch.nan])
def test_pooled_tokens_join_in_place_of_their_own(filler):
    fusion = build(pool="image=mean:1,text=max:1")
    reduce = {"image": lambda x: x.mean(0), "text": lambda x: x.max(0), "audio": lambda x: x}
    reference, features, present = Reference(fusion, (), 2), *inputs()
    found = fusion(*inputs(filler=filler))
    for row, sample in enumerate(samples(features, present)):
        pooled = {m: (c, reduce[m](x).reshape(-1, x.shape[1]) if len(x) else x) for m, (c, x) in sample.items()}
        np.testing.assert_allclose(found[row].detach().numpy(), reference.logits(pooled), rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in fusion.parameters())


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_maps_class_tokens_alone_to_what_a_whole_one_does(depth, monkeypatch):
    fusion, given = build(depth=depth), inputs()
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


def test_where_nothing_is_masked_no_mask_is_needed():
    """The path without a mask, of rows that have everything, is that with one."""
    fusion = build(modalities=("image",))
    features, present = inputs()
    rows = torch.tensor([0, 1, 4])
    assert present["image_tokens"][rows].all()
    few = [{name: x[rows] for name, x in part.items()} for part in of(fusion, features, present)]
    torch.testing.assert_close(fusion(*few), fusion(*of(fusion, features, present))[rows], rtol=1e-12, atol=1e-12)


@every_ablation
def test_lambda_adds_up_to_1_over_what_is_there(without):
    fusion = build(without)
    features, present = inputs(filler=torch.nan)
    weights = fusion.weights(*of(fusion, features, present))
    here = torch.stack([present[m] for m in MODALITIES], dim=1)
    assert weights.shape == (B, 3)
    assert not weights[~here].any()
    assert (weights[here] > 0).all()
    torch.testing.assert_close(weights.sum(1), here.any(1).double())
    assert (weights[here.sum(1) == 1].max(1).values == 1).all()


def test_relevance_decides_between_modalities():
    """With w along one modality's class token, that one comes to count alone."""
    fusion, given = build(), inputs()
    summaries, _ = fusion.summaries(*given)
    with torch.no_grad():
        fusion.relevance.copy_(summaries[0, 2] * 1e4 / summaries[0, 2].norm())
    expected = (summaries[0] @ fusion.relevance).argmax()
    assert fusion.weights(*given)[0].round().argmax() == expected == 2
    torch.testing.assert_close(fusion(*given)[0], fusion.head(summaries[0, 2]))


def test_it_starts_as_the_mean_of_what_is_there():
    """w is 0 at first, so that the start is that of the fusion without modality attention."""
    torch.manual_seed(0)
    fusion = CMAFusion(WIDTHS, C, Linear, width=W, heads=HEADS).double().eval()
    assert not fusion.relevance.any()
    given = inputs()
    here = torch.stack([given[1][m] for m in MODALITIES], dim=1).double()
    torch.testing.assert_close(fusion.weights(*given), here / here.sum(1, keepdim=True).clamp(min=1))
    plain = CMAFusion(WIDTHS, C, Linear, width=W, heads=HEADS, without=(MODALITY_ATTENTION,)).double().eval()
    plain.load_state_dict({name: x for name, x in fusion.state_dict().items() if name != "relevance"})
    torch.testing.assert_close(plain(*given), fusion(*given), rtol=1e-12, atol=1e-12)


def test_without_modality_attention_it_is_the_plain_mean():
    fusion, given = build((MODALITY_ATTENTION,)), inputs()
    assert "relevance" not in fusion.state_dict()
    summaries, here = fusion.summaries(*given)
    for row in range(B - 1):
        torch.testing.assert_close(fusion(*given)[row], fusion.head(summaries[row, here[row]].mean(0)))


def test_without_sequence_attention_no_tokens_are_read():
    options = {"without": (SEQUENCE_ATTENTION,)}
    assert CMAFusion.views("image", options) == ("pooled",)
    assert CMAFusion.views("image", {"without": (MODALITY_ATTENTION,)}) == ("pooled", "tokens")
    assert CMAFusion.views("image", {}) == ("pooled", "tokens")
    fusion = build((SEQUENCE_ATTENTION,))
    assert list(fusion.widths) == list(FusionModel(fusion).widths) == list(MODALITIES)
    assert sorted(FusionModel(fusion).standardize) == list(MODALITIES)
    assert not len(fusion.blocks)
    pooled = CMAFusion({"image": 6, "text": 4}, C, Linear, width=W, heads=HEADS, **options)  # a store without tokens
    assert sorted(pooled.embed) == ["image", "text"]
    assert list(FusionModel(build()).widths) == [
        "audio", "audio_tokens", "image", "image_tokens", "text", "text_tokens",
    ]  # fmt: skip


def test_without_either_it_is_arithmetic_by_hand():
    fusion = CMAFusion(
        {"image": 1, "text": 2}, 1, Linear, width=2, heads=1, without=(MODALITY_ATTENTION, SEQUENCE_ATTENTION)
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


@every_ablation
@pytest.mark.parametrize("head", [Linear, partial(MLP, layers=(6,), dropout=0.2)], ids=["linear", "mlp"])
def test_gradients_reach_every_parameter(without, head):
    torch.manual_seed(0)
    fusion = CMAFusion(WIDTHS, C, head, width=W, heads=HEADS, without=without)  # from its own start, in training
    fusion(*of(fusion, *inputs(torch.float32))).square().sum().backward()
    assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_of_the_whole_reach_each_part_of_queries_keys_and_values():
    fusion = build(depth=2)
    fusion(*inputs()).square().sum().backward()
    for block in fusion.blocks:
        assert all(part.any() for part in block.qkv.weight.grad.split(W))


@every_ablation
@pytest.mark.parametrize("filler", [0.0, torch.inf, torch.nan])
def test_a_row_of_nothing_is_finite_in_value_and_gradient(without, filler):
    fusion = build(without, dtype=torch.float32)
    features, present = inputs(torch.float32, filler)
    outcomes = []
    for rows in (slice(None), slice(NONE, None)):  # with others, and a batch of it alone
        x = {name: x[rows].clone().requires_grad_() for name, x in features.items() if name in fusion.widths}
        fusion.zero_grad()
        logits = fusion(x, {name: here[rows] for name, here in present.items()})
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in fusion.parameters() if p.grad is not None)
        assert all(part.grad.isfinite().all() and not part.grad[-1].any() for part in x.values())
        outcomes.append(logits[-1])
    torch.testing.assert_close(outcomes[0], fusion.head.bias)  # it is told nothing: what the head says of zeros
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_every_row_has_something_to_attend_to(monkeypatch):
    """What a softmax over nothing comes to, 0 or NaN, depends on torch's version and the device."""
    fusion, masks = build(), []
    real = TransformerBlock.forward
    monkeypatch.setattr(
        TransformerBlock, "forward", lambda block, x, mask, n=None: masks.append(mask) or real(block, x, mask, n)
    )
    features, present = inputs()
    fusion(features, present)
    assert len(masks) == 2
    for mask in masks:
        assert mask.any(1).all()
        assert mask.sum(1).tolist() == [
            max(1, sum(int(here[row].sum()) for here in present.values())) for row in range(B)
        ]


@every_ablation
def test_what_is_absent_has_no_influence(without):
    fusion = build(without)
    outcomes = []
    for filler in (0.0, 1e6, torch.nan):
        fusion.zero_grad()
        logits = fusion(*of(fusion, *inputs(filler=filler)))
        logits.square().sum().backward()
        outcomes.append([logits, *(p.grad.clone() for p in fusion.parameters())])
    for others in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcomes[0], others, strict=True))


def test_masks_are_left_as_they_were():
    """The row of nothing is given a token to attend to, but not in the caller's presence."""
    fusion, (features, present) = build(), inputs()
    before = {name: x.clone() for name, x in present.items()}
    fusion(features, present)
    fusion.weights(features, present)
    assert all(torch.equal(x, before[name]) for name, x in present.items())


@pytest.mark.parametrize("depth", [1, 2])
def test_every_token_counts_and_every_modality_sees_the_others(depth):
    fusion = build(depth=depth)
    features, present = inputs()
    tokens = features["text_tokens"].clone().requires_grad_()
    pooled = features["image"].clone().requires_grad_()
    summaries, _ = fusion.summaries({**features, "text_tokens": tokens, "image": pooled}, present)
    (of_tokens,) = torch.autograd.grad(summaries[0, 1].sum(), tokens, retain_graph=True)  # the image's class token
    assert of_tokens[0].any(1).all()
    assert not of_tokens[1:].any()
    (of_image,) = torch.autograd.grad(summaries[0, 2].sum(), pooled)  # the text's
    assert of_image[0].any()


def test_the_order_of_features_does_not_matter():
    torch.manual_seed(0)
    one = CMAFusion(WIDTHS, C, Linear, width=W, heads=HEADS)
    torch.manual_seed(0)
    two = CMAFusion(dict(reversed(WIDTHS.items())), C, Linear, width=W, heads=HEADS)
    assert list(one.state_dict()) == list(two.state_dict())
    features, present = inputs(torch.float32)
    backwards = dict(reversed(features.items())), dict(reversed(present.items()))
    assert torch.equal(one.eval()(features, present), two.eval()(*backwards))


def test_dropout_acts_in_training_only():
    fusion, given = build(dropout=0.5), inputs()
    assert torch.equal(fusion(*given), fusion(*given))
    fusion.train()
    assert not torch.equal(fusion(*given), fusion(*given))
    assert {m.p for m in fusion.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_its_options_are_keywords_with_their_defaults():
    options = CMAFusion.options()
    assert options.keys() >= {"depth", "width", "heads", "dropout"}
    assert "without" not in options
    assert len(CMAFusion(WIDTHS, C, Linear).blocks) == options["depth"]
    assert CMAFusion(WIDTHS, C, Linear).head.in_features == options["width"]
    assert CMAFusion.parts == (MODALITY_ATTENTION, SEQUENCE_ATTENTION)
    fusion = CMAFusion(WIDTHS, C, Linear, depth=3, width=10, heads=5)
    assert len(fusion.blocks) == 3
    assert {block.heads for block in fusion.blocks} == {5}
    assert fusion.head.in_features == fusion.relevance.numel() == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"depth must be at least 1\. Got 0; --without sequence-attention has no blocks"),
        ({"depth": -1}, r"depth must be at least 1\. Got -1"),
        ({"width": 9}, r"width must be a multiple of 2, the attention heads\. Got 9 instead"),
        ({"heads": 0}, r"width must be a multiple of 0, the attention heads\. Got 8 instead"),
        ({"width": 0}, r"width must be at least 1\. Got 0 instead"),
        ({"width": -8}, r"width must be at least 1\. Got -8 instead"),
        ({"width": -8, "without": (SEQUENCE_ATTENTION,)}, r"width must be at least 1\. Got -8 instead"),
        ({"width": 0, "without": (SEQUENCE_ATTENTION,)}, r"width must be at least 1\. Got 0 instead"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1\. Got 1\.0 instead"),
        ({"dropout": -0.1}, r"dropout must be at least 0 and below 1\. Got -0\.1 instead"),
        ({"dropout": 7.0}, r"dropout must be at least 0 and below 1\. Got 7\.0 instead"),
        ({"dropout": math.nan}, r"dropout must be at least 0 and below 1\. Got nan instead"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CMAFusion(WIDTHS, C, Linear, **{"width": W, "heads": HEADS, **options})


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"image": 6, "text": 4, "text_tokens": SequenceWidth(3, 7)}, "needs image_tokens features; this store has: "),
        ({"image_tokens": SequenceWidth(5, 4)}, "fusion 'cma' needs image features; this store has: image_tokens"),
        ({}, "fusion 'cma' needs some features; this store has: none"),
    ],
)
def test_says_which_features_it_needs(widths, message):
    with pytest.raises(ConfigError, match=message):
        CMAFusion(widths, C, Linear, width=W, heads=HEADS)
