import errno
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import filelock
import numpy as np
import pytest

from cachefuse.cache.extract import extract
from cachefuse.cache.features import Features
from cachefuse.cache.pipeline import encode_prepared, in_order, item_sources, prepare_source
from cachefuse.cache.store import FeatureStore
from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError, EncoderError, UnknownNameError


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def open_toy(store_path, modality="image"):
    return FeatureStore(store_path).open_features("toy", modality)


# Interrupted


@pytest.mark.parametrize("n_batches", [1, 3, 5, 11])
def test_an_interrupted_run_ends_with_the_same_bytes(shapes, store_path, toy, tools, n_batches):
    options = {"views": ("pooled", "tokens"), "batch_size": 8}
    undisturbed = store_path.with_name("undisturbed.zarr")
    run(shapes, undisturbed, **options)
    n_undisturbed = len(toy.batches)
    toy.batches.clear()

    def interrupt(batch):
        if len(toy.batches) == n_batches:
            toy.on_encode = lambda batch: None
            raise KeyboardInterrupt

    toy.on_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(shapes, store_path, **options)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
    run(shapes, store_path, **options)
    assert tools.files(store_path) == tools.files(undisturbed)
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
    def interrupt(batch):
        if len(toy.batches) == 9:
            raise KeyboardInterrupt

    toy.on_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(shapes, store_path, batch_size=8)
    with pytest.raises(CacheError, match=r"toy \(image, pooled\) has 64 of 80 rows; run the same .* again to go on"):
        open_toy(store_path).read()


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(shapes, store_path, toy, monkeypatch):
    real = Features.write

    def write(features, view, block, values):
        if block == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(features, view, block, values)

    with monkeypatch.context() as patch:
        patch.setattr(Features, "write", write)
        with pytest.raises(OSError, match="No space left on device"):
            run(shapes, store_path)
    assert run(shapes, store_path).computed == {("toy", "image"): 16, ("toy", "text"): 80}


def test_an_error_in_a_thread_stops_the_run_and_leaves_the_store_usable(shapes, store_path, toy, caplog):
    def fail(sample):
        if toy.prepared >= 70:
            raise ZeroDivisionError("the encoder is broken")

    toy.on_prepare = fail
    with caplog.at_level(logging.DEBUG), pytest.raises(ZeroDivisionError, match="the encoder is broken"):
        run(shapes, store_path, batch_size=8)
    assert "broken" not in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
    toy.on_prepare = lambda sample: None
    run(shapes, store_path, batch_size=8)
    assert open_toy(store_path).read().shape == (80, 4)


def test_a_second_writer_is_refused(shapes, store_path, toy):
    store_path.parent.mkdir()
    with (
        filelock.FileLock(store_path.with_name(".small.zarr.lock")),
        pytest.raises(CacheError, match=r"another extract is writing to .*small\.zarr; wait until it has ended"),
    ):
        run(shapes, store_path)
    run(shapes, store_path)


def test_progress_counts_rows_from_where_it_begins(shapes, store_path, toy):
    seen = []
    run(shapes, store_path, batch_size=32, on_progress=seen.append)
    assert [(p.modality, p.done, p.total, p.begun) for p in seen] == [
        *(("image", done, 80, 0) for done in (0, 32, 64, 80)),
        *(("text", done, 80, 0) for done in (0, 80)),
    ]
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
    tower = open_encoder("toy")["text"]
    np.testing.assert_array_equal(stored, [tower.codes(text).sum() * np.arange(1, 5) for (text,) in texts])
    spread = [max(map(len, batch)) - min(map(len, batch)) for modality, batch, _ in toy.batches]
    assert max(spread) <= 2


@pytest.mark.parametrize("view", ["pooled", "tokens"])
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
    tower = open_encoder("toy")["text"]
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
    run(replace(shapes, texts=None), store_path, batch_size=4)
    assert 4 < max(ahead) <= 12  # the batch being encoded, and two windows of one batch


# Bad samples


def bad_at(tools, n, bad):
    return [None if bad.get(i) == "none" else tools.FakeImage(i, bad.get(i, "")) for i in range(n)]


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
    assert [tuple(json.loads(line).values()) for line in lines] == expected
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

    def interrupt(batch):
        if len(toy.batches) == 10:
            raise KeyboardInterrupt

    toy.on_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(dataset, store_path, batch_size=8)
    np.testing.assert_array_equal(np.flatnonzero(~FeatureStore(store_path).present("image")), [3, 70])
    toy.on_encode = lambda batch: None
    report = run(dataset, store_path, "toy", "classic", batch_size=8, max_bad=0.02)
    assert [line.id for line in report.bad] == ["row-3", "row-70"]


def test_too_many_bad_samples_are_an_error_that_names_the_last(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=bad_at(tools, 100, dict.fromkeys(range(0, 60, 10), "is damaged")))
    with pytest.raises(
        CacheError,
        match=r"6 of 100 samples have no usable image, over the limit of 5% \(--max-bad\); the last: row-50 is damaged",
    ):
        run(dataset, store_path, batch_size=8)
    assert len(run(dataset, store_path, max_bad=0.06).bad) == 6


def test_no_usable_sample_at_all(shapes, store_path, toy, tools):
    dataset = tools.make_dataset(shapes, images=[None] * 10)
    with pytest.raises(CacheError, match="no sample of small has a usable image"):
        run(dataset, store_path, max_bad=1)
    with pytest.raises(CacheError, match="no pooled view"):
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


def test_many_bad_samples_take_linear_time(shapes, store_path, toy, tools):
    n = 4_000
    dataset = tools.make_dataset(shapes, images=[None] * (n - 1) + [tools.FakeImage(1)])
    begun = time.perf_counter()
    report = run(dataset, store_path, batch_size=4, max_bad=1)
    assert len(report.bad) == n - 1
    assert time.perf_counter() - begun < 20


# Features that can't be stored


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("view", ["pooled", "tokens"])
def test_features_that_are_not_finite_are_an_error(shapes, store_path, toy, value, view):
    toy.change = lambda rows: np.where(np.arange(4) == 2, value, rows).astype(np.float32)
    with pytest.raises(CacheError, match=f"toy: image {view} features of sample 00000 are NaN or infinite"):
        run(shapes, store_path, views=(view,), dtype="float32")


@pytest.mark.parametrize("view", ["pooled", "tokens"])
def test_features_too_large_for_float16_are_an_error_that_names_the_sample(shapes, store_path, toy, tools, view):
    dataset = tools.make_dataset(shapes, texts=[("b", "c")] * 10 + [("b", "c c c c c")] + [("b",)] * 9)
    toy.change = lambda rows: rows * (1e6 if len(rows) == 5 else 1)
    with pytest.raises(CacheError, match=f"text {view} features of sample row-10 overflow float16; use --dtype float3"):
        run(dataset, store_path, views=(view,))
    run(dataset, store_path, views=(view,), dtype="float32")  # what the message says to do
    with pytest.raises(CacheError, match=r"dtype \(float32 there, float16 here\)"):
        run(dataset, store_path, views=(view,))


# What can't be asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": []}, "extract needs at least one encoder"),
        ({"views": ("patches",)}, "unknown view 'patches'; choose from: pooled, tokens"),
        ({"views": ()}, "unknown view ''; choose from"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose from: float16, float32"),
        ({"batch_size": 0}, "batch size must be at least 1. Got 0 instead"),
        ({"max_bad": 1.5}, "max-bad must be between 0 and 1. Got 1.5 instead"),
        ({"max_bad": float("nan")}, "max-bad must be between 0 and 1. Got nan instead"),
        ({"views": ("tokens",)}, "encoder classic has no tokens view of image; choose from: pooled"),
    ],
)
def test_wrong_settings(shapes, store_path, options, message):
    with pytest.raises(ConfigError, match=message):
        extract(shapes, options.pop("encoders", ["classic"]), store_path, device="cpu", **options)
    assert not store_path.parent.exists()


def test_an_unknown_encoder(shapes, store_path):
    with pytest.raises(UnknownNameError, match=r"unknown encoder family 'clasic' .*did you mean 'classic'"):
        run(shapes, store_path, "clasic")


def test_an_encoder_for_what_the_dataset_lacks(shapes, store_path, toy, monkeypatch):
    monkeypatch.setattr("toy_encoder.open_toy", lambda spec, device: {"text": None})
    with pytest.raises(EncoderError, match="encoder toy encodes text, but small has only image"):
        run(replace(shapes, texts=None), store_path)


def test_a_view_is_asked_of_the_dataset_s_modalities_only(shapes, store_path, toy, monkeypatch):
    towers = open_encoder("toy")
    towers["text"].views = ("pooled",)
    monkeypatch.setattr("toy_encoder.open_toy", lambda spec, device: towers)
    run(replace(shapes, texts=None), store_path, views=("tokens",))


def test_two_encoders_of_one_name_are_refused(shapes, store_path, toy, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="two encoders would both be kept as toy:model; rename one"):
        run(shapes, store_path, f"toy:{tmp_path}/one/model", f"toy:{tmp_path}/two/model")
    with pytest.raises(ConfigError, match="two encoders would both be kept as toy:a/b"):
        run(shapes, store_path, "toy:a/b", "toy:a-b")


def test_an_encoder_named_twice_is_one(shapes, store_path, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    report = run(shapes, store_path, "toy:./model", " toy:./model", f"toy:{tmp_path}/model")
    assert list(report.rows) == [("toy:model", "image"), ("toy:model", "text")]


def test_sources_are_one_a_row(shapes, tools):
    one = tools.make_dataset(shapes, texts=[("a",), (), ("b",)])
    several = tools.make_dataset(shapes, texts=[("a", "b"), (), ("c",)])
    assert item_sources(one, "text") == ["a", "", "b"]
    assert item_sources(several, "text") == ["a", "b", "c"]
    assert item_sources(one, "image") == []
