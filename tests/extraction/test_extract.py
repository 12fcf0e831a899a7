import errno
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import numpy as np
import pytest

from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError, EncoderError, UnknownNameError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.pipeline import encode_prepared, in_order, prepare_source
from cachefuse.store.lock import only_writer
from cachefuse.store.shard import ShardWriter
from cachefuse.store.store import FeatureStore
from fixtures.columns import with_columns
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def open_toy(store_path, modality="image"):
    return FeatureStore(store_path).open_features("toy", modality)


# Interrupted


@pytest.mark.parametrize("n_batches", [1, 3, 5, 11])
@pytest.mark.one_in(4)
def test_an_interrupted_run_ends_with_the_same_bytes(shapes, toy, same_when_interrupted, n_batches):
    def make(path):
        run(shapes, path, views=("pooled", "tokens"), batch_size=8)

    n_undisturbed = same_when_interrupted(make, n_batches)
    assert len(toy.batches) <= n_undisturbed + 8  # the block that was under way, eight batches of eight


def test_a_resumed_run_makes_the_same_batches(shapes, store_path, toy):
    run(shapes, store_path, batch_size=12)
    whole = [batch.tobytes() for _, items, _ in toy.batches for batch in items]
    (store_path / "features" / "toy" / "text" / "pooled" / "c" / "1" / "0").unlink()
    toy.batches.clear()
    assert run(shapes, store_path, batch_size=12).computed[("toy", "text")] == 16
    again = [batch.tobytes() for _, items, _ in toy.batches for batch in items]
    assert again == whole[80:]


def test_an_incomplete_view_is_not_read(shapes, store_path, toy):
    toy.interrupt_after(9, store_path, n_blocks=1)
    with pytest.raises(KeyboardInterrupt):
        run(shapes, store_path, batch_size=8)
    with pytest.raises(CacheError, match=naming("toy image pooled 64 80")):
        open_toy(store_path).read()


def test_finished_blocks_of_an_incomplete_view_can_be_read(shapes, store_path, toy):
    run(shapes, store_path)
    values = open_toy(store_path).read()
    (store_path / "features" / "toy" / "image" / "pooled" / "c" / "0" / "0").unlink()
    rows = open_toy(store_path).rows(whole=False)
    np.testing.assert_array_equal(rows[64:], values[64:])
    np.testing.assert_array_equal(rows[[79, 64]], values[[79, 64]])
    for key in (0, slice(60, 70), [79, 63]):
        with pytest.raises(CacheError, match=naming("toy image pooled block 0")):
            rows[key]


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(shapes, store_path, toy, monkeypatch):
    real = ShardWriter.finish

    def finish(shard, path, *about):
        if path.parent.name == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(shard, path, *about)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish)
        with pytest.raises(OSError, match="No space left on device"):
            run(shapes, store_path)
    assert run(shapes, store_path).computed == {("toy", "image"): 16, ("toy", "text"): 80}


def test_an_error_in_a_thread_stops_the_run_and_leaves_the_store_usable(shapes, store_path, toy, caplog):
    def fail(sample):
        if toy.prepared >= 70:
            raise ZeroDivisionError("the encoder is broken")

    toy.on_prepare = fail
    message = r"image.*\d{5}.*ZeroDivisionError: the encoder is broken"
    with caplog.at_level(logging.DEBUG), pytest.raises(EncoderError, match=message):
        run(shapes, store_path, batch_size=8)
    assert "broken" not in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
    toy.on_prepare = lambda sample: None
    run(shapes, store_path, batch_size=8)
    assert open_toy(store_path).read().shape == (80, 4)


def test_an_error_of_the_machine_keeps_its_type_and_says_which_sample(shapes, store_path, toy, tools):
    def fail(sample):
        if sample.getpixel((0, 0))[0] == 7:
            raise OSError(errno.EIO, "Input/output error")

    toy.on_prepare = fail
    dataset = tools.make_dataset(shapes, images=[tools.FakeImage(i) for i in range(20)])
    with pytest.raises(OSError, match="Input/output error") as caught:
        run(dataset, store_path, batch_size=8)
    assert caught.value.errno == errno.EIO
    assert caught.value.__notes__ == ["while preparing the image of sample row-7 (pictures/7.png)"]


def test_a_second_writer_is_refused(shapes, store_path, toy):
    store_path.parent.mkdir()
    with (
        filelock.FileLock(store_path.with_name(".small.zarr.lock")),
        pytest.raises(CacheError, match=naming("small.zarr")),
    ):
        run(shapes, store_path)
    run(shapes, store_path)


def test_a_second_writer_is_told_which_process_writes_and_since_when(shapes, store_path):
    since = rf"{os.getpid()}.*\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    with only_writer(store_path), pytest.raises(CacheError, match=since):
        run(shapes, store_path)
    assert {path.name for path in store_path.parent.iterdir()} == {".small.zarr.lock"}


def test_progress_counts_rows_from_where_it_begins(shapes, store_path, toy):
    seen = []
    run(shapes, store_path, batch_size=32, on_progress=seen.append)
    assert [(p.modality, p.done, p.total, p.begun) for p in seen] == [
        *(("", done, 80, 0) for done in (32, 64, 80)),  # the samples' content was hashed
        *(("image", done, 80, 0) for done in (0, 32, 64, 80)),
        *(("text", done, 80, 0) for done in (0, 80)),
    ]
    assert {p.encoder for p in seen} == {"", "toy"}
    assert {p.bottleneck for p in seen if p.done == p.begun} <= {""}
    assert {p.bottleneck for p in seen if p.encoder and p.done > p.begun} <= {"reading", "encoding", "writing"}
    seen.clear()
    (store_path / "features" / "toy" / "image" / "pooled" / "c" / "1" / "0").unlink()
    run(shapes, store_path, batch_size=32, on_progress=seen.append)
    assert [(p.modality, p.done, p.begun) for p in seen] == [("image", 64, 64), ("image", 80, 64)]


# Order and batches


def test_texts_come_back_in_order_from_batches_of_like_length(shapes, store_path, toy, tools):
    rng = np.random.default_rng(0)
    texts = [(" ".join(f"w{i}" for _ in range(rng.integers(1, 9))),) for i in range(200)]
    dataset = tools.make_dataset(shapes, texts=texts)
    stored = tools.read(dataset, store_path, "toy", "text", batch_size=8)
    tower: Any = open_encoder("toy")["text"]
    np.testing.assert_array_equal(stored, [tower.codes(text).sum() * np.arange(1, 5) for (text,) in texts])
    spread = [max(map(len, batch)) - min(map(len, batch)) for modality, batch, _ in toy.batches]
    assert max(spread) <= 2


@pytest.mark.parametrize("view", ["pooled", "tokens"])
@pytest.mark.one_in(2)
def test_features_do_not_depend_on_the_batch_size(shapes, tmp_path, toy, tools, view):
    for modality in ("image", "text"):
        read = [
            tools.read(shapes, tmp_path / f"{size}-{modality}.zarr", "toy", modality, view, batch_size=size)
            for size in (1, 7, 64, 1000)
        ]
        for other in read[1:]:
            for one, two in zip(read[0], other, strict=True):
                np.testing.assert_array_equal(one, two)


def test_encode_prepared_leaves_gaps_for_the_bad(toy):
    tower: Any = open_encoder("toy")["text"]
    prepared = [prepare_source(tower, text) for text in ("a b c", "", "d", None, "e f")]
    values = encode_prepared(tower, prepared, ("pooled",), 2)["pooled"]
    assert [value is None for value in values] == [False, True, False, True, False]
    np.testing.assert_array_equal(values[4], tower.codes("e f").sum() * np.arange(1, 5))
    assert encode_prepared(tower, [], ("pooled",), 2) == {"pooled": []}


def test_half_a_surrogate_pair_in_a_text_is_replaced():
    tower = open_encoder("classic")["text"]
    assert prepare_source(tower, "bad \ud800 text") == "bad ? text"
    assert prepare_source(tower, "good 🦊 text") == "good 🦊 text"


def test_texts_of_any_kind_pass_a_whole_run(shapes, store_path, tools):
    texts = [(text,) for text in ("bad \ud800", "\0", "🦊", " ", "\n", "a" * 100_000, "é", "ok")]
    stored = tools.read(tools.make_dataset(shapes, texts=texts), store_path, "classic", "text")
    assert np.isfinite(stored).all()


def test_in_order_yields_in_order_and_stays_within_its_bound():
    taken, started, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal started
        with lock:
            started += 1
            assert started <= taken + 5
        time.sleep(0.001 * (item % 3))
        return item * item

    with ThreadPoolExecutor(4) as pool:
        squares = in_order(pool, work, range(40), 5)
        found = []
        for square in squares:
            found.append(square)
            taken += 1
            if taken == 20:
                time.sleep(0.05)
                assert started <= 25
    assert found == [i * i for i in range(40)]
    assert list(in_order(pool, work, [], 5)) == []


def test_images_are_prepared_at_most_two_windows_ahead(shapes, store_path, toy):
    ahead = []

    def note(batch):
        time.sleep(0.02)  # time for the threads to run as far ahead as they may
        ahead.append(toy.prepared - toy.n_encoded)

    toy.on_encode = note
    run(with_columns(shapes, texts=None), store_path, batch_size=4)
    assert 4 < max(ahead) <= 12  # the batch being encoded, and two windows of one batch


# Features that can't be stored


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("view", ["pooled", "tokens"])
def test_features_that_are_not_finite_are_an_error(shapes, store_path, toy, value, view):
    toy.change = lambda rows: np.where(np.arange(4) == 2, value, rows).astype(np.float32)
    with pytest.raises(CacheError, match=naming(f"toy image {view} 00000 NaN")):
        run(shapes, store_path, views=(view,), dtype="float32")


@pytest.mark.parametrize("view", ["pooled", "tokens"])
def test_features_too_large_for_float16_are_an_error_that_names_the_sample(shapes, store_path, toy, tools, view):
    dataset = tools.make_dataset(shapes, texts=[("b", "c")] * 10 + [("b", "c c c c c")] + [("b",)] * 9)
    toy.change = lambda rows: rows * (1e6 if len(rows) == 5 else 1)
    with pytest.raises(CacheError, match=naming(f"text {view} row-10 float16 --dtype float32")):
        run(dataset, store_path, views=(view,))
    run(dataset, store_path, views=(view,), dtype="float32")  # what the message says to do
    with pytest.raises(CacheError, match=naming("dtype float32 float16")):
        run(dataset, store_path, views=(view,))


# What can't be asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": []}, "encoder"),
        ({"views": ("patches",)}, "patches pooled tokens ids"),
        ({"views": ()}, "view"),
        ({"dtype": "int4"}, "dtype int4 float16 float32 int8"),
        ({"dtype": "int8"}, "dtype int8 tokens --views"),
        ({"batch_size": 0}, "size 1 0"),
        ({"max_bad": 1.5}, "max-bad 0 1 1.5"),
        ({"max_bad": float("nan")}, "max-bad 0 1 nan"),
        ({"views": ("tokens",)}, "classic tokens image pooled"),
    ],
)
def test_wrong_settings(shapes, store_path, options, message):
    with pytest.raises(ConfigError, match=naming(message)):
        extract(shapes, options.pop("encoders", ["classic"]), store_path, device="cpu", **options)
    assert not store_path.exists()


def test_an_unknown_encoder(shapes, store_path):
    with pytest.raises(UnknownNameError, match=naming("clasic classic")):
        run(shapes, store_path, "clasic")


def test_an_encoder_for_what_the_dataset_lacks(shapes, store_path, toy, monkeypatch):
    tower = open_encoder("toy")["text"]
    monkeypatch.setattr("toy_encoder.open_toy", lambda spec, device: {"text": tower})
    with pytest.raises(EncoderError, match=naming("toy text image")):
        run(with_columns(shapes, texts=None), store_path)


def test_a_view_is_asked_of_the_dataset_s_modalities_only(shapes, store_path, toy, monkeypatch):
    towers = open_encoder("toy")
    towers["text"].views = ("pooled",)
    monkeypatch.setattr("toy_encoder.open_toy", lambda spec, device: towers)
    run(with_columns(shapes, texts=None), store_path, views=("tokens",))


def test_two_encoders_of_one_name_are_refused(shapes, store_path, toy, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="toy:model"):
        run(shapes, store_path, f"toy:{tmp_path}/one/model", f"toy:{tmp_path}/two/model")
    with pytest.raises(ConfigError, match="toy:a/b"):
        run(shapes, store_path, "toy:a/b", "toy:a-b")


def test_an_encoder_named_twice_is_one(shapes, store_path, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    report = run(shapes, store_path, "toy:./model", " toy:./model", f"toy:{tmp_path}/model")
    assert list(report.rows) == [("toy:model", "image"), ("toy:model", "text")]


def test_sources_are_one_a_row(shapes, tools):
    one = tools.make_dataset(shapes, texts=[("a",), (), ("b",)])
    several = tools.make_dataset(shapes, texts=[("a", "b"), (), ("c",)])
    assert one.modalities["text"].feature_sources() == ["a", None, "b"]
    assert several.modalities["text"].feature_sources() == ["a", "b", "c"]
    assert several.modalities["text"].owners().tolist() == [0, 0, 2]
