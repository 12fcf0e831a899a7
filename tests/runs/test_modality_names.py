"""Modalities whose names end as those of views do, from a manifest to predictions of raw samples."""

from typing import ClassVar

import numpy as np
import pytest

from cachefuse.data.column import Column
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers import READERS
from cachefuse.data.readers.base import Reader, Samples
from cachefuse.encoders import FAMILIES, Family
from cachefuse.encoders.base import Tower
from cachefuse.extraction.extract import extract
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.predict import predict_samples, predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig

NAMES = ("user", "user_ids", "report_tokens")
MANIFEST = """
name = "odd"
task = "multiclass"
reader = { kind = "odd" }
"""
CMA = {"fusion": "cma", "fusion_options": {"depth": 1, "width": 8, "heads": 2}, "head": "linear"}


class OddReader(Reader):
    """40 samples with three numbers for each modality; the first says the label, and some lack the second modality."""

    def missing(self, root):
        return []

    def read(self, root):
        rng = np.random.default_rng(0)
        values = {m: [[float(i % 2), *rng.normal(size=2)] for i in range(40)] for m in NAMES}
        values["user_ids"][::5] = [None] * 8
        return Samples(
            ids=[str(i) for i in range(40)],
            splits=["test" if i % 4 == 0 else "val" if i % 4 == 1 else "train" for i in range(40)],
            labels=[(["no", "yes"][i % 2],) for i in range(40)],
            modalities={m: Column.values(x) for m, x in values.items()},
        )


class OddTower(Tower):
    """The numbers, and as two tokens they and their negatives."""

    width = 3
    provenance: ClassVar = {"family": "odd"}

    def __init__(self, modality):
        self.modality = modality

    def prepare(self, sample):
        return np.array(sample, np.float32)

    def encode(self, batch, views):
        x = np.stack(batch)
        return {view: x if view == "pooled" else np.stack([x, -x], axis=1) for view in views}


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "odd", OddReader)
    family = Family(lambda spec, device: {m: OddTower(m) for m in NAMES}, "odd", "any", "numbers as they are")
    monkeypatch.setitem(FAMILIES, "odd", family)
    dataset = load_dataset(parse_manifest(MANIFEST, "odd.toml"), tmp_path)
    extract(
        dataset, ["odd"], tmp_path / "odd.zarr", views=("pooled", "tokens"), dtype="float32", max_bad=1.0, device="cpu"
    )
    return FeatureStore(tmp_path / "odd.zarr")


@pytest.mark.parametrize("settings", [{"head": "linear"}, {"views": "tokens", "head": "gmlp"}, CMA], ids=str)
def test_a_run_reads_each_as_itself(settings, store, tmp_path):
    run = train_head(store, TrainConfig(**settings, epochs=2, modality_dropout=0.3))
    assert run.modalities == tuple(sorted(NAMES))
    again = load_run(save_run(run, tmp_path / "runs"))
    assert again.features == run.features
    stored = predict_split(again, store, "test")
    np.testing.assert_array_equal(stored.scores, predict_split(run, store, "test").scores)
    samples = OddReader().read(tmp_path)
    rows = np.flatnonzero(store.splits == "test").tolist()
    columns = {m: column.take(rows) for m, column in samples.modalities.items()}
    raw = Samples(ids=[samples.ids[i] for i in rows], modalities=columns)
    np.testing.assert_allclose(predict_samples(again, raw).scores, stored.scores, atol=1e-5)
    whole, less = evaluate(again, store, n_resamples=0), evaluate(again, store, without=["user_ids"], n_resamples=0)
    assert (whole.scores != less.scores).any()
