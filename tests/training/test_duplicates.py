"""Rows with equal or nearly equal content, against every two rows compared one by one."""

import csv
import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.extraction.extract import extract
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.train import train_head
from cachefuse.store.columns import column_checksum
from cachefuse.store.store import FeatureStore
from cachefuse.training import duplicates
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.duplicates import equal_pairs, find_duplicates, keep_together, near_pairs, write_pairs
from cachefuse.training.selection import select_features
from fixtures.messages import naming, says

N = 60
ABSENT = {"image": {3, 7, 20, 41, 59}, "text": {3, 8, 9, 20, 30}}


def set_digests(store, digests):
    """Give the samples other digests, as if their content were equal or not."""
    array = zarr.open_array(store.path / "samples/digest", mode="r+", zarr_format=3)
    values = np.array(digests, np.dtypes.StringDType())
    array[:] = values
    array.update_attributes({"checksum": column_checksum(values)})
    return FeatureStore(store.path)


@pytest.fixture
def copied(make_store):
    """60 rows; rows 20 to 39 are near the first 20 in one or both modalities, and some have equal digests."""
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(5, 1, (N, 8)), "text": rng.normal(0, 1, (N, 6))}
    for i in range(20):
        x["image"][20 + i] = x["image"][i] + rng.normal(0, 0.1 if i % 3 else 2, 8)
        x["text"][20 + i] = x["text"][i] + rng.normal(0, 0.1 if i % 4 else 2, 6)
    x = {modality: values.astype(np.float16) for modality, values in x.items()}
    targets = (rng.random((N, 3)) < 0.5).astype(np.int8)
    targets[20:35] = targets[:15]
    targets[52:] = -1
    store = make_store(x, targets, ["train"] * 30 + ["val"] * 18 + ["test"] * 12, absent=ABSENT)
    digests = [f"{i:016x}" for i in range(N)]
    for copy, of in ((21, 1), (22, 1), (50, 1), (23, 4), (55, 6), (54, 6), (20, 3)):
        digests[copy] = digests[of]
    return set_digests(store, digests)


def one_by_one(store, limit):
    """Return the exact pairs and the near ones {pair: cosine}; what to compare is found anew for every pair."""
    unit = {}
    for modality in ("image", "text"):
        x = store.open_features("toy", modality).read().astype(np.float64)
        x -= x[store.present(modality)].mean(0)
        unit[modality] = x / np.linalg.norm(x, axis=1, keepdims=True)
    exact, near = set(), {}
    for i, j in itertools.combinations(range(N), 2):
        shared = [m for m in unit if i not in ABSENT[m] and j not in ABSENT[m]]
        cosine = min((unit[m][i] @ unit[m][j] for m in shared), default=-1)
        if store.digests[i] == store.digests[j] and i != 3:  # row 3 has nothing at all
            exact.add((i, j))
        elif cosine >= limit:
            near[i, j] = cosine
    return exact, near


def as_set(pairs):
    return set(map(tuple, pairs.tolist()))


@pytest.mark.parametrize("piece", [7, 16, 4096])
@pytest.mark.parametrize("limit", [0.3, 0.9, 0.95])
def test_every_pair_is_found_once(copied, piece, limit, monkeypatch):
    monkeypatch.setattr(duplicates, "PIECE", piece)
    exact, near = one_by_one(copied, limit)
    seen = []
    found = find_duplicates(copied, limit=limit, device="cpu", on_progress=lambda *counts: seen.append(counts))
    assert len(exact) == 10
    assert near
    assert as_set(found.exact) == exact
    assert as_set(found.near) == near.keys()
    assert len(found.near) == len(near)
    assert found.cosines.tolist() == pytest.approx([near[i, j] for i, j in found.near.tolist()], abs=1e-5)
    assert seen[-1] == (N, N)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert found.encoders == {"image": "toy", "text": "toy"}


def test_counts_by_split(copied):
    exact, near = one_by_one(copied, 0.95)
    found = find_duplicates(copied, device="cpu")
    targets, split_of = copied.targets, copied.splits
    named = [(line.split, line.among) for line in found.splits]
    assert named == [
        ("train", "train"), ("val", "train"), ("val", "val"), ("test", "train"), ("test", "val"), ("test", "test"),
    ]  # fmt: skip
    for line in found.splits:
        assert line.n_rows == (split_of == line.split).sum()
        for pairs, counted in ((exact, line.exact), (near, line.near)):
            both = [pair for pair in pairs if {*split_of[list(pair)]} == {line.split, line.among}]
            if line.split == line.among:
                both = [pair for pair in both if split_of[pair[0]] == split_of[pair[1]]]
            rows = {row for i, j in both for row, other in ((i, j), (j, i))
                    if (split_of[row], split_of[other]) == (line.split, line.among)}  # fmt: skip
            differ = [(targets[i] != targets[j]).any() and max(i, j) < 52 for i, j in both]  # later rows have no labels
            assert (counted.rows, counted.pairs, counted.other_labels) == (len(rows), len(both), sum(differ))
    assert sum(line.near.other_labels for line in found.splits) > 0


def test_the_pairs_as_csv(copied, tmp_path):
    found = find_duplicates(copied, device="cpu")
    write_pairs(found, copied, tmp_path / "pairs.csv")
    lines = list(csv.DictReader((tmp_path / "pairs.csv").read_text().splitlines()))
    assert len(lines) == len(found.exact) + len(found.near)
    assert lines[0] == {
        "id": "row21", "split": "train", "copy_of": "row1", "copy_of_split": "train", "kind": "exact",
        "cosine": "1.0000", "other_labels": "no",
    }  # fmt: skip
    last = lines[-1]
    i, j = found.near[-1]
    assert (last["id"], last["copy_of"], last["kind"]) == (f"row{j}", f"row{i}", "near")
    assert float(last["cosine"]) == pytest.approx(found.cosines[-1], abs=1e-4)


def test_all_are_counted_and_the_first_are_kept(copied, monkeypatch):
    whole = find_duplicates(copied, limit=0.3, device="cpu")
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    found = find_duplicates(copied, limit=0.3, device="cpu")
    assert len(found.exact) == len(found.near) == len(found.cosines) == 5
    assert found.splits == whole.splits


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_equal_codes(seed):
    codes = np.random.default_rng(seed).integers(-2, 6, 80)
    expected = [(i, j) for i, j in itertools.combinations(range(80), 2) if codes[i] == codes[j] >= 0]
    found = [pair for first, second in equal_pairs(codes) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert sorted(found) == expected
    assert not list(equal_pairs(np.full(5, -1)))


def test_a_store_without_digests_has_no_exact_pairs(copied):
    store = set_digests(copied, [""] * N)
    assert (store.content == -1).all()
    assert not len(find_duplicates(store, device="cpu").exact)


def test_features_of_zeros_are_near_nothing(make_store):
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    x[20:] = -x[:20]  # so that the mean is 0
    x[5], x[6], x[25], x[26] = x[4], 0, x[24], 0
    store = make_store({"text": x}, np.eye(2, dtype=np.int8)[np.arange(40) % 2], ["train"] * 40)
    found = find_duplicates(store, limit=1.0, device="cpu")
    assert found.near.tolist() == [[4, 5], [24, 25]]
    assert found.cosines.tolist() == pytest.approx([1.0, 1.0])


def test_classes_and_a_row_without_one(make_store):
    x = np.repeat(np.random.default_rng(0).normal(size=(20, 16)).astype(np.float16), 2, axis=0)
    kinds = np.array([0, 0, 1, 2, -1, 1, *[0] * 34], np.int32)
    store = make_store({"text": x}, kinds, ["train"] * 40, task="multiclass")
    (line,) = find_duplicates(store, device="cpu").splits
    assert (line.near.rows, line.near.pairs, line.near.other_labels) == (40, 20, 1)


def test_an_encoder_by_its_name(copied):
    assert find_duplicates(copied, encoders=["toy"], device="cpu").encoders == {"image": "toy", "text": "toy"}
    with pytest.raises((ConfigError, UnknownNameError), match=naming("clip toy")):
        find_duplicates(copied, encoders=["clip"])


@pytest.mark.parametrize("limit", [0, -1, 1.5, float("nan")])
def test_a_cosine_out_of_range(copied, limit):
    with pytest.raises(ConfigError, match=naming("cosine 0 1")):
        find_duplicates(copied, limit=limit)


def test_samples_that_share_an_image(shapes, store_path, toy, tools):
    numbers = [i // 2 for i in range(80)]
    images = [tools.FakeImage(i) for i in numbers]
    texts = [("the same",) if i < 4 else (f"question {i}: {'why' * i}",) for i in range(80)]
    extract(tools.make_dataset(shapes, images=images, texts=texts, shared=True), ["toy"], store_path, device="cpu")
    store = FeatureStore(store_path)
    found = find_duplicates(store, device="cpu")
    assert as_set(found.exact) == {(0, 1), (2, 3)}
    by_image = {"image": store.open_features("toy", "image")}
    pairs = {
        pair for (i, j), _ in near_pairs(store, by_image, 0.9999) for pair in zip(i.tolist(), j.tolist(), strict=True)
    }
    assert {(2 * i, 2 * i + 1) for i in range(40)} <= pairs


def test_samples_with_several_texts_each(shapes, store_path, toy, tools):
    images = [tools.FakeImage(i) for i in range(80)]
    extract(tools.make_dataset(shapes, images=images, texts=[("a", "b")] * 80), ["toy"], store_path, device="cpu")
    store = FeatureStore(store_path)
    assert find_duplicates(store, device="cpu").encoders == {"image": "toy"}
    texts = {"text": select_features(store)["text"]}
    with pytest.raises(ConfigError, match=naming("several texts")):
        duplicates.first_features(texts)


TOGETHER = TrainConfig(head="linear", epochs=2, folds=4, duplicates="together", thresholds="none")


@pytest.mark.parametrize("named", [False, True])
def test_duplicates_and_groups_are_kept_together(copied, named):
    data = open_training_data(copied, device="cpu")
    data = replace(data, groups=np.arange(N) // 2 + 7) if named else data
    exact, near = one_by_one(copied, 0.95)
    links = [*exact, *near, *([(i, i + 1) for i in range(0, N, 2)] if named else [])]
    expected = list(range(N))
    for _ in range(N):  # each row takes the least number of those that it is linked to, until nothing changes
        for i, j in links:
            expected[i] = expected[j] = min(expected[i], expected[j])
    groups = keep_together(data, TOGETHER).groups
    numbers = {}
    assert groups.tolist() == [numbers.setdefault(row, len(numbers)) for row in expected]
    assert keep_together(data, replace(TOGETHER, duplicates="anywhere")) is data


def test_folds_never_part_duplicates(copied, caplog):
    exact, near = one_by_one(copied, 0.95)
    parted = {}
    for duplicates_are in ("anywhere", "together"):
        caplog.clear()
        held_out = train_head(copied, replace(TOGETHER, duplicates=duplicates_are), device="cpu").held_out
        part_of = dict(zip(held_out.rows.tolist(), held_out.parts.tolist(), strict=True))
        parted[duplicates_are] = [
            pair for pair in (*exact, *near) if {*pair} <= part_of.keys() and len({part_of[row] for row in pair}) > 1
        ]
        copies = {row for pair in parted[duplicates_are] if pair in exact for row in pair}
        notes = [record.getMessage() for record in caplog.records if "copies" in record.getMessage()]
        assert len(notes) == bool(copies)
        assert not copies or says(notes[0], f"{len(copies)} of 48 rows other folds --duplicates together")
    assert parted["anywhere"]
    assert not parted["together"]


def test_copies_in_val_are_said_once(copied, caplog):
    """Of val, rows 30 to 47, none is a copy of train; then three are, and one has no content."""
    quick = replace(TOGETHER, folds=0, duplicates="anywhere")
    train_head(copied, quick, device="cpu")
    assert "copies" not in caplog.text
    digests = copied.digests.copy()
    digests[[31, 32, 41, 59]] = digests[[0, 1, 2, 0]]
    digests[20] = digests[33]  # row 20 has no image and no text
    store = set_digests(copied, digests)
    run = train_head(store, quick, device="cpu")
    (note,) = [record.getMessage() for record in caplog.records if "copies" in record.getMessage()]
    assert says(note, "3 of 18 val rows copies training rows inspect --duplicates")
    assert evaluate(run, store, n_resamples=0).caution == note
    assert "copies" not in evaluate(run, store, "train", n_resamples=0).caution


def test_copies_in_folds_are_said_by_evaluate(copied):
    run = train_head(copied, replace(TOGETHER, duplicates="anywhere"), device="cpu")
    parts, rows = run.held_out.parts, run.held_out.rows
    content = copied.content[rows]
    n = sum(
        any(content[j] == content[i] >= 0 and parts[j] != parts[i] for j in range(len(rows))) for i in range(len(rows))
    )
    assert n
    assert says(evaluate(run, copied, n_resamples=0).caution, f"{n} of 48 rows")
    run = train_head(copied, TOGETHER, device="cpu")
    assert evaluate(run, copied, n_resamples=0).caution is None


def test_copies_in_another_split(copied):
    """Test rows are labelled now: row 50 is a copy of row 1, rows 54 and 55 of row 6."""
    targets = copied.targets.copy()
    targets[52:] = 1
    array = zarr.open_array(copied.path / "samples/target", mode="r+", zarr_format=3)
    array[:] = targets
    array.update_attributes({"checksum": column_checksum(targets)})
    store = FeatureStore(copied.path)
    run = train_head(store, replace(TOGETHER, folds=0, duplicates="anywhere"), device="cpu")
    assert says(evaluate(run, store, "test", n_resamples=0).caution, "3 of 12 test rows copies training rows")


def test_together_is_for_folds():
    with pytest.raises(ConfigError, match=naming("duplicates together folds 5")):
        replace(TOGETHER, folds=0)


@pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="needs CACHEFUSE_REAL_DATA")
def test_real_tweets(tmp_path):
    root = Path(os.environ["CACHEFUSE_REAL_DATA"]) / "data/tweets"
    manifest = """
name = "tweets"
task = "multilabel"

[reader]
kind = "table"
files = { train = "train.csv" }
id = "id"
text = "text"
labels = "labels"
separator = ";"
"""
    extract(load_dataset(parse_manifest(manifest, "tweets.toml"), root), ["classic"], tmp_path / "t.zarr", device="cpu")
    found = find_duplicates(FeatureStore(tmp_path / "t.zarr"), device="cpu")
    with (root / "train.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(found.exact) == sum(n * (n - 1) // 2 for n in Counter(texts).values())
    assert all(texts[i] == texts[j] for i, j in found.exact)
    words = [{*texts[i].lower().split()} & {*texts[j].lower().split()} for i, j in found.near]
    assert found.near.size
    assert all(words)
