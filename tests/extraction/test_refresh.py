"""Samples that changed, were mended or were appended: those are computed, and every other row keeps its bytes."""

import random

import numpy as np
import pytest
import torch

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.store.features import JOURNAL
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    options = {"views": ("pooled", "tokens"), "batch_size": 8, **options}
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def read(store_path, modality, view="pooled", encoder="toy"):
    return [row.tobytes() for row in FeatureStore(store_path).open_features(encoder, modality).read(view)]


def read_all(store_path):
    return {(m, view): read(store_path, m, view) for m in ("image", "text") for view in ("pooled", "tokens")}


def with_texts(dataset, changes):
    """A dataset with other texts at some rows."""
    texts = [changes.get(row, text) for row, text in enumerate(texts_of(dataset))]
    return with_columns(dataset, texts=texts)


CHANGES = {3: ("a new text",), 70: ("another new one, longer than it was before",)}


def test_refresh_computes_what_changed_and_keeps_every_other_row(shapes, store_path, toy):
    run(shapes, store_path)
    before = read_all(store_path)
    changed = with_texts(shapes, CHANGES)
    toy.change = lambda rows: rows * 2  # so that a row computed again can be told
    assert run(changed, store_path, refresh=True).computed == {("toy", "image"): 2, ("toy", "text"): 2}
    after = read_all(store_path)
    for place, rows in before.items():
        assert [row for row in range(80) if rows[row] != after[place][row]] == [3, 70]
    toy.change = lambda rows: rows
    fresh = store_path.with_name("fresh.zarr")
    run(changed, fresh)
    np.testing.assert_array_equal(
        FeatureStore(store_path).open_features("toy", "text").read()[[3, 70]],
        FeatureStore(fresh).open_features("toy", "text").read()[[3, 70]] * 2,
    )
    assert not any(run(changed, store_path).computed.values())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_refreshed_store_has_the_files_of_a_fresh_one(shapes, store_path, toy, tools, dtype):
    run(shapes, store_path, dtype=dtype)
    changed = with_texts(shapes, CHANGES)
    run(changed, store_path, dtype=dtype, refresh=True)
    fresh = store_path.with_name("fresh.zarr")
    run(changed, fresh, dtype=dtype)
    # The description of a ragged view has the mean length of the texts that it was begun with.
    passed_over = (JOURNAL, "features/toy/text/zarr.json")
    one, two = (
        {name: data for name, data in tools.files(path).items() if not name.endswith(passed_over)}
        for path in (store_path, fresh)
    )
    assert one == two


def test_outdated_tokens_are_not_read_as_none(shapes, store_path, toy):
    run(shapes, store_path)
    FeatureStore(store_path).open_features("toy", "text").forget("tokens", [3])
    rows = FeatureStore(store_path).open_features("toy", "text").rows("tokens", whole=False)
    for read_them in (lambda: rows[3], lambda: rows[5], lambda: rows.padded(torch.tensor([3, 70]))):
        with pytest.raises(CacheError, match=naming("block 0")):
            read_them()
    assert len(rows[70]) > 0


def test_rows_of_other_encoders_are_missing_until_they_are_computed_too(shapes, store_path, toy):
    run(shapes, store_path, "toy", "classic", views=("pooled",))
    before = read(store_path, "text", encoder="classic")
    changed = with_texts(shapes, CHANGES)
    run(changed, store_path, views=("pooled",), refresh=True)
    with pytest.raises(CacheError, match=naming("classic text pooled 78 80")):
        read(store_path, "text", encoder="classic")
    rows = FeatureStore(store_path).open_features("classic", "text").rows(whole=False)
    for row in (3, 5, 70):  # of either block: rows that are outdated are not told from their neighbours
        with pytest.raises(CacheError, match="block"):
            rows[row]
    assert run(changed, store_path, "classic", views=("pooled",)).computed[("classic", "text")] == 2
    after = read(store_path, "text", encoder="classic")
    assert [row for row in range(80) if before[row] != after[row]] == [3, 70]


@pytest.mark.parametrize("line", [2, 3])
def test_outdated_rows_are_not_read_though_a_line_that_says_so_is_damaged(shapes, store_path, toy, line):
    run(shapes, store_path, views=("pooled",))
    open_store(store_path, with_texts(shapes, {3: ("new",)}), refresh=True)
    journal = store_path / "features" / "toy" / "text" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b"stale" in lines[line]
    lines[line] = lines[line].replace(b"[3]", b"[4]")
    journal.write_bytes(b"".join(lines))
    with pytest.raises(CacheError, match=naming("79 80")):
        read(store_path, "text")


def test_an_interrupted_refresh_goes_on_without_being_asked_again(shapes, store_path, toy):
    run(shapes, store_path)
    changed = with_texts(shapes, CHANGES)

    def interrupt(batch):
        raise KeyboardInterrupt

    toy.on_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(changed, store_path, refresh=True)
    toy.on_encode = lambda batch: None
    with pytest.raises(CacheError, match=naming("78 80")):
        read(store_path, "image")
    assert run(changed, store_path).computed == {("toy", "image"): 2, ("toy", "text"): 2}


def test_a_mended_image_leaves_the_ledger_and_becomes_present(shapes, store_path, toy, tools):
    broken = [tools.FakeImage(i, "is damaged" if i in (4, 9) else "") for i in range(80)]
    run(tools.make_dataset(shapes, images=broken), store_path)
    mended = [tools.FakeImage(i + 100 if i == 4 else i, "is damaged" if i == 9 else "") for i in range(80)]
    dataset = tools.make_dataset(shapes, images=mended)
    with pytest.raises(CacheError, match=naming("1 row-4 --refresh")):
        run(dataset, store_path)
    report = run(dataset, store_path, refresh=True)
    assert report.computed == {("toy", "image"): 1}
    assert [line.id for line in report.bad] == ["row-9"]
    for store in (FeatureStore(store_path), open_store(store_path, dataset)):
        assert [line.id for line in store.bad_samples()] == ["row-9"]
        assert np.flatnonzero(~store.present("image")).tolist() == [9]
    assert FeatureStore(store_path).open_features("toy", "image").read()[4].any()


def test_an_image_that_broke_is_listed_when_it_is_refreshed(shapes, store_path, toy, tools):
    run(tools.make_dataset(shapes, images=[tools.FakeImage(i) for i in range(80)]), store_path)
    broken = [tools.FakeImage(i + 100, "is damaged") if i == 4 else tools.FakeImage(i) for i in range(80)]
    report = run(tools.make_dataset(shapes, images=broken), store_path, refresh=True)
    assert [(line.id, line.reason) for line in report.bad] == [("row-4", "is damaged")]
    store = FeatureStore(store_path)
    assert np.flatnonzero(~store.present("image")).tolist() == [4]
    assert not store.open_features("toy", "image").read()[4].any()


def test_refreshing_one_caption_computes_those_of_its_sample_alone(shapes, store_path, toy, tools):
    texts = [tuple(f"caption {i} {k}" for k in range(3)) for i in range(40)]
    run(tools.make_dataset(shapes, texts=texts), store_path)
    before = {view: read(store_path, "text", view) for view in ("pooled", "tokens")}
    texts[30] = ("caption 30 0", "not what it was", "caption 30 2")
    report = run(tools.make_dataset(shapes, texts=texts), store_path, refresh=True)
    assert report.computed == {("toy", "text"): 3}
    for view, rows in before.items():
        after = read(store_path, "text", view)
        assert [row for row in range(120) if rows[row] != after[row]] == [91]


@pytest.mark.parametrize("refresh", [False, True])
def test_another_number_of_captions_is_refused(shapes, store_path, toy, tools, refresh):
    texts = [(f"one {i}", f"two {i}") for i in range(40)]
    run(tools.make_dataset(shapes, texts=texts), store_path)
    texts[7] = (*texts[7], "three")
    with pytest.raises(CacheError, match="--workspace"):
        run(tools.make_dataset(shapes, texts=texts), store_path, refresh=refresh)


# Appended


@pytest.fixture
def grown(tools):
    return tools.make_shapes(test=150)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "int8"])
def test_appending_again_and_again_computes_each_row_once(grown, store_path, toy, tools, dtype):
    for n in (20, 21, 64, 100, 210):
        toy.batches.clear()
        have = 0 if not store_path.exists() else len(FeatureStore(store_path))
        run(tools.head(grown, n), store_path, dtype=dtype)
        assert toy.n_encoded == 2 * (n - have)
    fresh = store_path.with_name("fresh.zarr")
    run(grown, fresh, dtype=dtype)
    assert read_all(store_path) == read_all(fresh)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_an_interrupted_append_ends_with_the_bytes_of_one_that_was_not(grown, store_path, toy, tools, seed):
    """Features here depend on their batch, as those of real models do in their last bits."""
    undisturbed = store_path.with_name("undisturbed.zarr")
    encode = []
    toy.on_encode = lambda batch: encode.__setitem__(slice(None), [sum(int(codes.sum()) for codes in batch) % 997])
    toy.change = lambda rows: rows + np.float32(encode[0])
    for path in (undisturbed, store_path):
        run(tools.head(grown, 80), path)
    run(grown, undisturbed)
    rng, note, left = random.Random(seed), toy.on_encode, [0]

    def interrupt(batch):
        note(batch)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    toy.on_encode = interrupt
    for _ in range(4):
        left[0] = rng.randint(1, 8)
        with pytest.raises(KeyboardInterrupt):
            run(grown, store_path)
    toy.on_encode = note
    run(grown, store_path)
    assert tools.files(store_path) == tools.files(undisturbed)


def test_rows_appended_beside_rows_that_changed(grown, store_path, toy, tools):
    run(tools.head(grown, 80), store_path)
    changed = with_texts(grown, CHANGES)
    with pytest.raises(CacheError, match=naming("2")):
        run(changed, store_path)
    assert run(changed, store_path, refresh=True).computed == {("toy", "image"): 132, ("toy", "text"): 132}
    fresh = store_path.with_name("fresh.zarr")
    run(changed, fresh)
    assert read_all(store_path) == read_all(fresh)
