"""Damage to what a store knows of its samples is found and mended, or refused where nothing identifies them."""

import shutil

import numpy as np
import pytest

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.extraction.verify import Damage, repair, verify
from cachefuse.store.columns import read_column
from cachefuse.store.format import append_lines
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of, with_columns
from fixtures.damage import flip, places
from fixtures.messages import naming


@pytest.mark.parametrize("name", ["target", "split", "present/image", "id", "digest", "stamp"])
@pytest.mark.one_in(3)
def test_damaged_samples_are_found_and_mended(shapes, store, name):
    expected = read_column(store.path, name)
    (chunk,) = [path for path in (store.path / "samples" / name / "c").rglob("*") if path.is_file()]
    flip(chunk, 12)
    found = verify(FeatureStore(store.path))
    assert found.damage == (Damage("", "", f"samples/{name}", None, "it cannot be read, or its checksum does not fit"),)
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()
    np.testing.assert_array_equal(read_column(store.path, name), expected)


@pytest.mark.parametrize("lost", [("digest", "stamp"), ("id", "digest")])
def test_samples_that_nothing_identifies_any_more_can_t_be_mended_and_say_so(shapes, store, lost):
    for name in lost:
        (chunk,) = [path for path in (store.path / "samples" / name / "c").rglob("*") if path.is_file()]
        flip(chunk, 12)
    found = verify(FeatureStore(store.path))
    assert places(found) == [("", f"samples/{name}", None) for name in sorted(lost)]
    with pytest.raises(CacheError, match="damaged"):
        repair(FeatureStore(store.path), found, shapes, device="cpu")


def test_without_ids_samples_that_are_gone_are_refused(shapes, store, tools):
    (chunk,) = [path for path in (store.path / "samples" / "id" / "c").rglob("*") if path.is_file()]
    flip(chunk, 12)
    with pytest.raises(CacheError, match=naming("damaged id")):
        open_store(store.path, tools.head(shapes, 70))


def test_lines_of_another_shape_in_the_journal_and_the_ledger_say_nothing(shapes, store):
    folder = store.path / "features" / "toy" / "image"
    lines = [
        {"view": "pooled"},
        {"view": "pooled", "block": 0, "files": 3},
        {"block": [1], "view": "pooled", "stale": [1]},
    ]
    append_lines(folder / "journal.jsonl", lines)
    append_lines(store.path / "samples" / "bad.jsonl", [{"id": 7}])
    assert verify(FeatureStore(store.path)).damage == ()
    assert [(line.id, line.reason) for line in FeatureStore(store.path).bad_samples()] == [("7", "")]


def test_without_ids_a_sample_that_changed_can_t_be_told_from_one_that_moved(shapes, store):
    (chunk,) = [path for path in (store.path / "samples" / "id" / "c").rglob("*") if path.is_file()]
    flip(chunk, 12)
    changed = with_columns(shapes, texts=[("another text",), *texts_of(shapes)[1:]])
    with pytest.raises(CacheError, match=naming("damaged id")):
        open_store(store.path, changed, refresh=True)


def test_a_column_of_samples_that_is_gone_is_damage_and_is_never_read_as_none(shapes, store):
    shutil.rmtree(store.path / "samples" / "present" / "image")
    found = verify(FeatureStore(store.path))
    assert places(found) == [("", "samples/present/image", None)]
    with pytest.raises(CacheError, match="samples/present/image"):
        FeatureStore(store.path).present("image")
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert FeatureStore(store.path).present("image").all()


def test_damaged_numbers_of_captions_are_mended(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, texts=[("a b", "c")[: 1 + i % 2] for i in range(80)])
    extract(dataset, ["toy"], store_path, device="cpu")
    before = FeatureStore(store_path).open_features("toy", "text").read()
    (chunk,) = [path for path in (store_path / "samples" / "items" / "text" / "c").rglob("*") if path.is_file()]
    flip(chunk, 12)
    found = verify(FeatureStore(store_path))
    assert ("", "samples/items/text", None) in places(found)
    repair(FeatureStore(store_path), found, dataset, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()
    np.testing.assert_array_equal(FeatureStore(store_path).open_features("toy", "text").read(), before)


def test_a_store_with_many_bad_samples_is_repaired(shapes, store_path, toy, tools):
    images = [tools.FakeImage(i, "is damaged" if i % 4 == 0 else "") for i in range(80)]
    dataset = tools.make_dataset(shapes, images=images)
    extract(dataset, ["toy"], store_path, device="cpu", max_bad=0.5)
    flip(store_path / "features" / "toy" / "image" / "pooled" / "c" / "0" / "0", 9)
    repair(FeatureStore(store_path), verify(FeatureStore(store_path)), dataset, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()


def test_a_lost_list_of_bad_samples_is_damage_and_is_made_again(shapes, store_path, toy, tools):
    images = [tools.FakeImage(i, "is damaged" if i in (3, 70) else "") for i in range(80)]
    dataset = tools.make_dataset(shapes, images=images)
    extract(dataset, ["toy"], store_path, device="cpu")
    listed = FeatureStore(store_path).bad_samples()
    ledger = store_path / "samples" / "bad.jsonl"
    first, second = ledger.read_bytes().splitlines(keepends=True)
    for data in (None, b"", first, first + second[:-9] + b"\n", b"{}\n" + second):
        ledger.unlink() if data is None else ledger.write_bytes(data)
        found = verify(FeatureStore(store_path))
        assert places(found) == [("", "samples/bad.jsonl", None)]
        with pytest.raises(CacheError, match=naming("bad.jsonl --repair")):
            FeatureStore(store_path).bad_samples()
        repair(FeatureStore(store_path), found, dataset, device="cpu")
        assert verify(FeatureStore(store_path)).damage == ()
        assert sorted(FeatureStore(store_path).bad_samples(), key=lambda line: line.id) == listed
        assert np.flatnonzero(~FeatureStore(store_path).present("image")).tolist() == [3, 70]
