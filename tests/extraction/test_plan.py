"""What a plan says against what extract then does."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.plan import ROOM_TO_LEAVE, plan, row_bytes
from cachefuse.store.store import FeatureStore
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming


def test_a_plan_says_what_extract_then_writes(shapes, store_path, toy):
    toy_plan = plan(shapes, ["classic"], store_path, device="cpu")
    assert not store_path.exists()
    extract(shapes, ["classic"], store_path, device="cpu")
    for view in toy_plan.views:
        assert (view.rows, view.pending) == (80, 80)
        stored = FeatureStore(store_path).open_features(view.encoder, view.modality).read()
        assert view.n_bytes == stored.nbytes
    assert set(toy_plan.seconds) == {("classic", "image"), ("classic", "text")}
    assert all(seconds > 0 for seconds in toy_plan.seconds.values())
    assert toy_plan.fits


@pytest.mark.parametrize(("dtype", "token_bytes"), [("float16", 8), ("float32", 16), ("int8", 4 + 2)])
def test_tokens_are_estimated_from_the_lengths_of_the_texts(shapes, toy, dtype, token_bytes):
    towers = open_encoder("toy")
    for tower in towers.values():
        tower.token_shape = (3, 4)
    texts = [text for (text,) in texts_of(shapes)]
    assert row_bytes(towers["image"], images_of(shapes), "tokens", dtype) == 3 * token_bytes
    mean = np.mean([len(text.split()) for text in texts[:64]])
    assert row_bytes(towers["text"], texts, "tokens", dtype) == pytest.approx(mean * token_bytes)


def test_what_is_there_is_not_planned_again(shapes, store_path, toy, tools):
    extract(shapes, ["toy"], store_path, device="cpu")
    toy.batches.clear()
    again = plan(shapes, ["toy"], store_path, device="cpu")
    assert [view.pending for view in again.views] == [0, 0]
    assert again.n_bytes == 0
    assert toy.batches == []
    more = plan(tools.make_shapes(test=30), ["toy"], store_path, device="cpu")
    assert [view.pending for view in more.views] == [10, 10]
    other = plan(shapes, ["classic"], store_path, device="cpu")
    assert [view.pending for view in other.views] == [80, 80]


def test_a_plan_refuses_what_extract_would_refuse(shapes, store_path, toy):
    extract(shapes, ["toy"], store_path, views=("tokens",), device="cpu")
    with pytest.raises(CacheError, match=naming("dtype tokens float16 int8")):
        plan(shapes, ["toy"], store_path, views=("tokens",), dtype="int8", device="cpu")


def test_a_plan_checks_what_is_asked_for(shapes, store_path):
    with pytest.raises(ConfigError, match=naming("classic tokens image")):
        plan(shapes, ["classic"], store_path, views=("tokens",), device="cpu")


def test_extract_stops_before_it_starts_where_the_disk_has_no_room(shapes, store_path, toy, monkeypatch):
    free = SimpleNamespace(free=ROOM_TO_LEAVE + 80 * 4 * 2 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CacheError, match=naming("1.28 kB 67.1 MB")):
        extract(shapes, ["toy"], store_path, device="cpu")
    assert toy.batches == []
    assert not plan(shapes, ["toy"], store_path, device="cpu").fits
    free.free += 1
    extract(shapes, ["toy"], store_path, device="cpu")
    free.free = ROOM_TO_LEAVE
    extract(shapes, ["toy"], store_path, device="cpu")  # nothing is written: a full disk does not matter
