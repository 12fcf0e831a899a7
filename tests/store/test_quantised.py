"""Tokens in int8: how far they are from what was encoded, and that the journal says so."""

import numpy as np
import pytest
import torch

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.store.features import JOURNAL
from cachefuse.store.format import read_lines
from cachefuse.store.rows import dequantise, quantise
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming

LARGEST, SMALLEST = 65504.0, 2.0**-24  # of float16


def run(dataset, store_path, **options):
    options = {"views": ("tokens",), "dtype": "int8", **options}
    return extract(dataset, ["toy"], store_path, device="cpu", **options)


def there_and_back(values):
    quantised, scales = quantise(values)
    assert (quantised.dtype, scales.dtype) == (np.int8, np.float16)
    return dequantise(torch.from_numpy(quantised), torch.from_numpy(scales)).numpy(), scales


ROWS = {
    "normal": lambda rng: rng.normal(size=(200, 33)),
    "huge": lambda rng: rng.uniform(-LARGEST, LARGEST, (200, 33)),
    "the largest": lambda rng: np.full((3, 5), LARGEST) * [[1], [-1], [0.99]],
    "tiny": lambda rng: rng.normal(size=(200, 33)) * 1e-6,
    "the smallest": lambda rng: np.full((2, 5), SMALLEST) * [[1], [-1]],
    "of every size": lambda rng: rng.normal(size=(200, 33)) * 10 ** rng.uniform(-7, 4, (200, 1)),
    "one large among small": lambda rng: np.where(np.arange(33) == 5, 1000, rng.normal(size=(200, 33))),
    "zero": lambda rng: np.zeros((3, 4)),
    "none": lambda rng: np.zeros((0, 4)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_value_comes_back_within_half_a_step(kind):
    values = ROWS[kind](np.random.default_rng(0)).astype("<f2")
    back, scales = there_and_back(values)
    assert np.isfinite(back).all()
    half = scales.astype(np.float64)[:, None] / 2
    rounding = np.maximum(np.abs(back.astype(np.float64)) * 2**-11, SMALLEST / 2)  # of the product to float16
    assert (np.abs(values.astype(np.float64) - back) <= half + rounding).all()
    # The step is no larger than 127 of them need, but for the rounding of the scale.
    most = np.abs(values.astype(np.float64)).max(1, initial=0)
    assert (scales <= most / 127 * (1 + 2**-9) + SMALLEST).all()


def test_rows_of_zeros_come_back_as_zeros():
    back, scales = there_and_back(np.array([[0, 0], [1, -1], [0, 0]], "<f2"))
    assert not back[[0, 2]].any()
    assert not scales[[0, 2]].any()
    assert back[1].any()


def test_the_sign_and_the_largest_value_are_kept():
    values = np.random.default_rng(0).normal(size=(200, 16)).astype("<f2")
    quantised, _ = quantise(values)
    assert (quantised * values.astype(np.float32) >= 0).all()
    assert (np.abs(quantised.astype(int)).max(1) == 127).all()


@pytest.fixture
def stores(shapes, tmp_path, toy):
    """The same tokens quantised and in float16."""
    toy.width = 33
    toy.change = lambda rows: np.sin(rows).astype(np.float32)
    texts = [("",) if row in (3, 5) else text for row, text in enumerate(texts_of(shapes))]  # two without any token
    dataset = with_columns(shapes, texts=texts)
    for name, dtype in (("quantised", "int8"), ("exact", "float16")):
        run(dataset, tmp_path / f"{name}.zarr", dtype=dtype, batch_size=16)
    return [FeatureStore(tmp_path / f"{name}.zarr") for name in ("quantised", "exact")]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_quantised_tokens_are_read_as_float16_near_the_exact_ones(stores, modality):
    quantised, exact = (store.open_features("toy", modality).rows("tokens") for store in stores)
    assert quantised.dtype == exact.dtype == torch.float16
    assert quantised.nbytes == exact.nbytes
    for row in range(80):
        values, wanted = quantised[row], exact[row]
        assert values.shape == wanted.shape
        step = np.abs(wanted.astype(np.float32)).max(-1, keepdims=True, initial=0) / 127
        assert (np.abs(values.astype(np.float32) - wanted) <= 0.51 * step + 2**-10).all()
        assert np.abs(values).max(initial=0) > 0.5 or not len(values)


def test_quantised_rows_are_the_same_however_they_are_read(stores):
    fixed, ragged = (stores[0].open_features("toy", modality).rows("tokens") for modality in ("image", "text"))
    index = torch.tensor([79, 3, 64, 64, 5])
    out = torch.empty(5, 3, 33, dtype=torch.float16)
    assert fixed.index_select(0, index, out=out) is out
    np.testing.assert_array_equal(out, fixed[:][index])
    np.testing.assert_array_equal(out, fixed[index.numpy()])
    padded, mask = ragged.padded(index)
    whole = ragged[:]
    for row, number in enumerate(index.tolist()):
        np.testing.assert_array_equal(padded[row][mask[row]], whole[number])
    assert mask.sum(1)[[1, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_journal_has_the_mean_and_least_cosine_of_each_block(stores, modality):
    quantised, exact = (store.open_features("toy", modality) for store in stores)
    lines = list(read_lines(quantised.path / JOURNAL))
    assert [line["block"] for line in lines] == [0, 1]
    for line, rows in zip(lines, (slice(0, 64), slice(64, 80)), strict=True):
        one, two = (
            np.concatenate([row.reshape(-1, 33) for row in features.read("tokens", rows)]).astype(np.float64)
            for features in (quantised, exact)
        )
        one, two = one[two.any(1)], two[two.any(1)]  # a row of zeros has no direction
        cosines = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
        # What is read has a rounding more than what the journal's cosine is from.
        np.testing.assert_allclose(line["cosine"], (cosines.mean(), cosines.min()), atol=1e-5)
        assert 0.99 < line["cosine"][1] < line["cosine"][0] < 0.999999


def test_pooled_features_beside_quantised_tokens_are_float16(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled", "tokens"))
    features = FeatureStore(store_path).open_features("toy", "text")
    assert {name: view.dtype for name, view in features.views.items()} == {"pooled": "float16", "tokens": "int8"}
    assert features.read().dtype == np.float16
    assert features.written("pooled", 0).cosine is None


def test_quantised_tokens_stand_beside_pooled_features_that_were_there(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled",), dtype="float16")
    report = run(shapes, store_path)
    assert report.computed == {("toy", "image"): 80, ("toy", "text"): 80}
    assert not any(run(shapes, store_path, views=("pooled", "tokens")).computed.values())


@pytest.mark.parametrize(("first", "second"), [("int8", "float16"), ("float16", "int8")])
def test_tokens_of_another_dtype_are_refused(shapes, store_path, toy, first, second):
    run(shapes, store_path, dtype=first)
    with pytest.raises(CacheError, match=naming(f"dtype tokens {first} {second} --workspace")):
        run(shapes, store_path, dtype=second)


def test_a_damaged_scale_is_detected(shapes, store_path, toy):
    run(shapes, store_path)
    features = FeatureStore(store_path).open_features("toy", "image")
    shard = features.path / "scales" / "c" / "1" / "0"
    with shard.open("r+b") as file:
        file.write(b"\x07")
    rows = features.rows("tokens")
    with pytest.raises(CacheError, match=naming("block 1")):
        rows[70]
    assert rows[3].any()
