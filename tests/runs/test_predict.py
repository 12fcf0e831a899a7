import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr

from cachefuse.data.dataset import load_dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers.base import Samples
from cachefuse.encoders import open_encoder
from cachefuse.errors import BadSampleError, DataError, RunError
from cachefuse.extraction.extract import extract
from cachefuse.runs.predict import predict_samples, predict_split, read_input
from cachefuse.runs.run import split_digest
from cachefuse.runs.train import train_head
from cachefuse.store.columns import column_checksum
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

TABLE = """
name = "mine"
task = "multilabel"
[reader]
kind = "table"
files = { train = "train.csv" }
id = "Item"
image = "photos/{Item}.png"
text = "Caption"
labels = "Tags"
"""


@pytest.fixture(scope="session")
def dataset(mine):
    return load_dataset(parse_manifest(mine, "mine.toml"), Path())


@pytest.fixture(scope="session")
def extracted(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "mine.zarr"
    extract(dataset, ["classic"], path, device="cpu")
    return path


@pytest.fixture(scope="session")
def runs(extracted):
    config = TrainConfig(head="linear", epochs=3)
    return {
        fusion: train_head(FeatureStore(extracted), replace(config, fusion=fusion))
        for fusion in ("sum", "text", "image")
    }


@pytest.fixture
def store(extracted, tmp_path):
    return FeatureStore(shutil.copytree(extracted, tmp_path / "mine.zarr"))


@pytest.fixture
def run(runs):
    return runs["sum"]


def samples_of(dataset, rows, image=True, text=True):
    return Samples(
        ids=[dataset.ids[row] for row in rows],
        modalities={m: c.take(rows) for m, c in dataset.modalities.items() if {"image": image, "text": text}[m]},
    )


def test_predicts_the_unlabelled_rows_in_file_order(run, store):
    found = predict_split(run, store)
    assert found.ids == [f"{row:05d}" for row in range(120, 160)]
    assert found.scores.shape == found.labels.shape == (40, 11)
    assert found.labels.any(axis=1).all()  # min_labels
    assert found.names(0) == [found.classes[c] for c in np.flatnonzero(found.labels[0])]


def test_predicts_a_split_by_name(run, store):
    assert predict_split(run, store, "val").ids == [store.ids[row] for row in np.flatnonzero(store.splits == "val")]
    with pytest.raises(DataError, match=naming("mine dev test train val")):
        predict_split(run, store, "dev")


def test_says_that_samples_changed_but_not_that_some_were_appended(run, store, caplog):
    first = SimpleNamespace(ids=store.ids[:100], splits=store.splits[:100], digests=store.digests[:100])
    for digest in (run.split_digest, split_digest(first)):
        predict_split(replace(run, split_digest=digest), store)
    assert not caplog.messages
    changed = SimpleNamespace(ids=store.ids, splits=store.splits, digests=[*store.digests[:-1], "another"])
    predict_split(replace(run, split_digest=split_digest(changed)), store)
    (message,) = caplog.messages
    assert says(message, f"{store.dataset} changed {run.name} train again")


def relabel(store, targets):
    array = zarr.open_group(store.path, mode="a")["samples"]["target"]
    array[:] = targets
    array.attrs["checksum"] = column_checksum(targets)
    return FeatureStore(store.path)


def test_a_training_row_without_a_label_is_not_submitted(run, store):
    targets = store.targets.copy()
    targets[3] = -1
    assert predict_split(run, relabel(store, targets)).ids[0] == "00120"


def test_unlabelled_training_rows_are_predicted_where_no_split_is_unlabelled(run, store):
    targets = np.where(store.targets == -1, 0, store.targets)
    targets[3] = -1
    assert predict_split(run, relabel(store, targets)).ids == ["00003"]


def test_a_labelled_dataset_is_predicted_on_its_test_split(run, store):
    labelled = relabel(store, np.where(store.targets == -1, 0, store.targets))
    assert predict_split(run, labelled).ids == [f"{row:05d}" for row in range(120, 160)]
    labelled.splits[:] = "train"
    with pytest.raises(DataError, match=naming("mine test train")):
        predict_split(run, labelled)


def test_raw_samples_score_as_their_stored_features(run, store, dataset):
    rows = range(120, 160)
    raw, stored = predict_samples(run, samples_of(dataset, rows)), predict_split(run, store)
    assert raw.ids == stored.ids
    np.testing.assert_allclose(raw.scores, stored.scores, atol=1e-3)


def test_takes_one_modality_of_a_run_that_reads_two(run, dataset):
    whole, image, text = (
        predict_samples(run, samples_of(dataset, range(3), image=i, text=t)).scores for i, t in ((1, 1), (1, 0), (0, 1))
    )
    assert not np.allclose(whole, image)
    assert not np.allclose(image, text)


@pytest.mark.parametrize(("reads", "given"), [("text", "image"), ("image", "text")])
def test_refuses_samples_without_what_the_run_reads(reads, given, runs, dataset):
    samples = samples_of(dataset, range(2), image=given == "image", text=given == "text")
    with pytest.raises(DataError, match=naming(reads)):
        predict_samples(runs[reads], samples)


def test_opens_an_encoder_once(run, dataset, monkeypatch):
    import cachefuse.runs.predict as module

    opened, real = [], open_encoder
    monkeypatch.setattr(
        module, "open_encoder", lambda spec, *args, **known: opened.append(str(spec)) or real(spec, *args, **known)
    )
    predict_samples(run, samples_of(dataset, range(2)))
    assert opened == ["classic"]


def test_a_bad_sample_is_predicted_without_it_and_noted(run, dataset, tmp_path, caplog):
    samples = samples_of(dataset, range(3))
    images_of(samples)[1] = FileImage(tmp_path / "gone.png")
    texts_of(samples)[2] = ()
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        found = predict_samples(run, samples)
    assert says(caplog.text, "1 3 image")
    assert says(caplog.text, "gone.png")
    assert says(caplog.text, "1 3 text 00002")
    np.testing.assert_allclose(
        found.scores[1], predict_samples(run, samples_of(dataset, [1], image=False)).scores[0], atol=1e-6
    )
    with pytest.raises(BadSampleError, match=naming("gone.png")):
        predict_samples(run, samples, max_bad=0.0)


def test_refuses_an_encoder_that_is_not_the_trained_one(run, dataset):
    (member,) = run.members
    other = {"text": tuple(replace(used, key="0" * 32) for used in run.features["text"])}
    changed = replace(run, members=[replace(member, features=other)])
    with pytest.raises(RunError, match=naming("weights classic")):
        predict_samples(changed, samples_of(dataset, range(1)))


def test_reports_progress(run, dataset):
    seen = []
    predict_samples(run, samples_of(dataset, range(40)), on_progress=lambda *state: seen.append(state))
    assert seen == [("image", 32, 40), ("image", 40, 40), ("text", 32, 40), ("text", 40, 40)]


@pytest.fixture
def table_run(run):
    return replace(run, manifest=parse_manifest(TABLE, "mine.toml"))


def test_reads_new_rows_by_the_datasets_own_columns(table_run, tmp_path):
    (tmp_path / "new.csv").write_text("Item,Caption\na,an oak thing\nb,\n")
    samples = read_input(tmp_path / "new.csv", table_run)
    assert samples.ids == ["a", "b"]
    assert texts_of(samples) == [("an oak thing",), ()]
    assert [image.path for image in images_of(samples)] == [
        tmp_path / "photos" / "a.png",
        tmp_path / "photos" / "b.png",
    ]
    assert samples.labels == [None, None]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_reads_new_rows_by_plain_columns(suffix, table_run, tmp_path):
    content = {
        "csv": "id,image,text\na,x.png,an oak thing\n",
        "jsonl": '{"id": "a", "image": "x.png", "text": "an oak thing"}\n',
    }
    (tmp_path / f"new.{suffix}").write_text(content[suffix])
    samples = read_input(tmp_path / f"new.{suffix}", table_run)
    assert (samples.ids, texts_of(samples)) == (["a"], [("an oak thing",)])
    assert images_of(samples)[0].path == tmp_path / "x.png"


def test_rows_without_an_id_are_numbered(run, tmp_path):
    (tmp_path / "new.csv").write_text("text\none\ntwo\n")
    samples = read_input(tmp_path / "new.csv", run)
    assert (samples.ids, images_of(samples)) == (["0", "1"], None)


def test_notes_on_the_table_of_new_rows_are_logged(run, tmp_path, caplog):
    (tmp_path / "new.csv").write_bytes(b"text\ncaf\xe9\n")
    read_input(tmp_path / "new.csv", run)
    assert says(caplog.text, "new.csv 1 bytes UTF-8")


def test_refuses_a_table_without_image_or_text(run, tmp_path):
    (tmp_path / "new.csv").write_text("id,caption\na,b\n")
    with pytest.raises(DataError, match=naming("new.csv image text id caption")):
        read_input(tmp_path / "new.csv", run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("new.csv", "id,text\na,one\n,two\n", "new.csv: row 2 has an empty id"),
        ("new.jsonl", '{"id": null, "text": "one"}', "new.jsonl: row 1 has an empty id"),
        ("new.csv", "id,text\n", "new.csv: the raw data has no rows"),
    ],
)
def test_refuses_rows_without_an_id_as_extract_does(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"^{message}$"):
        read_input(tmp_path / name, run)


def test_refuses_a_table_that_is_not_there(run, tmp_path):
    with pytest.raises(DataError, match=naming("new.csv")):
        read_input(tmp_path / "new.csv", run)


def test_new_rows_may_not_name_files_outside_their_folder(run, tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "new.csv").write_text("image,text\n../secret.png,an oak thing\n")
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        predict_samples(run, read_input(folder / "new.csv", run))
    assert says(caplog.text, "secret.png")
