"""`cachefuse inspect --duplicates`, as it is typed."""

import csv
import json

import numpy as np
import pytest

from fixtures.messages import says

MANIFEST = """
name = "notes"
task = "multiclass"
[reader]
kind = "table"
files = { train = "train.csv", val = "val.csv" }
id = "id"
text = "text"
labels = "label"
"""


@pytest.fixture
def notes(folder, cachefuse):
    """40 notes to train on and 10 to validate on: v0 and v1 are copies, v0 with another label, and v2 nearly is one."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(300)]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(50)]
    train = [(f"t{i}", texts[i], "ab"[i % 2]) for i in range(40)]
    val = [(f"v{i}", texts[40 + i], "ab"[i % 2]) for i in range(10)]
    val[0], val[1] = ("v0", train[3][1], "a"), ("v1", train[5][1], "b")
    val[2] = ("v2", f"{train[8][1]} again", "a")
    for name, rows in (("train", train), ("val", val)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text", "label"), *rows])
    (folder / "notes.toml").write_text(MANIFEST)
    assert cachefuse("extract", "--dataset", "./notes.toml", "--encoder", "classic").code == 0
    return folder


def test_counts_in_a_table_and_as_json(notes, cachefuse, fits):
    result = cachefuse("inspect", "--duplicates", "--output", "pairs.csv")
    assert (result.code, result.err) == (0, "")
    fits(result.out)
    lines = [line.split() for line in result.out.splitlines()]
    assert ["val", "train", "exact", "2", "10", "20.0%", "2", "1"] in lines
    assert ["val", "train", "near", "1", "10", "10.0%", "1", "0"] in lines
    assert says(result.out, "classic (text) 0.95")
    found = json.loads(cachefuse("inspect", "--duplicates", "--json").out)
    assert (found["rows"], found["near"], found["encoders"]) == (50, 0.95, {"text": "classic"})
    (between,) = [line for line in found["splits"] if line["split"] != line["among"]]
    assert between == {
        "split": "val", "among": "train", "n_rows": 10,
        "exact": {"rows": 2, "pairs": 2, "other_labels": 1}, "near": {"rows": 1, "pairs": 1, "other_labels": 0},
    }  # fmt: skip
    written = list(csv.DictReader((notes / "pairs.csv").read_text().splitlines()))
    assert [(row["id"], row["copy_of"], row["kind"], row["other_labels"]) for row in written] == [
        ("v0", "t3", "exact", "yes"), ("v1", "t5", "exact", "no"), ("v2", "t8", "near", "no"),
    ]  # fmt: skip


def test_no_duplicates(workspace, cachefuse):
    assert cachefuse("inspect", "--duplicates", "--near", "1").out.splitlines()[-1] == "There are no duplicates."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--near", "0.9"], "--near --duplicates"),
        (["--output", "pairs.csv"], "--output --duplicates"),
        (["--encoder", "classic"], "--encoder --duplicates"),
        (["--duplicates", "--near", "2"], "cosine 0 1 2"),
        (["--duplicates", "--encoder", "clip"], "clip classic"),
        (["--duplicates", "--output", "gone/pairs.csv"], "gone"),
    ],
)
def test_says_in_one_line_what_is_wrong(workspace, cachefuse, args, message):
    result = cachefuse("inspect", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
