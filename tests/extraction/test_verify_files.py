"""What stands in place of a store's file, as a folder, a pipe or a device, is damage, which hangs nothing."""

import pytest

from cachefuse.errors import CacheError
from cachefuse.extraction.verify import repair, verify
from cachefuse.store.store import FeatureStore
from fixtures.damage import features_of, places, replace_by
from fixtures.messages import naming


@pytest.mark.parametrize("how", ["gone", "a folder", "a pipe", "a device", "a dangling link"])
def test_anything_but_a_file_in_place_of_a_block_is_damage(shapes, store, toy, how):
    shard = store.path / "features" / "toy" / "image" / "pooled" / "c" / "1" / "0"
    replace_by(shard, how)
    found = verify(FeatureStore(store.path))
    assert places(found) == [("image", "pooled", 1)]
    assert not found.damage[0].missing
    with pytest.raises(CacheError, match=naming("damaged block 1 --repair")):
        FeatureStore(store.path).open_features("toy", "image").read()


@pytest.mark.parametrize("name", ["pooled/c/1/0", "zarr.json", "pooled/zarr.json"])
def test_a_folder_in_place_of_a_file_is_mended(shapes, store, toy, tools, name):
    before = features_of(tools, store.path)
    replace_by(store.path / "features" / "toy" / "image" / name, "a folder")
    (store.path / "features" / "toy" / "image" / name / "file").touch()
    found = verify(FeatureStore(store.path))
    assert found.damage
    if name == "zarr.json":
        assert places(found) == [("", "features/toy/image", None)]
        return
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()
    assert features_of(tools, store.path) == before


def test_a_folder_in_place_of_a_block_and_a_lost_line_of_its_journal(shapes, store, toy, tools):
    before = features_of(tools, store.path)
    folder = store.path / "features" / "toy" / "image"
    replace_by(folder / "pooled" / "c" / "0" / "0", "a folder")
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:1]).replace(b"\n", b"\x0e") + b"".join(lines[1:]))
    repair(FeatureStore(store.path), verify(FeatureStore(store.path)), shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()
    assert features_of(tools, store.path) == before


SMALL_FILES = [
    "zarr.json",
    "samples/zarr.json",
    "samples/split/zarr.json",
    "samples/present/text/zarr.json",
    "samples/present/zarr.json",
    "samples/split/c/0",
    "samples/bad.jsonl",
    "features/toy/text/zarr.json",
    "features/toy/text/journal.jsonl",
    "features/toy/text/tokens/block-000001/zarr.json",
    "features/toy/text/offsets/c/1/0",
]


@pytest.mark.parametrize("how", ["a folder", "a pipe", "a device"])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_no_special_file_hangs_or_fills_memory(store, name, how):
    (store.path / "samples" / "bad.jsonl").touch()
    replace_by(store.path / name, how)
    if name == "zarr.json":
        with pytest.raises(CacheError, match=r"zarr\.json"):
            FeatureStore(store.path)
    else:
        assert verify(FeatureStore(store.path)).damage
