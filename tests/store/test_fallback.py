"""Stores that another program laid out in its own way: read by zarr-python, the same values, still checked."""

import logging
import shutil

import numpy as np
import pytest
import torch
import zarr

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.store.format import checksum
from cachefuse.store.shard import shard_index
from cachefuse.store.store import FeatureStore
from fixtures.messages import naming

VIEWS = [("image", "pooled"), ("image", "tokens"), ("text", "pooled"), ("text", "tokens"), ("text", "ids")]


def arrays(store_path):
    """The folders of a store's feature arrays."""
    for file in sorted((store_path / "features").rglob("zarr.json")):
        if isinstance(zarr.open(file.parent, mode="r"), zarr.Array):
            yield file.parent


def rewrite(store_path, sharded=False, **layout):
    """Write every feature array anew with zarr-python."""
    for folder in arrays(store_path):
        values = zarr.open_array(folder, mode="r")[:]
        shutil.rmtree(folder)
        chunks = (max(1, len(values) // 3), *values.shape[1:])
        shards = (2 * chunks[0], *chunks[1:]) if sharded else None
        zarr.create_array(folder, data=values, chunks=chunks, shards=shards, **layout)


def reorder(store_path):
    """Turn the order of the inner chunks round in every shard, as a writer with threads may."""
    for folder in arrays(store_path):
        array = zarr.open_array(folder, mode="r")
        for shard in folder.glob("c/**/*") if array.shards else ():
            if shard.is_file():
                rows, row_bytes = array.shards[0], array.dtype.itemsize * int(np.prod(array.shape[1:]))
                size, data = array.chunks[0] * row_bytes, shard.read_bytes()
                n = rows // array.chunks[0]
                chunks = [data[i * size : (i + 1) * size] for i in range(n)]
                index = np.array([[(n - 1 - i) * size, size] for i in range(n)], "<u8").tobytes()
                assert len(index) + 4 == len(shard_index(rows, row_bytes))
                shard.write_bytes(b"".join(reversed(chunks)) + index + checksum(index).to_bytes(4, "little"))


LAYOUTS = {
    "compressed": rewrite,
    "unsharded": lambda store: rewrite(store, compressors=None),
    "sharded otherwise": lambda store: rewrite(store, sharded=True, compressors=None),
    "reordered": reorder,
}


@pytest.fixture(params=["float16", pytest.param("int8", marks=pytest.mark.slow)])
def store_dtype(request):
    return request.param


def make(dataset, store_path, dtype="float16"):
    return extract(
        dataset, ["toy"], store_path, views=("pooled", "tokens", "ids"), device="cpu", dtype=dtype, batch_size=16
    )


def read(store_path, modality, view):
    """Some rows of a view, read in several ways; () where a row has no tokens."""
    rows = FeatureStore(store_path).open_features("toy", modality).rows(view)
    index = np.array([79, 3, 64, 63, 3])
    found = [*rows[:], *rows[index], *rows[60:70], rows[-1]]
    if view != "pooled" and modality == "text":
        return [*found, *rows.padded(torch.from_numpy(index))]
    return [*found, *rows.index_select(0, torch.from_numpy(index), out=torch.empty(5, *rows.shape[1:]).half())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.one_in(2)
def test_another_layout_reads_the_same_and_says_once_that_it_is_slower(
    shapes, store_path, toy, caplog, layout, store_dtype
):
    make(shapes, store_path, store_dtype)
    before = {place: read(store_path, *place) for place in VIEWS}
    assert caplog.records == []
    LAYOUTS[layout](store_path)
    for place in VIEWS:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="cachefuse"):
            after = read(store_path, *place)
        (record,) = caplog.records
        assert f"{place[0]}/{place[1]} is in another layout" in record.getMessage()
        for one, two in zip(before[place], after, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.one_in(2)
def test_damage_in_another_layout_is_detected(shapes, store_path, toy, layout):
    make(shapes, store_path)
    LAYOUTS[layout](store_path)
    store = FeatureStore(store_path)
    for modality, view in VIEWS:
        group = store_path / "features" / "toy" / modality
        chunk = next(path for path in sorted((group / view).rglob("*")) if path.is_file() and "c" in path.parts)
        data = bytearray(chunk.read_bytes())
        data[len(data) // 8] ^= 4
        chunk.write_bytes(data)
        with pytest.raises(CacheError, match=naming(f"toy {modality} {view} block --repair")):
            store.open_features("toy", modality).read(view)


def test_a_chunk_that_is_gone_is_not_read_as_zeros(shapes, store_path, toy):
    make(shapes, store_path)
    rewrite(store_path)
    group = store_path / "features" / "toy" / "image"
    shutil.rmtree(group / "pooled" / "c" / "1")
    with pytest.raises(CacheError, match="damaged"):
        FeatureStore(store_path).open_features("toy", "image").read()


def test_a_store_in_another_layout_is_not_computed_again(shapes, store_path, toy):
    make(shapes, store_path)
    rewrite(store_path)
    assert not any(make(shapes, store_path).computed.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_in_another_layout_can_be_added_to(tools, store_path, toy, layout):
    grown = tools.make_shapes(test=90)
    make(tools.head(grown, 80), store_path)
    LAYOUTS[layout](store_path)
    make(grown, store_path)
    fresh = store_path.with_name("fresh.zarr")
    make(grown, fresh)
    for place in VIEWS:
        for one, two in zip(read(store_path, *place), read(fresh, *place), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.one_in(2)
def test_a_view_is_added_beside_one_in_another_layout_which_stays_as_it_is(shapes, store_path, toy, layout):
    extract(shapes, ["toy"], store_path, device="cpu")
    LAYOUTS[layout](store_path)
    before = {m: FeatureStore(store_path).open_features("toy", m).read() for m in ("image", "text")}
    make(shapes, store_path)
    for modality, values in before.items():
        features = FeatureStore(store_path).open_features("toy", modality)
        np.testing.assert_array_equal(features.read(), values)
        assert len(features.read("tokens")) == 80
        assert not features.rows().mapped
