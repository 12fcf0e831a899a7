"""Mid fusion against a loop over samples, without padding, in float64, in every case."""

import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.nn.heads import MLP
from fixtures.midfusion import CASES, DEPTH, LENGTHS, NOWHERE, B, C, build, inputs

every = pytest.mark.parametrize("case", CASES)


class Reference:
    """One sample at a time, one token, one head, one layer after the other, by the formulas of the papers."""

    def __init__(self, fusion, spec, pool, depth, decoder_layers, text="text_ids"):
        self.w = {name: p.detach().numpy() for name, p in fusion.named_parameters()}
        self.spec, self.pool, self.depth, self.decoder_layers = spec, pool, depth, decoder_layers
        self.names = {"text": text, "image": "image_tokens", "audio": "audio_tokens"}
        self.order = [m for layer in sorted(spec) for m in sorted(spec[layer])]
        self.heads = self.w["encoder.bias.table.weight"].shape[1]

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean() + 1e-6) * self.w[name]

    def bucket(self, distance):
        """Mesh TensorFlow's buckets, two times 16: 8 for the distances 0 to 7, 8 for those up to 128."""
        side, distance = (16 if distance > 0 else 0), abs(distance)
        if distance < 8:
            return side + distance
        return side + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))

    def attend(self, queries, keys, values, bias):
        """Return for each query (inner,) the values' sum, head by head; bias is (query, key) -> (H,)."""
        out = []
        for i, query in enumerate(queries):
            parts = []
            for h, q in enumerate(np.split(query, self.heads)):
                scores = [q @ np.split(key, self.heads)[h] + bias(i, j)[h] for j, key in enumerate(keys)]
                weights = np.exp(np.array(scores) - max(scores, default=0))
                weights = weights / weights.sum()
                parts.append(sum(w * np.split(v, self.heads)[h] for w, v in zip(weights, values, strict=True)))
            out.append(np.concatenate(parts))
        return out

    def feed_forward(self, x, at):
        hidden = np.maximum(self.w[f"{at}.feed_forward.wi.weight"] @ self.norm(x, f"{at}.feed_forward_norm.weight"), 0)
        return x + self.w[f"{at}.feed_forward.wo.weight"] @ hidden

    def linear(self, name, xs):
        return [self.w[f"{name}.weight"] @ x for x in xs]

    def tokens(self, m, x):
        """Return a modality's tokens, each (W,) with its modality and position."""
        if m == "text" and x.ndim == 1:
            x = self.w["enter.text.weight"][x]
        else:
            x = x @ self.w[f"enter.{m}.weight"].T + self.w[f"enter.{m}.bias"]
        kind, k = self.pool.get(m, (None, 0))
        n = len(x)
        if n and kind in ("mean", "max"):
            spans = [x[i * n // k : math.ceil((i + 1) * n / k)] for i in range(k)]
            x = np.stack([span.mean(0) if kind == "mean" else span.max(0) for span in spans])
        if n and kind == "attention":
            x = np.stack([self.attention_pool(m, i, x) for i in range(k)])
        return [(token, m, place) for place, token in enumerate(x)]

    def attention_pool(self, m, i, x):
        keys = self.linear(f"pool.{m}.key", [self.norm(token, f"pool.{m}.norm.weight") for token in x])
        out = []
        for h, q in enumerate(np.split(self.w[f"pool.{m}.query"][i], 4)):
            powers = np.exp([q @ np.split(key, 4)[h] / math.sqrt(len(q)) for key in keys])
            out.append(powers / powers.sum() @ np.split(x, 4, axis=1)[h])
        return np.concatenate(out)

    def encode(self, sample):
        sequence = []
        for layer in range(self.depth + 1):
            for m in sorted(self.spec.get(layer, ())):
                sequence += self.tokens(m, sample[self.names[m]])
            if layer < self.depth and sequence:
                sequence = self.layer(f"encoder.layers.{layer}", sequence)
        return [self.norm(x, "encoder.norm.weight") for x, *_ in sequence]

    def layer(self, at, sequence):
        normed = [self.norm(x, f"{at}.attention_norm.weight") for x, *_ in sequence]
        q, k, v = (self.linear(f"{at}.attention.{part}", normed) for part in "qkv")

        def bias(i, j):
            (_, m, place), (_, other, other_place) = sequence[i], sequence[j]
            if m == other:
                return self.w["encoder.bias.table.weight"][self.bucket(other_place - place)]
            return self.w["between"][self.order.index(m), self.order.index(other)]

        attended = self.linear(f"{at}.attention.o", self.attend(q, k, v, bias))
        xs = [x + more for (x, *_), more in zip(sequence, attended, strict=True)]
        return [(self.feed_forward(x, at), m, place) for x, (_, m, place) in zip(xs, sequence, strict=True)]

    def decode(self, memory):
        x = self.w["decoder.start"]
        for layer in range(self.decoder_layers):
            at = f"decoder.steps.layers.{layer}"
            (v,) = self.linear(f"{at}.attention.v", [self.norm(x, f"{at}.attention_norm.weight")])
            x = x + self.w[f"{at}.attention.o.weight"] @ v
            if memory:
                q = self.linear(f"{at}.cross_attention.q", [self.norm(x, f"{at}.cross_attention_norm.weight")])
                k, v = (self.linear(f"{at}.cross_attention.{part}", memory) for part in "kv")
                (read,) = self.attend(q, k, v, lambda i, j: np.zeros(self.heads))
                x = x + self.w[f"{at}.cross_attention.o.weight"] @ read
            x = self.feed_forward(x, at)
        return self.norm(x, "decoder.steps.norm.weight")

    def __call__(self, features, present):
        logits = []
        for row in range(B):
            sample = {name: features[name][row][present[name][row]].numpy() for name in LENGTHS}
            encoded = self.encode(sample)
            if self.decoder_layers:
                pooled = self.decode(encoded)
            else:
                pooled = np.mean(encoded, axis=0) if encoded else np.zeros_like(self.w["encoder.norm.weight"])
            logits.append(self.w["head.weight"] @ pooled + self.w["head.bias"])
        return np.stack(logits)


SPECS = {  # what the cases' texts and defaults stand for
    "default": {0: ["text"], 2: ["audio", "image"]},
    "one sequence": {0: ["audio", "image", "text"]},
    "each at its own layer": {0: ["text"], 1: ["image"], 3: ["audio"]},
    "image first": {0: ["image"], 2: ["audio", "text"]},
    "after the last layer": {0: ["text"], 4: ["audio", "image"]},
    "one modality": {0: ["image"]},
    "one layer, one meeting": {0: ["text"], 1: ["image"]},
    "pooled": {0: ["text"], 2: ["audio", "image"]},
    "pooled to few": {0: ["text"], 4: ["image"]},
    "decoder": {0: ["text"], 2: ["audio", "image"]},
    "decoder, pooled, late": {0: ["text"], 4: ["image"]},
    "frozen text": {0: ["text"], 2: ["audio", "image"]},
}
POOLS = {
    "pooled": {"image": ("attention", 2), "text": ("mean", 3), "audio": ("max", 4)},
    "pooled to few": {"image": ("mean", 1), "text": ("max", 2)},
    "decoder, pooled, late": {"image": ("attention", 2)},
}


@every
def test_against_a_loop(case):
    fusion, (features, present) = build(case).double(), inputs()
    options: dict[str, Any] = CASES[case]
    reference = Reference(
        fusion,
        SPECS[case],
        POOLS.get(case, {}),
        options.get("depth", DEPTH),
        options.get("decoder_layers", 0),
        f"text_{options.get('text_view', 'ids')}",
    )
    found = fusion(features, present).detach().numpy()
    np.testing.assert_allclose(found, reference(features, present), rtol=0, atol=1e-12)
    joined = {name for group in SPECS[case].values() for name in map(reference.names.get, group)}
    assert list(fusion.specs) == sorted(joined)


@every
@pytest.mark.parametrize(("padding", "value"), [(0, torch.nan), (3, -torch.inf), (150, torch.nan)])
@pytest.mark.one_in(3)
def test_padding_changes_nothing(case, padding, value):
    fusion, outcomes = build(case).double(), []
    for features, present in (inputs(), inputs(padding, value)):
        fusion.zero_grad()
        logits = fusion(features, present)
        logits.square().sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in fusion.parameters())])
    for clean, spoilt in zip(*outcomes, strict=True):
        torch.testing.assert_close(spoilt, clean, rtol=1e-9, atol=1e-9)


@every
def test_rows_do_not_influence_one_another(case):
    fusion = build(case).double()
    whole = fusion(*inputs())
    for rows in (slice(2, 5), slice(6, 7), [0, 6, 3]):
        torch.testing.assert_close(fusion(*inputs(rows=rows)), whole[rows])


@every
def test_a_sample_without_anything_is_finite(case):
    fusion = build(case).float()
    features, present = inputs(rows=[NOWHERE, NOWHERE], value=torch.nan, dtype=torch.float32)
    logits = fusion(features, present)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("decoder_layers", [0, 6])
@pytest.mark.parametrize("rows", [[NOWHERE], [NOWHERE, 0]])
def test_not_even_one_token_through_many_layers(rows, decoder_layers):
    fusion = build("one modality", pool="image=mean:1", depth=24, decoder_layers=decoder_layers)
    features, present = inputs(rows=rows, value=torch.nan, dtype=torch.float32)
    fusion(features, present).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@every
def test_gradients_reach_every_parameter(case):
    fusion = build(case, head=partial(MLP, layers=(8,)))
    (fusion(*inputs(dtype=torch.float32)) * torch.arange(C)).sum().backward()
    assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_token_alone_attends_to_itself_whatever_queries_and_keys_are():
    """Where there is nothing to choose from, these have no effect: in all layers before another modality joins."""
    fusion = build(pool="text=mean:1", fusion_spec="0:text,2:image")
    fusion(*inputs(dtype=torch.float32)).square().sum().backward()
    idle = {name for name, p in fusion.named_parameters() if not p.grad.any()}
    assert idle == {f"encoder.layers.{layer}.attention.{part}.weight" for layer in (0, 1) for part in "qk"}


def test_gradients_reach_each_ordered_pair_of_modalities():
    fusion = build("each at its own layer")
    fusion(*inputs(dtype=torch.float32)).square().sum().backward()
    reached = fusion.between.grad.any(-1)
    assert torch.equal(reached, ~torch.eye(3, dtype=torch.bool))


@every
def test_saves_and_loads(case, tmp_path):
    saved, loaded = build(case), build(case, seed=1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    features, present = inputs(dtype=torch.float32)
    assert torch.equal(saved(features, present), loaded(features, present))
    assert not torch.equal(build(case, seed=1)(features, present), loaded(features, present))


@every
def test_options_are_what_json_can_hold(case):
    """As a run keeps them: keys of mappings come back as text."""
    features, present = inputs(dtype=torch.float32)
    options = json.loads(json.dumps(CASES[case]))
    assert torch.equal(build(case)(features, present), build(case, **options)(features, present))


def test_dropout_is_drawn_by_the_seed_and_off_in_evaluation():
    fusion, given = build("decoder", dropout=0.5), inputs(dtype=torch.float32)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(fusion(*given))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(fusion.eval()(*given), build("decoder")(*given))
