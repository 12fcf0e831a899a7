import os

import numpy as np
import pytest
import zarr

from cachefuse.encoders import open_encoder
from cachefuse.extraction.extract import extract
from cachefuse.extraction.pipeline import prepare_source
from cachefuse.store.format import BLOCK_BYTES, MAX_BLOCK_ROWS, block_rows, differing_fields, provenance_key
from cachefuse.store.shard import chunk_rows
from cachefuse.store.store import FeatureStore
from fixtures.columns import images_of, texts_of


@pytest.mark.parametrize("n_rows", [1, 80, 5_000, 10**7])
@pytest.mark.parametrize("row_bytes", [0, 2, 1024, 77 * 768 * 2, 577 * 1024 * 4, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_a_block_is_a_power_of_two_rows_and_bounded(n_rows, row_bytes):
    rows = block_rows(n_rows, row_bytes)
    assert rows & (rows - 1) == 0
    assert 1 <= rows <= MAX_BLOCK_ROWS
    assert rows == 1 or rows * row_bytes <= BLOCK_BYTES
    assert rows % chunk_rows(rows) == 0


def test_a_small_dataset_has_small_blocks():
    assert block_rows(80, 1024) == 64
    assert block_rows(25_000, 1024) == 1024
    assert block_rows(10**7, 1024) == 4096


def test_the_key_is_that_of_the_values_not_of_their_order():
    assert provenance_key({"a": "1", "b": "2"}) == provenance_key({"b": "2", "a": "1"})
    assert provenance_key({"a": "1"}) != provenance_key({"a": "2"})
    assert differing_fields({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == ["b", "c", "d"]


def encode_directly(dataset, tower, view="pooled"):
    sources = images_of(dataset) if tower.modality == "image" else [texts[0] for texts in texts_of(dataset)]
    return [tower.encode([prepare_source(tower, source)], (view,))[view][0] for source in sources]


@pytest.mark.parametrize(("name", "dtype"), [("float16", "<f2"), ("float32", "<f4")])
def test_any_zarr_reader_opens_a_store(shapes, store_path, name, dtype):
    extract(shapes, ["classic"], store_path, device="cpu", dtype=name, batch_size=16)
    root = zarr.open_group(store_path, mode="r")
    samples = root["samples"]
    assert samples["id"][:].tolist() == shapes.ids
    assert samples["split"][:].tolist() == shapes.splits.tolist()
    assert samples["digest"][:].tolist() == shapes.digests()
    np.testing.assert_array_equal(samples["target"][:], shapes.targets)
    assert "items" not in samples
    for modality, tower in open_encoder("classic").items():
        array = root[f"features/classic/{modality}/pooled"]
        assert array.dtype == np.dtype(dtype)
        assert array.shape == (80, tower.width)
        assert array.shards == (64, tower.width)
        assert array.chunks == (4, tower.width)
        assert array.compressors == ()
        assert samples[f"present/{modality}"][:].all()
        np.testing.assert_array_equal(array[:], np.array(encode_directly(shapes, tower)).astype(dtype))


def test_a_block_is_one_run_of_rows_in_a_file(shapes, store_path):
    extract(shapes, ["classic"], store_path, device="cpu")
    features = FeatureStore(store_path).open_features("classic", "text")
    shard = features.path / "pooled" / "c" / "0" / "0"
    rows = features.read()[:64]
    assert shard.read_bytes()[: rows.nbytes] == rows.tobytes()


def test_rows_of_zeros_are_written_like_any_other(shapes, store_path, toy):
    toy.change = np.zeros_like
    extract(shapes, ["toy"], store_path, views=("pooled", "tokens"), device="cpu")
    features = FeatureStore(store_path).open_features("toy", "image")
    for view, shape in (("pooled", (4,)), ("tokens", (3, 4))):
        shard = features.path.joinpath(view, "c", "0", *("0" for _ in shape))
        assert shard.stat().st_size > 64 * np.prod(shape) * 2
        assert not features.read(view).any()


def test_rows_are_aligned_across_encoders_and_modalities(shapes, store_path, toy):
    report = extract(shapes, ["toy", "classic"], store_path, device="cpu", batch_size=7)
    assert report.rows == {(e, m): 80 for e in ("toy", "classic") for m in ("image", "text")}
    store = FeatureStore(store_path)
    for encoder in ("toy", "classic"):
        for modality, tower in open_encoder(encoder).items():
            stored = store.open_features(encoder, modality).read()
            np.testing.assert_array_equal(stored, np.array(encode_directly(shapes, tower)).astype("<f2"))
    assert [(f.encoder, f.modality) for f in store.features()] == [
        ("classic", "image"), ("classic", "text"), ("toy", "image"), ("toy", "text"),
    ]  # fmt: skip


def test_ragged_tokens_come_back_as_they_were_without_padding(shapes, store_path, toy):
    extract(shapes, ["toy"], store_path, views=("tokens",), device="cpu", batch_size=8)
    features = FeatureStore(store_path).open_features("toy", "text")
    expected = encode_directly(shapes, open_encoder("toy")["text"], "tokens")
    assert len({len(rows) for rows in expected}) > 3
    for rows in (None, slice(60, 70), np.array([79, 0, 0, 65])):
        stored = features.read("tokens", rows)
        wanted = np.arange(80) if rows is None else np.arange(80)[rows]
        assert len(stored) == len(wanted)
        for values, row in zip(stored, wanted, strict=True):
            np.testing.assert_array_equal(values, expected[row])
    group = zarr.open_group(features.path, mode="r")
    offsets = group["offsets"][:]
    assert offsets.dtype == np.dtype("<i8")
    flat = np.concatenate([group[f"tokens/block-{block:06d}"][:] for block in range(2)])
    np.testing.assert_array_equal(flat, np.concatenate(expected).astype("<f2"))
    np.testing.assert_array_equal(np.diff(offsets[0]), [len(rows) for rows in expected[:64]])


def test_fixed_tokens_are_one_array(shapes, store_path, toy):
    extract(shapes, ["toy"], store_path, views=("tokens",), device="cpu")
    tokens = FeatureStore(store_path).open_features("toy", "image").read("tokens")
    np.testing.assert_array_equal(tokens, encode_directly(shapes, open_encoder("toy")["image"], "tokens"))
    assert tokens.shape == (80, 3, 4)


def test_several_texts_a_sample(shapes, store_path, toy, tools):
    texts = [tuple(f"caption {i} {k} " + "long " * (i % 5) for k in range(i % 4)) for i in range(80)]
    dataset = tools.make_dataset(shapes, texts=texts)
    extract(dataset, ["toy"], store_path, device="cpu", batch_size=8)
    store = FeatureStore(store_path)
    offsets = store.items("text")
    np.testing.assert_array_equal(np.diff(offsets), [i % 4 for i in range(80)])
    np.testing.assert_array_equal(store.present("text"), [i % 4 > 0 for i in range(80)])
    features = store.open_features("toy", "text")
    assert features.n_rows == sum(i % 4 for i in range(80))
    tower = open_encoder("toy")["text"]
    expected = [tower.encode([tower.prepare(text)], ("pooled",))["pooled"][0] for row in texts for text in row]
    np.testing.assert_array_equal(features.read(), np.array(expected))
    assert zarr.open_group(store_path, mode="r")["samples/items/text"][:].tolist() == offsets.tolist()


def test_rows_may_be_read_in_part_and_in_any_order(shapes, store_path):
    extract(shapes, ["classic"], store_path, device="cpu")
    features = FeatureStore(store_path).open_features("classic", "image")
    whole = features.read()
    np.testing.assert_array_equal(features.read("pooled", slice(10, 70)), whole[10:70])
    np.testing.assert_array_equal(features.read("pooled", np.array([70, 3, 3])), whole[[70, 3, 3]])


def test_nothing_in_a_store_depends_on_where_it_lies(shapes, store_path, tools):
    extract(shapes, ["classic"], store_path, device="cpu")
    here = os.fsencode(store_path.parent)
    assert not [name for name, data in tools.files(store_path).items() if here in data]
