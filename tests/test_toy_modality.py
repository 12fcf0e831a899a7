"""A modality that cachefuse does not know, a list of numbers a sample, passes through all of it, by each of its doors.

A package adds what it needs: an encoder. A table's manifest names its column, or a Dataset is made in Python.
"""

import csv
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cachefuse
from cachefuse.alignment.retrieve import matched_texts
from cachefuse.encoders import FAMILIES
from cachefuse.errors import DataError
from cachefuse.experiments.compare import compare
from cachefuse.report.alignment_page import alignment_html
from cachefuse.report.gallery import lines_of
from cachefuse.report.matches_page import matches_html
from cachefuse.report.run_page import report_html
from fixtures.messages import naming

PACKAGE = '''
import numpy as np

from cachefuse.encoders import Family
from cachefuse.encoders.base import Tower


class Scaled(Tower):
    """Numbers as they are, as float32."""

    width, views = 4, ("pooled",)
    provenance = {"family": "scaled", "version": "1"}

    def __init__(self, modality):
        self.modality = modality

    def prepare(self, sample):
        return np.array(sample, np.float32)

    def encode(self, batch, views):
        return {"pooled": np.stack(batch)}


def open_scaled(spec, device):
    return {spec.model: Scaled(spec.model)}


SCALED = Family("toy_numbers:open_scaled", "scaled:numbers", "any", "lists of four numbers")
'''
MANIFEST = """
name = "toy"
task = "multiclass"

[reader]
kind = "table"
files = { train = "train.jsonl", val = "val.jsonl", test = "test.jsonl" }
id = "key"
text = "words"
labels = "label"
modalities = { NAME = "values" }
"""
NAMES = ("numbers", "user_ids", "report_tokens", "values")  # as names of views end; as torch calls a method


def rows(n, seed, labelled=True):
    rng = np.random.default_rng(seed)
    for i in range(n):
        label = i % 2
        values = None if i == 5 else (rng.normal(size=4) + 3 * label).round(3).tolist()
        words = f"a {'red' if label else 'blue'} thing {i}"
        yield {"key": f"{seed}-{i}", "values": values, "words": words} | ({"label": "ab"[label]} if labelled else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A package as pip lays it down, beside a dataset for each name of the modality."""
    root = tmp_path_factory.mktemp("toy")
    (root / "toy_numbers.py").write_text(PACKAGE)
    about = root / "toy_numbers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-numbers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[cachefuse.encoders]\nscaled = toy_numbers:SCALED\n")
    for name in NAMES:
        (root / f"{name}.toml").write_text(MANIFEST.replace("NAME", name))
    for seed, (split, n) in enumerate({"train": 80, "val": 30, "test": 20}.items()):
        lines = rows(n, seed, labelled=split != "test")
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return root


@pytest.fixture
def scaled(folder, monkeypatch):
    """The package's encoder in this process."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(FAMILIES, "scaled", importlib.import_module("toy_numbers").SCALED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.one_in(2)
def test_the_api_takes_it(folder, scaled, tmp_path, name):
    dataset = cachefuse.load_dataset(*cachefuse.load_manifest(str(folder / f"{name}.toml")))
    assert list(dataset.modalities) == ["text", name]
    report = cachefuse.extract(dataset, ["classic", f"scaled:{name}"], tmp_path / "toy.zarr", device="cpu")
    assert sorted((bad.id, bad.modality) for bad in report.bad) == [(f"{seed}-5", name) for seed in range(3)]
    store = cachefuse.FeatureStore(tmp_path / "toy.zarr")
    expected = [values.load() for (values,) in map(dataset.modalities[name].__getitem__, range(5))]
    assert np.allclose(store.open_features(f"scaled:{name}", name).rows()[:5], expected, rtol=1e-3)
    for fusion in ("sum", "concat", "gated"):
        run = cachefuse.train_head(store, cachefuse.TrainConfig(fusion=fusion, head="linear", epochs=20))
        assert run.modalities == tuple(sorted((name, "text")))
    stored = cachefuse.predict_split(run, store, "test")
    raw = cachefuse.predict_samples(run, cachefuse.read_input(folder / "test.jsonl", run), device="cpu")
    assert raw.ids == stored.ids
    np.testing.assert_allclose(raw.scores, stored.scores, rtol=1e-3)
    assert (stored.labels.argmax(1) == np.tile([0, 1], 10)).mean() >= 0.9
    assert name in report_html(run, store, dataset)
    assert lines_of(dataset, 0) == ("a blue thing 0", f"{name}: {expected[0]}")


def test_a_dataset_made_in_python(folder, scaled, tmp_path):
    manifest, root = cachefuse.load_manifest(str(folder / "numbers.toml"))
    read = cachefuse.load_dataset(manifest, root)
    values = np.random.default_rng(0).normal(size=(len(read), 4)) + read.targets[:, None]
    columns = {"numbers": cachefuse.Column.values(list(values))}
    dataset = cachefuse.Dataset(manifest, read.classes, read.ids, read.splits, read.targets, columns, name="made")
    cachefuse.extract(dataset, ["scaled:numbers"], tmp_path / "made.zarr", device="cpu")
    store = cachefuse.FeatureStore(tmp_path / "made.zarr")
    result = compare(store, folder=tmp_path / "compare", methods=("concat", "sum"), folds=2, epochs=2)
    assert [trial.diverged for setting in result.settings for trial in setting.trials] == ["", ""]


def test_it_is_aligned_with_texts(folder, scaled, tmp_path):
    dataset = cachefuse.load_dataset(*cachefuse.load_manifest(str(folder / "numbers.toml")))
    cachefuse.extract(dataset, ["classic", "scaled:numbers"], tmp_path / "toy.zarr", device="cpu")
    store = cachefuse.FeatureStore(tmp_path / "toy.zarr")
    run = cachefuse.align(store, cachefuse.AlignConfig(epochs=2, width=8, batch_size=16))
    assert {side.modality for side in run.sides} == {"numbers", "text"}
    run.save(tmp_path / "runs")
    found = cachefuse.retrieve(cachefuse.AlignedSpace(run), store, text="a red thing", k=3)
    assert found.modality == "numbers"
    shown = [dataset.modalities["numbers"][match.sample][0].name for match in found.matches]
    assert matched_texts(found, dataset) == shown
    assert all(text in matches_html(found, run.name, dataset) for text in shown)
    assert all(text in alignment_html(run, store, dataset, device="cpu") for text in ("numbers", "[", "a red thing"))


def test_a_file_without_its_column(folder, scaled, tmp_path):
    dataset = cachefuse.load_dataset(*cachefuse.load_manifest(str(folder / "numbers.toml")))
    cachefuse.extract(dataset, ["scaled:numbers"], tmp_path / "toy.zarr", device="cpu")
    run = cachefuse.train_head(cachefuse.FeatureStore(tmp_path / "toy.zarr"), cachefuse.TrainConfig(epochs=1))
    (tmp_path / "new.csv").write_text("key,words\n1,a red thing\n")
    with pytest.raises(DataError, match=naming("numbers key words")):
        cachefuse.read_input(tmp_path / "new.csv", run)


@pytest.mark.slow
def test_the_commands_take_it(folder, tmp_path):
    def run(*args):
        code = "from cachefuse_cli.app import main; main()"
        env = {**os.environ, "PYTHONPATH": str(folder), "CACHEFUSE_WORKSPACE": str(tmp_path / "workspace")}
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path, env=env
        )
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout

    manifest = str(folder / "numbers.toml")
    run("extract", "--dataset", manifest, "--encoder", "classic", "--encoder", "scaled:numbers")
    run("train-head", "--epochs", "20")
    run("evaluate", "--no-intervals")
    run("predict", "--split", "test")
    run("predict", "--input", str(folder / "test.jsonl"), "--output", "new.csv")
    with (tmp_path / "new.csv").open(newline="") as file:
        labels = [row["labels"] for row in csv.DictReader(file)]
    assert (np.array(labels) == np.tile(["a", "b"], 10)).mean() >= 0.9
    assert "concat" in run("compare", "--folds", "2", "--epochs", "2")
    run("report", "--output", "page.html")
    assert "numbers" in (tmp_path / "page.html").read_text()
