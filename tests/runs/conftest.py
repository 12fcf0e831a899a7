import functools

import numpy as np
import pytest

from cachefuse.store.store import FeatureStore

SPLITS = ["train"] * 60 + ["val"] * 30 + ["dev"] * 20 + ["test"] * 10


N, CLASSES = len(SPLITS), 7


class Data:
    """Made-up features of 120 rows and the store that holds them; some rows lack a modality."""

    def __init__(self, make_store_in, path, task="multilabel", metrics=(), n=N):
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
        x = {modality: values[:n] for modality, values in self.x.items()}
        options = {"task": task, "metrics": metrics, "absent": lacks, "name": path.stem}
        self.store = FeatureStore(make_store_in(path.parent, x, targets[:n], SPLITS[:n], **options).path)

    def labelled(self, split):
        rows = np.flatnonzero(np.array(SPLITS) == split)
        return rows[rows != 85]


@pytest.fixture(scope="session")
def make_data(make_store_in):
    return functools.partial(Data, make_store_in)


@pytest.fixture(scope="session")
def data(make_data, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("evaluation") / "made.zarr")


@pytest.fixture(scope="session")
def multiclass(make_data, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("evaluation") / "made.zarr", "multiclass")
