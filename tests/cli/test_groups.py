"""Groups of a manifest, from a csv file to folds and intervals, with the command line."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.runs.evaluate import evaluate, with_evaluation_metrics
from cachefuse.runs.files import find_run
from cachefuse.runs.save import load_run
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import open_training_data

MANIFEST = """
name = "notes"
task = "multilabel"

[reader]
kind = "table"
files = { train = "train.csv" }
id = "id"
text = "text"
labels = "labels"
separator = ";"
group = "author"
"""
WORDS = {"red": "roses and wine", "blue": "the sea and the sky", "green": "grass under trees"}


@pytest.fixture
def notes(folder):
    """300 notes by 100 authors and 12 without one; an author writes the same again and again."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(312):
        colours = [name for name in WORDS if rng.random() < 0.5] or ["red"]
        author = f"author {i // 3}" if i < 300 else " " * (i % 2)
        text = f"{author} says {' and '.join(WORDS[name] for name in colours)} {i % 7}"
        lines.append((i, text, ";".join(colours), author))
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "labels", "author"), *lines])
    (folder / "notes.toml").write_text(MANIFEST)
    return {str(i): author.strip() for i, _, _, author in lines}


def in_a_process(*args):
    command = [sys.executable, "-c", "from cachefuse_cli.app import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def authors_by_part(run, store, notes):
    """The authors of the rows in each part of what a run held out."""
    authors = [[notes[str(store.ids[row])] for row in run.held_out.rows[run.held_out.parts == part]]
               for part in np.unique(run.held_out.parts)]  # fmt: skip
    return [{name for name in part if name} for part in authors]


def test_folds_never_part_a_group(notes, folder, cachefuse):
    in_a_process("extract", "--dataset", "./notes.toml", "--encoder", "classic", "--json")
    store = FeatureStore(folder / "workspace/cache/notes.zarr")
    by_split = {split: {notes[str(i)] for i in store.ids[store.splits == split]} - {""} for split in ("train", "val")}
    assert by_split["val"]
    assert not by_split["train"] & by_split["val"]
    quick = ("--head", "linear", "--epochs", "2", "--json")
    in_a_process("train-head", "--folds", "4", *quick)
    cachefuse("train-head", *quick)  # its parts of val choose thresholds for each other
    for name, n_parts in (("notes-sum-linear-asl-1", 4), ("notes-sum-linear-asl-2", 5)):
        parts = authors_by_part(load_run(find_run(folder / "workspace/runs", name)), store, notes)
        assert len(parts) == n_parts
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    compared = json.loads(cachefuse("compare", "--methods", "sum,text", "--folds", "3", "--epochs", "1", "--json").out)
    assert (compared["comparison"]["rows"], compared["comparison"]["groups"]) == (312, 100 + 12)


def test_intervals_draw_a_group_whole(notes, folder, cachefuse):
    for command in (("extract", "--dataset", "./notes.toml", "--encoder", "classic"), ("train-head", "--epochs", "1")):
        assert cachefuse(*command).code == 0
    store = FeatureStore(folder / "workspace/cache/notes.zarr")
    found = evaluate(load_run(find_run(folder / "workspace/runs")), store, n_resamples=50)
    groups = [notes[i] or i for i in store.ids[found.rows]]
    data = with_evaluation_metrics(open_training_data(store))
    arrays, metrics = (
        (data.targets(torch.from_numpy(found.rows)), found.scores, found.predictions),
        data.bind(data.metrics),
    )
    assert found.intervals == bootstrap_intervals(
        *arrays, metrics, 50, groups=np.unique(groups, return_inverse=True)[1]
    )
    assert found.intervals != bootstrap_intervals(*arrays, metrics, 50)
