"""Token ids: a ragged view of whole numbers that is kept, resumed, refreshed and verified like the others."""

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.plan import plan
from cachefuse.extraction.verify import repair, verify
from cachefuse.store.features import JOURNAL
from cachefuse.store.inspect import inspect_store
from cachefuse.store.store import FeatureStore
from cachefuse.store.views import View
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming

ALL = ("pooled", "tokens", "ids")


def run(dataset, store_path, *encoders, **options):
    options = {"views": ALL, "batch_size": 8, **options}
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def open_text(store_path):
    return FeatureStore(store_path).open_features("toy", "text")


def expected_ids(dataset):
    tower: Any = open_encoder("toy")["text"]
    return [tower.codes(texts[0]) if texts and texts[0] else np.empty(0) for texts in texts_of(dataset)]


def assert_ids(store_path, dataset):
    """Check that a store's ids are those of its texts, as arrays, and as one batch."""
    rows, expected = open_text(store_path).rows("ids"), expected_ids(dataset)
    for found, ids in zip(rows[:], expected, strict=True):
        assert (found.dtype, found.ndim) == (np.dtype("<i4"), 1)
        np.testing.assert_array_equal(found, ids)
    ids, mask = rows.padded(torch.arange(len(rows)))
    assert ids.shape == mask.shape == (len(dataset), max(map(len, expected)))
    assert ids.dtype == torch.int32
    assert not ids[~mask].any()
    np.testing.assert_array_equal(ids.long()[mask], np.concatenate(expected))


def views_encoded(toy):
    return {(modality, views) for modality, _, views in toy.batches}


def id_files(tools, store_path):
    return {name: data for name, data in tools.files(store_path / "features/toy/text").items() if name[:3] == "ids"}


# Kept


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_ids_come_back_as_they_were(shapes, store_path, toy, dtype):
    report = run(shapes, store_path, dtype=dtype)
    assert report.computed == {("toy", "image"): 80, ("toy", "text"): 80}
    assert_ids(store_path, shapes)
    features = open_text(store_path)
    view = features.views["ids"]
    assert (view.dtype, view.ragged, view.vocabulary, view.token_shape) == ("int32", True, 50, ())
    rows = features.rows("ids")
    assert rows.mapped
    assert rows.shape == (80,)
    assert rows.lengths.tolist() == [len(ids) for ids in expected_ids(shapes)]
    assert rows.nbytes == 4 * rows.lengths.sum()
    assert "ids" not in FeatureStore(store_path).open_features("toy", "image").views


def test_any_zarr_reader_opens_ids(shapes, store_path, toy):
    run(shapes, store_path)
    group = zarr.open_group(open_text(store_path).path, mode="r")
    flat = [group[f"ids/block-{block:06d}"] for block in range(2)]
    expected = expected_ids(shapes)
    for array, ids in zip(flat, (expected[:64], expected[64:]), strict=True):
        assert array.dtype == np.dtype("<i4")
        np.testing.assert_array_equal(array[:], np.concatenate(ids))
    np.testing.assert_array_equal(np.diff(group["ids_offsets"][0]), [len(ids) for ids in expected[:64]])
    assert group["offsets"].shape == (2, 65)  # those of the tokens


def test_ids_change_nothing_of_what_is_kept_beside_them(shapes, store_path, toy, tools):
    run(shapes, store_path)
    without = store_path.with_name("without.zarr")
    run(shapes, without, views=("pooled", "tokens"))
    files, fewer = tools.files(store_path), tools.files(without)
    about = "features/toy/text/zarr.json"
    assert b"vocabulary" not in fewer[about]
    assert b"vocabulary" in files[about]
    for name in fewer:
        assert name.endswith((JOURNAL, about)) or files[name] == fewer[name]
    assert open_text(store_path).key == open_text(without).key


def test_the_vocabulary_is_told_by_the_store_alone(shapes, store_path, toy):
    run(shapes, store_path)
    declared = json.loads((open_text(store_path).path / "zarr.json").read_bytes())
    views = declared["attributes"]["cachefuse"]["views"]
    assert [view.get("vocabulary") for view in views] == [None, None, 50]


def test_samples_without_a_text_have_no_ids(shapes, store_path, toy, tools):
    texts = [("",) if i in (5, 70) else (f"text {i}",) for i in range(80)]
    dataset = tools.make_dataset(shapes, texts=texts)
    run(dataset, store_path)
    assert_ids(store_path, dataset)
    assert np.flatnonzero(open_text(store_path).rows("ids").lengths == 0).tolist() == [5, 70]


def test_several_texts_a_sample_have_their_ids(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, texts=[("a", "b c", "d")[: i % 4] for i in range(80)])
    run(dataset, store_path, views=("ids",))
    rows = open_text(store_path).rows("ids")
    assert len(rows) == sum(i % 4 for i in range(80))
    assert rows.lengths[:6].tolist() == [1, 1, 2, 1, 2, 1]


# Only what is needed is done


def test_ids_alone_need_no_model(shapes, store_path, toy):
    report = run(shapes, store_path, views=("ids",))
    assert report.rows == {("toy", "text"): 80}
    assert views_encoded(toy) == {("text", ("ids",))}
    assert_ids(store_path, shapes)


def test_ids_are_added_without_encoding_again_what_is_there(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled", "tokens"))
    toy.batches.clear()
    assert run(shapes, store_path).computed == {("toy", "image"): 0, ("toy", "text"): 80}
    assert views_encoded(toy) == {("text", ("ids",))}
    toy.batches.clear()
    assert not any(run(shapes, store_path).computed.values())
    assert toy.batches == []


def test_features_are_added_to_ids(shapes, store_path, toy):
    run(shapes, store_path, views=("ids",))
    toy.batches.clear()
    run(shapes, store_path)
    assert views_encoded(toy) == {("image", ("pooled", "tokens")), ("text", ("pooled", "tokens"))}
    assert_ids(store_path, shapes)


@pytest.mark.parametrize("n_batches", [10, 12, 15, 19])
@pytest.mark.one_in(4)
def test_an_interrupted_run_ends_with_the_same_bytes(shapes, store_path, same_when_interrupted, n_batches):
    same_when_interrupted(lambda path: run(shapes, path), n_batches)
    assert_ids(store_path, shapes)


def test_ids_do_not_depend_on_the_other_features_dtype(shapes, store_path, toy, tools):
    run(shapes, store_path, views=("pooled",), dtype="float32")
    key = open_text(store_path).key
    run(shapes, store_path, views=("ids",))
    assert open_text(store_path).key == key
    assert_ids(store_path, shapes)
    run(shapes, store_path, views=("pooled", "ids"), dtype="float32")
    with pytest.raises(CacheError, match=naming("dtype float32 float16")):
        run(shapes, store_path, views=("pooled", "ids"))
    half = store_path.with_name("half.zarr")
    run(shapes, half, dtype="int8")
    assert id_files(tools, store_path) == id_files(tools, half) != {}


def test_a_plan_counts_ids(shapes, store_path, toy):
    planned = plan(shapes, ["toy"], store_path, views=("ids",), device="cpu")
    assert [(view.modality, view.view, view.dtype, view.pending) for view in planned.views] == [
        ("text", "ids", "int32", 80)
    ]
    assert views_encoded(toy) == {("text", ("ids",))}
    run(shapes, store_path, views=("ids",))
    stored = open_text(store_path).rows("ids").nbytes
    assert planned.views[0].n_bytes == pytest.approx(stored, rel=0.1)  # of 64 texts
    assert plan(shapes, ["toy"], store_path, views=("ids",), device="cpu").n_bytes == 0


def test_an_inspection_shows_ids(shapes, store_path, toy):
    run(shapes, store_path, views=("ids",))
    (view,) = inspect_store(FeatureStore(store_path)).views
    assert (view.view, view.shape, view.dtype, view.done) == ("ids", (80, "T"), "int32", 80)


# Rows that change or come


def test_refresh_computes_the_ids_of_a_text_that_changed(shapes, store_path, toy):
    run(shapes, store_path)
    texts = [("a new text of six words",) if i in (3, 70) else text for i, text in enumerate(texts_of(shapes))]
    changed = with_columns(shapes, texts=texts)
    assert run(changed, store_path, refresh=True).computed == {("toy", "image"): 2, ("toy", "text"): 2}
    assert_ids(store_path, changed)


def test_ids_of_appended_rows_are_added(tools, store_path, toy):
    grown = tools.make_shapes(test=90)
    run(tools.head(grown, 80), store_path, views=("ids",))
    assert run(grown, store_path, views=("ids",)).computed == {("toy", "text"): 70}
    assert_ids(store_path, grown)


# Checked


def test_a_sound_store_is_verified(shapes, store_path, toy, tools):
    """The id 0 is a token like any other: a text of it alone is no row of zeros."""
    tower: Any = open_encoder("toy")["text"]
    zero = next(word for word in map(str, range(1000)) if tower.codes(word)[0] == 0)
    dataset = tools.make_dataset(shapes, texts=[(zero,), *texts_of(shapes)[1:]])
    run(dataset, store_path, views=("ids",))
    found = verify(FeatureStore(store_path))
    assert found.damage == ()
    assert [(view.view, view.finished, view.nan, view.inf, view.zero) for view in found.views] == [("ids", 2, 0, 0, 0)]


@pytest.mark.parametrize("name", ["ids/block-000001/c/0", "ids_offsets/c/1/0"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.one_in(2)
def test_damaged_ids_are_found_and_made_again_without_the_model(shapes, store_path, toy, tools, name, dtype):
    run(shapes, store_path, dtype=dtype)
    before = id_files(tools, store_path)
    file = open_text(store_path).path / name
    data = bytearray(file.read_bytes())
    data[9] ^= 4
    file.write_bytes(data)
    found = verify(FeatureStore(store_path))
    assert [(damage.modality, damage.view, damage.block) for damage in found.damage] == [("text", "ids", 1)]
    toy.batches.clear()
    repair(FeatureStore(store_path), found, shapes, device="cpu")
    assert views_encoded(toy) == {("text", ("ids",))}
    assert verify(FeatureStore(store_path)).damage == ()
    assert id_files(tools, store_path) == before


@pytest.mark.parametrize("wrong", [-1, 50])
def test_ids_that_are_not_of_the_vocabulary_are_an_error(shapes, store_path, toy, monkeypatch, wrong):
    towers: dict[str, Any] = open_encoder("toy")
    codes = towers["text"].codes
    towers["text"].codes = lambda text: np.append(codes(text), wrong)
    monkeypatch.setattr("toy_encoder.open_toy", lambda spec, device: towers)
    with pytest.raises(CacheError, match=naming(f"toy 00000 {wrong} 50")):
        run(shapes, store_path, views=("ids",))


def test_ids_that_are_not_of_the_vocabulary_are_damage(shapes, store_path, toy):
    """Nothing writes such ids; the description of the store is changed here."""
    run(shapes, store_path, views=("ids",))
    features = open_text(store_path)
    features.begin(replace(features.views["ids"], vocabulary=1))
    reasons = [damage.reason for damage in verify(FeatureStore(store_path)).damage]
    n_wrong = [sum(int((ids >= 1).sum()) for ids in expected_ids(shapes)[rows]) for rows in (slice(64), slice(64, 80))]
    assert reasons == [f"it holds {n:,} ids outside the vocabulary" for n in n_wrong]


IDS = {"name": "ids", "row_shape": [5], "block_rows": 64, "ragged": True, "dtype": "int32", "vocabulary": 50}


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 0}, {"vocabulary": -1}, {"vocabulary": True}, {"vocabulary": "50"}, {"dtype": "float16"},
        {"ragged": False}, {"row_shape": [5, 4]}, {"name": "tokens"}, {"name": "offsets"}, {"more": 1},
    ],
)  # fmt: skip
def test_a_description_of_ids_that_can_t_be_is_refused(change):
    assert View.from_dict(IDS).to_dict() == {**IDS, "row_shape": (5,)}
    with pytest.raises(CacheError, match="view"):
        View.from_dict({**IDS, **change})


# What can't be asked for


def test_ids_are_made_by_the_encoders_that_have_them(shapes, store_path, toy, caplog):
    report = run(shapes, store_path, "classic", "toy", views=("pooled", "ids"))
    assert set(report.rows) == {(encoder, modality) for encoder in ("classic", "toy") for modality in ("image", "text")}
    assert list(FeatureStore(store_path).open_features("classic", "text").views) == ["pooled"]
    assert caplog.records == []
    assert_ids(store_path, shapes)


def test_an_encoder_with_nothing_to_make_is_left_out_and_said(shapes, store_path, toy, caplog):
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        report = run(shapes, store_path, "classic", "toy", views=("ids",))
    assert list(report.rows) == [("toy", "text")]
    (record,) = caplog.records
    assert record.getMessage().startswith("classic is skipped: ")
    assert FeatureStore(store_path).open_features("classic", "text") is None


@pytest.mark.parametrize("views", [("ids",), ("pooled", "ids")])
def test_ids_that_no_encoder_has_are_an_error(shapes, store_path, toy, views):
    with pytest.raises(ConfigError, match=naming("ids classic hf:bert-base-uncased")):
        run(shapes, store_path, "classic", views=views)
    with pytest.raises(ConfigError, match=naming("ids toy")):
        run(with_columns(shapes, texts=None), store_path, views=views)
    assert not store_path.exists()


def test_other_views_are_asked_of_every_encoder(shapes, store_path, toy):
    with pytest.raises(ConfigError, match=naming("classic tokens image pooled")):
        run(shapes, store_path, "toy", "classic")


def test_ids_that_were_not_extracted_say_how_to_make_them(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled",))
    with pytest.raises(CacheError, match=naming("ids --dataset small --encoder toy --views")):
        open_text(store_path).read("ids")
