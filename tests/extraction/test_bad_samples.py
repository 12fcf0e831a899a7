"""Samples that can't be used keep their rows, are listed, and stop a run only where they are too many."""

import json
from itertools import count

import numpy as np
import pytest

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.limits import Limits, limited
from cachefuse.store.format import unseal
from cachefuse.store.store import FeatureStore
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def open_toy(store_path, modality="image"):
    return FeatureStore(store_path).open_features("toy", modality)


def bad_at(tools, n, bad):
    return [None if bad.get(i) == "none" else tools.FakeImage(i, bad.get(i, "")) for i in range(n)]


def test_an_image_that_took_too_much_memory_is_computed_where_there_is_more(shapes, store_path, toy, tools):
    reason = "takes about 1.2 GB of memory, over the limit (--memory allows more)"
    images = bad_at(tools, 80, {3: reason, 70: "is damaged"})
    with limited(Limits(memory=1_000_000_000)):
        run(tools.make_dataset(shapes, images=images), store_path)
        toy.batches.clear()
        run(tools.make_dataset(shapes, images=images), store_path)
        assert toy.batches == []
    assert [line.id for line in FeatureStore(store_path).bad_samples()] == ["row-3", "row-70"]
    images[3] = tools.FakeImage(3)
    with limited(Limits(memory=2_000_000_000)):
        run(tools.make_dataset(shapes, images=images), store_path)
    store = FeatureStore(store_path)
    assert [line.id for line in store.bad_samples()] == ["row-70"]
    assert np.flatnonzero(~store.present("image")).tolist() == [70]
    assert open_toy(store_path).read()[3].any()


def test_each_bad_sample_keeps_its_row_and_is_listed(shapes, store_path, toy, tools):
    bad = {3: "is damaged", 64: "none", 99: "no such file"}
    texts = [("",) if i == 5 else () if i == 6 else (f"text {i}",) for i in range(100)]
    dataset = tools.make_dataset(shapes, images=bad_at(tools, 100, bad), texts=texts)
    report = run(dataset, store_path, views=("pooled", "tokens"), batch_size=8)
    expected = [
        ("row-3", "image", "pictures/3.png", "is damaged"),
        ("row-64", "image", "", "has no image"),
        ("row-99", "image", "pictures/99.png", "no such file"),
        ("row-5", "text", "", "has no text"),
        ("row-6", "text", "", "has no text"),
    ]
    assert [tuple(vars(line).values()) for line in report.bad] == expected
    lines = (store_path / "samples" / "bad.jsonl").read_text().splitlines()
    assert [tuple(unseal(json.loads(line), "a line").values()) for line in lines] == expected
    store = FeatureStore(store_path)
    for modality, absent in (("image", [3, 64, 99]), ("text", [5, 6])):
        np.testing.assert_array_equal(np.flatnonzero(~store.present(modality)), absent)
        features = store.open_features("toy", modality)
        pooled, tokens = features.read(), features.read("tokens")
        np.testing.assert_array_equal(np.flatnonzero((pooled == 0).all(1)), absent)
        for row in range(100):
            assert len(tokens[row]) == (3 if modality == "image" else 0 if row in absent else 2)
            np.testing.assert_array_equal(tokens[row].sum(0), pooled[row])


def test_bad_samples_count_once_over_encoders_and_resumed_runs(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=bad_at(tools, 100, {3: "is damaged", 70: "is damaged"}))

    toy.interrupt_after(10)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, store_path, batch_size=8)
    np.testing.assert_array_equal(np.flatnonzero(~FeatureStore(store_path).present("image")), [3, 70])
    report = run(dataset, store_path, "toy", "classic", batch_size=8, max_bad=0.02)
    assert [line.id for line in report.bad] == ["row-3", "row-70"]


def test_too_many_bad_samples_are_an_error_that_names_the_last(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=bad_at(tools, 100, dict.fromkeys(range(0, 60, 10), "is damaged")))
    with pytest.raises(
        CacheError,
        match=naming("6 100 image 5% --max-bad row-50"),
    ):
        run(dataset, store_path, batch_size=8)
    assert len(run(dataset, store_path, max_bad=0.06).bad) == 6


def test_no_usable_sample_at_all(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=[None] * 10)
    with pytest.raises(CacheError, match="image"):
        run(dataset, store_path, max_bad=1)
    with pytest.raises(CacheError, match="pooled"):
        open_toy(store_path).read()


def test_the_first_windows_may_be_all_bad(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=bad_at(tools, 100, dict.fromkeys(range(70), "is damaged")))
    run(dataset, store_path, views=("pooled", "tokens"), batch_size=8, max_bad=1)
    for view in ("pooled", "tokens"):
        values = open_toy(store_path).read(view)
        assert not values[:70].any()
        assert values[70:].reshape(30, -1).any(1).all()


def test_a_ragged_block_without_any_token(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, texts=[("",)] * 64 + [("one two",)] * 2 + [("",)] * 64)
    run(dataset, store_path, views=("tokens",), batch_size=8, max_bad=1)
    tokens = open_toy(store_path, "text").read("tokens")
    assert [rows.shape for rows in tokens] == [(0, 4)] * 64 + [(2, 4)] * 2 + [(0, 4)] * 64


def test_several_bad_texts_of_a_sample_are_one_line(shapes, store_path, toy, tools):
    texts = [("", "", "a") if i == 4 else ("b", "c") for i in range(40)]
    report = run(tools.make_dataset(shapes, texts=texts), store_path)
    assert [(line.id, line.modality) for line in report.bad] == [("row-4", "text")]


@pytest.mark.slow
def test_many_bad_samples_take_linear_time(shapes, tmp_path, toy, tools, growth):
    stores = count()

    def work(n):
        dataset = tools.make_dataset(shapes, images=[None] * (n - 1) + [tools.FakeImage(1)])
        report = run(dataset, tmp_path / f"{next(stores)}.zarr", batch_size=4, max_bad=1)
        assert len(report.bad) == n - 1

    assert growth(work, 250) < 9  # 16 where each sample is compared with all
