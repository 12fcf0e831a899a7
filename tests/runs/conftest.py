from pathlib import Path

import numpy as np
import pytest

from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.open_store import open_store
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter

SPLITS = ["train"] * 60 + ["val"] * 30 + ["dev"] * 20 + ["test"] * 10


N, CLASSES = len(SPLITS), 7


class Data:
    """Made-up features of 120 rows and the store that holds them; some rows lack a modality."""

    def __init__(self, path, task="multilabel", metrics=(), n=N):
        rng = np.random.default_rng(0)
        self.x = {
            "image": rng.normal(size=(N, 6)).astype(np.float16),
            "text": rng.normal(size=(N, 5)).astype(np.float16),
        }
        signal = np.concatenate([*self.x.values()], axis=1).astype(np.float32) @ rng.normal(size=(11, CLASSES))
        self.hot = (signal > 2) if task == "multilabel" else np.eye(CLASSES, dtype=bool)[signal.argmax(1)]
        targets = self.hot.astype(np.int8) if task == "multilabel" else signal.argmax(1).astype(np.int32)
        targets[110:] = targets[85] = -1
        lacks = {"image": (3, 62, 95), "text": (4, 63, 95)}
        manifest = parse_manifest(
            f'name = "made"\ntask = "{task}"\nmetrics = {list(metrics)}\nreader = {{ kind = "shapes" }}', "made.toml"
        )
        dataset = Dataset(
            manifest=manifest,
            classes=tuple(f"class {c}" for c in range(CLASSES)),
            ids=[f"row{row}" for row in range(n)],
            splits=np.array(SPLITS[:n]),
            targets=targets[:n],
            images=[None if row in lacks["image"] else FileImage(Path(f"{row}.png")) for row in range(n)],
            texts=[() if row in lacks["text"] else (f"text {row}",) for row in range(n)],
            name="made",
        )
        self.store = open_store(path, dataset)
        for modality, values in self.x.items():
            made_by = {"dtype": "float16", "family": "made up"}
            features = self.store.require_features("toy", modality, made_by, "toy", {"pooled": "float16"})
            features.begin(features.new_view("pooled", values.shape[1:], ragged=False, dtype="float16"))
            with ViewWriter(features, "pooled", ragged=False, dtype="float16") as writer:
                for block in features.pending("pooled"):
                    rows = np.array(features.rows_of("pooled", block))
                    writer.add(rows, list(values[rows]))
        self.store = FeatureStore(path)

    def labelled(self, split):
        rows = np.flatnonzero(np.array(SPLITS) == split)
        return rows[rows != 85]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("evaluation") / "made.zarr")


@pytest.fixture(scope="session")
def multiclass(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("evaluation") / "made.zarr", "multiclass")


@pytest.fixture(scope="session")
def make_data():
    return Data
