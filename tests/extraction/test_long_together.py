"""Many long texts together take bounded memory, and their features are those of each alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import pytest

from cachefuse.encoders import classic, open_encoder
from cachefuse.extraction import extract as module
from cachefuse.extraction import pipeline
from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore


def test_long_texts_are_prepared_few_at_a_time(monkeypatch):
    monkeypatch.setattr(pipeline, "TEXT_IN_WORK", 100)
    sizes, lock, most = [10] * 5 + [90, 90, 250, 10, 10, 10], Lock(), []
    begun = []

    def work(item):
        with lock:
            begun.append(item)
        return item

    with ThreadPoolExecutor(2) as pool:
        done = []
        for item in pipeline.in_order(pool, work, range(len(sizes)), 6, lambda item: sizes[item]):
            done.append(item)
            most.append(sum(sizes[i] for i in range(len(begun)) if i not in done))
    assert done == list(range(len(sizes)))
    assert max(most) <= 250


@pytest.fixture
def long(shapes, tools):
    words = [text[0] for text in shapes.modalities["text"].sources[:40]]
    return tools.make_dataset(shapes, texts=[(f"{word} " * (1 + 3 * (i % 5)),) for i, word in enumerate(words)])


def test_windows_of_long_texts_are_cut_and_give_the_same_features(long, store_path, monkeypatch):
    expected = store_path.with_name("whole.zarr")
    extract(long, ["classic"], expected, device="cpu")
    monkeypatch.setattr(module, "TEXT_IN_WORK", 300)
    monkeypatch.setattr(pipeline, "TEXT_IN_WORK", 300)
    extract(long, ["classic"], store_path, device="cpu")
    rows = FeatureStore(store_path).open_features("classic", "text").read()
    np.testing.assert_array_equal(rows, FeatureStore(expected).open_features("classic", "text").read())


def test_classic_gives_the_same_rows_for_texts_alone_and_together(monkeypatch):
    tower = open_encoder("classic")["text"]
    texts = ["a tree", "a house by the sea " * 9, "", "two\nlines", "ice"]
    expected = tower.encode(texts, ("pooled",))["pooled"]
    monkeypatch.setattr(classic, "TOGETHER", 20)
    np.testing.assert_array_equal(tower.encode(texts, ("pooled",))["pooled"], expected)
