"""Each pooling against a loop over samples and tokens, without padding; and what all must do."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.errors import ConfigError
from cachefuse.nn import POOLINGS
from cachefuse.nn.pooling import AttentionPool, MaxPool, MeanPool
from fixtures.messages import naming

LENGTHS = (9, 1, 0, 4, 7, 2)
B, T, D = len(LENGTHS), max(LENGTHS), 8

every = pytest.mark.parametrize("kind", sorted(POOLINGS))
counts = pytest.mark.parametrize("k", [1, 3, 4, 9, 12])


def build(kind, k, seed=0):
    torch.manual_seed(seed)
    return POOLINGS[kind](D, k).double()


def tokens(value=0.0, padding=0, seed=0):
    """Return tokens (B, T, D) of LENGTHS, their mask, and ``value`` wherever there is none."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.cat([x, x.new_zeros(B, padding, D)], dim=1)
    mask = torch.arange(T + padding) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask[..., None], x, value), mask


def spans(sample, k):
    """Yield the tokens (n_k, D) of each of k spans of one sample's real tokens (n, D)."""
    n = len(sample)
    for i in range(k):
        yield sample[math.floor(i * n / k) : math.ceil((i + 1) * n / k)]


@counts
@pytest.mark.parametrize(("kind", "reduce"), [(MeanPool, np.mean), (MaxPool, np.max)])
def test_spans_by_hand(kind, reduce, k):
    x, mask = tokens()
    found, here = kind(D, k)(x, mask)
    assert found.shape == (B, k, D)
    for row, n in enumerate(LENGTHS):
        expected = [reduce(span, axis=0) for span in spans(x[row, :n].numpy(), k)] if n else np.zeros((k, D))
        np.testing.assert_allclose(found[row], expected, rtol=1e-13)
        assert here[row].tolist() == [n > 0] * k


@pytest.mark.parametrize(
    ("kind", "adaptive"),
    [(MeanPool, torch.nn.functional.adaptive_avg_pool1d), (MaxPool, torch.nn.functional.adaptive_max_pool1d)],
)
@pytest.mark.parametrize("k", [1, 5, 14, 30])
def test_without_padding_spans_are_those_of_torch(kind, adaptive, k):
    x = torch.randn(2, 30, D)
    found, _ = kind(D, k)(x, torch.ones(2, 30, dtype=torch.bool))
    torch.testing.assert_close(found, adaptive(x.transpose(1, 2), k).transpose(1, 2))


@counts
def test_attention_by_hand(k):
    pool = build("attention", k)
    torch.nn.init.uniform_(pool.norm.weight, 0.5, 2)
    x, mask = tokens()
    found, here = pool(x, mask)
    query, gain, key = (p.detach().numpy() for p in (pool.query, pool.norm.weight, pool.key.weight))
    for row, n in enumerate(LENGTHS):
        assert here[row].tolist() == [n > 0] * k
        sample = x[row, :n].numpy()
        keys = (sample / np.sqrt((sample**2).mean(-1, keepdims=True) + 1e-6) * gain) @ key.T
        for i in range(k):
            expected = np.zeros(D)
            for h in range(4 if n else 0):
                part = slice(2 * h, 2 * h + 2)
                powers = np.exp(keys[:, part] @ query[i, part] / math.sqrt(2))
                expected[part] = (powers / powers.sum()) @ sample[:, part]
            np.testing.assert_allclose(found[row, i].detach(), expected, rtol=1e-12, atol=1e-14)


def test_attention_starts_between_the_mean_and_one_token():
    """At first each token counts, none for all, and no two of the pooled ones are alike, whatever the scale."""
    torch.manual_seed(0)
    pool = AttentionPool(64, 3)
    x, mask = torch.randn(5, 50, 64), torch.ones(5, 50, dtype=torch.bool)
    for scale in (1e-2, 1.0, 1e3):
        found, _ = pool(scale * x, mask)
        assert 1.05 / math.sqrt(50) < found.std() / scale < 0.5
        assert not torch.allclose(found[:, 0], found[:, 1], rtol=0.1)


@every
@counts
@pytest.mark.parametrize(("value", "padding"), [(torch.nan, 0), (torch.inf, 1), (-torch.inf, 2), (1e300, 40)])
def test_padding_changes_nothing(kind, k, value, padding):
    pool, outcomes = build(kind, k), []
    for x, mask in (tokens(), tokens(value, padding)):
        pool.zero_grad()
        x.requires_grad_()
        found, here = pool(x, mask)
        (found * torch.arange(k * D).view(k, D)).sum().backward()
        outcomes.append([found, here, x.grad[:, :T], *(p.grad for p in pool.parameters())])
        assert not x.grad[~mask].any()
    for clean, spoilt in zip(*outcomes, strict=True):
        assert clean.isfinite().all()
        torch.testing.assert_close(spoilt, clean, rtol=1e-12, atol=1e-12)


@every
def test_where_padding_lies_makes_no_difference(kind):
    pool = build(kind, 3)
    (x, mask), place = tokens(), torch.arange(0, 2 * T, 2)
    apart = torch.full((B, 2 * T, D), torch.nan, dtype=torch.float64).index_copy(1, place, x)
    mask_apart = torch.zeros(B, 2 * T, dtype=torch.bool).index_copy(1, place, mask)
    torch.testing.assert_close(pool(apart, mask_apart)[0], pool(x, mask)[0])


@every
def test_gradients_reach_every_parameter_and_sample(kind):
    pool = build(kind, 3)
    x, mask = tokens()
    x.requires_grad_()
    (pool(x, mask)[0] * torch.randn(3, D)).sum().backward()
    assert torch.equal(x.grad.flatten(1).any(1), mask.any(1))
    assert [name for name, p in pool.named_parameters() if not p.grad.any()] == []


@every
def test_the_gradient_is_that_of_the_formula(kind):
    pool = build(kind, 3)
    x, mask = tokens()
    x = x[:, :, :4].repeat(1, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, mask)[0], (x,), fast_mode=True)


@every
def test_keeps_the_dtype_and_a_batch_without_tokens_is_zeros(kind):
    pool = build(kind, 3).float()
    found, here = pool(torch.full((2, 1, D), torch.nan), torch.zeros(2, 1, dtype=torch.bool))
    assert found.dtype == torch.float32
    assert found.tolist() == [[[0] * D] * 3] * 2
    assert not here.any()


@every
def test_saves_and_loads(kind, tmp_path):
    saved, loaded = build(kind, 3), build(kind, 3, seed=1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(saved(*tokens())[0], loaded(*tokens())[0])


@every
def test_needs_at_least_one_token(kind):
    with pytest.raises(ConfigError, match=naming("pooling 1 0")):
        POOLINGS[kind](D, 0)


def test_heads_share_the_width():
    with pytest.raises(ConfigError, match=naming("width 4 heads 6")):
        AttentionPool(6, 2)
