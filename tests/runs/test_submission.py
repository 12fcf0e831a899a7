import csv
import json

import numpy as np
import pytest

from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError, DataError, SubmissionError
from cachefuse.runs.predict import Predictions
from cachefuse.runs.submission import write_submission
from fixtures.messages import naming

CLASSES = ("cat", "dog", "owl")


def manifest(extra="", task="multilabel"):
    return parse_manifest(f'name = "a"\ntask = "{task}"\nreader = {{ kind = "shapes" }}\n{extra}', "a.toml")


def predictions(labels, ids=None, classes=CLASSES):
    labels = np.array(labels, bool)
    return Predictions(ids or [f"r{i}" for i in range(len(labels))], classes, labels.astype(np.float32), labels)


@pytest.fixture
def three():
    return predictions([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


def test_writes_labels_in_class_order(three, tmp_path):
    path = write_submission(three, manifest(), tmp_path / "s.csv")
    assert path.read_bytes() == b"id,labels\nr0,cat owl\nr1,dog\nr2,\n"


def test_writes_the_manifests_columns_and_separator(three, tmp_path):
    shape = '[submission]\nid = "ImageID"\nlabels = "Tags, all"\nseparator = "|"'
    path = write_submission(three, manifest(shape), tmp_path / "s.csv")
    assert path.read_text() == 'ImageID,"Tags, all"\nr0,cat|owl\nr1,dog\nr2,\n'


@pytest.mark.parametrize(("ids", "written"), [(["7", "10"], [7, 10]), (["007", "7"], ["007", "7"])])
def test_json_has_numbers_where_all_ids_are(ids, written, tmp_path):
    path = write_submission(predictions([[1, 0, 0], [0, 1, 1]], ids), manifest(), tmp_path / "s.json")
    labels = ["cat", "dog owl"]
    assert json.loads(path.read_text()) == [{"id": i, "labels": x} for i, x in zip(written, labels, strict=True)]


def test_quotes_ids_that_need_it(tmp_path):
    ids = ["a,b", 'say "hi"', "line\nbreak", "naïve"]
    path = write_submission(predictions([[1, 0, 0]] * 4, ids), manifest(), tmp_path / "s.csv")
    with path.open(encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["id", *ids]


def test_refuses_an_id_twice(tmp_path):
    with pytest.raises(SubmissionError, match=naming("x")):
        write_submission(predictions([[1, 0, 0]] * 2, ["x", "x"]), manifest(), tmp_path / "s.csv")


@pytest.mark.parametrize("shape", [{"extra": "min_labels = 1"}, {"task": "multiclass"}])
def test_refuses_a_row_with_too_few_labels(shape, three, tmp_path):
    with pytest.raises(SubmissionError, match=naming("r2 0 1")):
        write_submission(three, manifest(**shape), tmp_path / "s.csv")
    assert not list(tmp_path.iterdir())


def test_refuses_a_class_that_the_separator_would_cut(tmp_path):
    spaced = predictions([[1, 0]], classes=("ice cream", "pie"))
    with pytest.raises(SubmissionError, match="ice cream"):
        write_submission(spaced, manifest(), tmp_path / "s.csv")
    path = write_submission(spaced, manifest(task="multiclass"), tmp_path / "s.csv")
    assert path.read_text() == "id,labels\nr0,ice cream\n"


def test_keeps_the_order_of_the_sample(three, tmp_path):
    sample = tmp_path / "sample.csv"
    sample.write_text("id,labels\nr2,cat\nr0,cat\nr1,cat\n")
    path = write_submission(three, manifest(), tmp_path / "s.csv", sample)
    assert path.read_text() == "id,labels\nr2,\nr0,cat owl\nr1,dog\n"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            "id,tags\nr0,\nr1,\nr2,\n",
            "sample.csv tags labels",
        ),
        ("labels,id\n,r0\n,r1\n,r2\n", "sample.csv labels id"),
        ("id,labels\nr0,\nr1,\n", "sample.csv ids 1 r2"),
        ("id,labels\nr0,\nr1,\nr2,\nr9,\n", "sample.csv ids 1 r9"),
        ("id,labels\nr0,\nr1,\nr2,\nr2,\n", "sample.csv 1 r2"),
    ],
)
def test_refuses_a_sample_of_other_rows(sample, message, three, tmp_path):
    (tmp_path / "sample.csv").write_text(sample)
    with pytest.raises(SubmissionError, match=naming(message)):
        write_submission(three, manifest(), tmp_path / "s.csv", tmp_path / "sample.csv")
    assert not (tmp_path / "s.csv").exists()


def test_refuses_a_sample_that_is_not_there_or_no_table(three, tmp_path):
    with pytest.raises(SubmissionError, match=naming("sample.csv")):
        write_submission(three, manifest(), tmp_path / "s.csv", tmp_path / "sample.csv")
    (tmp_path / "sample.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=naming(".xlsx")):
        write_submission(three, manifest(), tmp_path / "s.csv", tmp_path / "sample.xlsx")


def test_refuses_a_place_it_can_not_write(three, tmp_path):
    with pytest.raises(ConfigError, match="folder"):
        write_submission(three, manifest(), tmp_path / "nowhere" / "s.csv")
    with pytest.raises(ConfigError, match="folder"):
        write_submission(three, manifest(), tmp_path)


def test_a_failure_leaves_the_former_submission_whole(three, tmp_path, monkeypatch):
    path = write_submission(three, manifest(), tmp_path / "s.csv")
    former = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_submission(predictions([[1, 1, 1]]), manifest(), path)
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]
