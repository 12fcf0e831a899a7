"""N-grams: a ragged view of columns and counts that is kept, resumed, refreshed and verified like the others."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from cachefuse.encoders import open_encoder
from cachefuse.encoders.lexical import LexicalTextTower
from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.plan import plan
from cachefuse.extraction.verify import repair, verify
from cachefuse.store.inspect import inspect_store
from cachefuse.store.store import FeatureStore
from cachefuse.store.tokens import Tokens
from cachefuse.store.views import View
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["lexical"], store_path, device="cpu", **{"batch_size": 8, **options})


def open_text(store_path):
    return FeatureStore(store_path).open_features("lexical", "text")


def expected_ngrams(dataset):
    tower = open_encoder("lexical")["text"]
    empty = np.empty((0, 2), np.int32)
    texts = [texts[0] if texts else "" for texts in texts_of(dataset)]
    return [tower.encode([tower.prepare(text)], tower.views)["ngrams"][0] if text else empty for text in texts]


def assert_ngrams(store_path, dataset):
    """Check that a store's n-grams are those of its texts, as arrays, and as one batch of a training."""
    rows, expected = open_text(store_path).rows("ngrams"), expected_ngrams(dataset)
    for found, row in zip(rows[:], expected, strict=True):
        assert found.dtype == np.dtype("<i4")
        np.testing.assert_array_equal(found, row)
    tokens = Tokens(rows, 2**21)
    assert (tokens.shape, tokens.n_tokens) == ((len(dataset), 2), max(map(len, expected)))
    np.testing.assert_array_equal(tokens.lengths, [len(row) for row in expected])
    x, mask = tokens.read(torch.arange(len(rows)))
    assert (x.shape, x.dtype) == ((len(dataset), tokens.n_tokens, 2), torch.int64)
    assert mask.shape == x.shape[:2]
    assert not x[~mask].any()
    np.testing.assert_array_equal(x[mask], np.concatenate(expected))


@pytest.fixture
def dataset(shapes, tools):
    """Texts of all kinds: none, one of spaces alone, one of punctuation."""
    texts = [(f"text {i} of #many, 火災 {'fire ' * (i % 7)}",) for i in range(80)]
    texts[5], texts[6], texts[70] = ("",), ("\u3000",), ("...",)
    return tools.make_dataset(shapes, texts=texts)


# Kept


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ngrams_come_back_as_they_were(dataset, store_path, dtype):
    assert run(dataset, store_path, dtype=dtype).computed == {("lexical", "text"): 80}
    assert_ngrams(store_path, dataset)
    features = open_text(store_path)
    view = features.views["ngrams"]
    assert (view.dtype, view.ragged, view.vocabulary, view.token_shape) == ("int32", True, 2**21, (2,))
    rows = features.rows("ngrams")
    assert rows.mapped
    assert np.flatnonzero(rows.lengths == 0).tolist() == [5, 6]
    assert rows.nbytes == 8 * rows.lengths.sum()


def test_any_zarr_reader_opens_ngrams(dataset, store_path):
    run(dataset, store_path)
    group = zarr.open_group(open_text(store_path).path, mode="r")
    expected = expected_ngrams(dataset)
    np.testing.assert_array_equal(group["ngrams/block-000000"][:], np.concatenate(expected[:64]))
    np.testing.assert_array_equal(np.diff(group["ngrams_offsets"][0]), [len(row) for row in expected[:64]])


def test_a_dataset_of_texts_without_any_ngram_is_kept(shapes, store_path, tools):
    dataset = tools.make_dataset(shapes, texts=[(" ",)] * 80)
    run(dataset, store_path)
    x, mask = Tokens(open_text(store_path).rows("ngrams"), 2**21).read(torch.arange(3))
    assert x.shape == (3, 1, 2)
    assert not mask.any()


def test_several_texts_a_sample_have_their_ngrams(shapes, store_path, tools):
    run(tools.make_dataset(shapes, texts=[("a", "b c", "d")[: i % 4] for i in range(80)]), store_path)
    assert len(open_text(store_path).rows("ngrams")) == sum(i % 4 for i in range(80))


def test_an_interrupted_run_ends_with_the_same_bytes(dataset, store_path, tools, monkeypatch):
    whole = store_path.with_name("whole.zarr")
    run(dataset, whole)
    encode, batches = LexicalTextTower.encode, []

    def interrupted(self, batch, views):
        batches.append(batch)
        if len(batches) == 9:
            raise KeyboardInterrupt
        return encode(self, batch, views)

    monkeypatch.setattr(LexicalTextTower, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, store_path, batch_size=2)
    run(dataset, store_path, batch_size=2)
    assert_ngrams(store_path, dataset)
    files = [{n: d for n, d in tools.files(p).items() if "/ngrams" in n} for p in (store_path, whole)]
    assert files[0] == files[1] != {}


def test_ngrams_do_not_depend_on_the_other_features_dtype(dataset, store_path):
    run(dataset, store_path, dtype="float32")
    key = open_text(store_path).key
    assert run(dataset, store_path).computed == {("lexical", "text"): 0}
    assert open_text(store_path).key == key


def test_refresh_computes_the_ngrams_of_a_text_that_changed(dataset, store_path):
    run(dataset, store_path)
    texts = [("a new text of six words",) if i in (3, 70) else text for i, text in enumerate(texts_of(dataset))]
    changed = with_columns(dataset, texts=texts)
    assert run(changed, store_path, refresh=True).computed == {("lexical", "text"): 2}
    assert_ngrams(store_path, changed)


def test_a_plan_counts_ngrams(dataset, store_path):
    (view,) = plan(dataset, ["lexical"], store_path, device="cpu").views
    assert (view.modality, view.view, view.dtype, view.pending) == ("text", "ngrams", "int32", 80)
    run(dataset, store_path)
    assert view.n_bytes == pytest.approx(open_text(store_path).rows("ngrams").nbytes, rel=0.2)  # of 64 texts
    assert plan(dataset, ["lexical"], store_path, device="cpu").n_bytes == 0


def test_an_inspection_shows_ngrams(dataset, store_path):
    run(dataset, store_path)
    inspected = inspect_store(FeatureStore(store_path))
    (view,) = inspected.views
    assert (view.view, view.shape, view.dtype, view.done) == ("ngrams", (80, "T", 2), "int32", 80)
    assert inspected.provenance[("lexical", "text")]["hashing"] == "1"


# Checked


def test_a_sound_store_is_verified(shapes, store_path):
    run(shapes, store_path)
    found = verify(FeatureStore(store_path))
    assert found.damage == ()
    assert [(view.view, view.finished, view.zero) for view in found.views] == [("ngrams", 2, 0)]


@pytest.mark.parametrize("name", ["ngrams/block-000001/c/0/0", "ngrams_offsets/c/1/0"])
def test_damaged_ngrams_are_found_and_made_again(dataset, store_path, tools, name):
    run(dataset, store_path)
    file = open_text(store_path).path / name
    before = file.read_bytes()
    data = bytearray(before)
    data[9] ^= 4
    file.write_bytes(data)
    found = verify(FeatureStore(store_path))
    assert [(damage.modality, damage.view, damage.block) for damage in found.damage] == [("text", "ngrams", 1)]
    repair(FeatureStore(store_path), found, dataset, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()
    assert file.read_bytes() == before


@pytest.mark.parametrize("wrong", [(-1, 1), (2**21, 1), (5, 0)])
def test_ngrams_that_cannot_be_are_an_error(dataset, store_path, monkeypatch, wrong):
    row = np.array([wrong], np.int32)
    monkeypatch.setattr(LexicalTextTower, "encode", lambda self, batch, views: {"ngrams": [row] * len(batch)})
    with pytest.raises(CacheError, match=naming("lexical row-0 ngrams 2,097,152")):
        run(dataset, store_path)


def test_ngrams_outside_the_vocabulary_are_damage(dataset, store_path):
    """Nothing writes such n-grams; the description of the store is changed here."""
    run(dataset, store_path)
    features = open_text(store_path)
    features.begin(replace(features.views["ngrams"], vocabulary=1))
    assert len(verify(FeatureStore(store_path)).damage) == 2


NGRAMS = {"name": "ngrams", "row_shape": [5, 2], "block_rows": 64, "ragged": True, "dtype": "int32", "vocabulary": 50}


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 0}, {"dtype": "float16"}, {"ragged": False}, {"row_shape": [5]}, {"row_shape": [5, 3]},
        {"row_shape": [5, 2, 2]}, {"name": "tokens"}, {"name": "ids"}, {"name": "pooled"},
    ],
)  # fmt: skip
def test_a_description_of_ngrams_that_cannot_be_is_refused(change):
    assert View.from_dict(NGRAMS).to_dict() == {**NGRAMS, "row_shape": (5, 2)}
    with pytest.raises(CacheError, match="view"):
        View.from_dict({**NGRAMS, **change})


# What is asked for


@pytest.mark.parametrize("views", [("pooled",), ("pooled", "tokens", "ids"), ("ngrams",), ("pooled", "ngrams")])
def test_lexical_stores_ngrams_whatever_the_views(dataset, store_path, views, caplog):
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        run(dataset, store_path, views=[view for view in views if view != "ids"])
    assert list(open_text(store_path).views) == ["ngrams"]
    assert caplog.records == []


def test_ngrams_are_made_beside_other_encoders(dataset, store_path, toy):
    report = run(dataset, store_path, "toy", "lexical", views=("pooled", "tokens", "ids"))
    assert set(report.rows) == {("toy", "text"), ("lexical", "text")}
    assert "ngrams" not in FeatureStore(store_path).open_features("toy", "text").views
    assert_ngrams(store_path, dataset)


@pytest.mark.parametrize("views", [("ngrams",), ("pooled", "ngrams")])
def test_ngrams_that_no_encoder_has_are_an_error(dataset, store_path, toy, views):
    with pytest.raises(ConfigError, match=naming("toy ngrams lexical")):
        run(dataset, store_path, "toy", views=views)
    assert not store_path.exists()
