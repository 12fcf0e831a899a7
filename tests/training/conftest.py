import functools
import shutil
from pathlib import Path

import numpy as np
import pytest

from cachefuse.data.dataset import Dataset, load_dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table, select_features

VOCABULARY = 11
SHAPES = """
name = "mine"
task = "multilabel"
min_labels = 1
reader = { kind = "shapes", train = 240, test = 60 }
splits = { val = { from = "train", fraction = 0.25 } }
"""


@pytest.fixture(scope="session")
def extracted(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "mine.zarr"
    extract(load_dataset(parse_manifest(SHAPES, "mine.toml"), Path()), ["classic"], path, device="cpu")
    return path


@pytest.fixture
def store(extracted, tmp_path):
    """A copy of the small shapes store that a test may spoil."""
    return FeatureStore(shutil.copytree(extracted, tmp_path / "mine.zarr"))


@pytest.fixture(scope="session")
def add_features():
    def add(store, encoder, modality, values, source=None, blocks=None, **others):
        """Write features (N, D) under a made-up encoder, only some blocks if given.

        ``others`` are tokens (N, T, D), or ragged a list, and ids, a list of (T_i,).
        """
        views = {"pooled": values, **{view: rows for view, rows in others.items() if rows is not None}}
        dtype = np.asarray(values).dtype.name
        dtypes = {view: "int32" if view == "ids" else dtype for view in views}
        provenance = {"dtype": dtype, "family": "made up"}
        features = store.require_features(encoder, modality, provenance, source or encoder, dtypes)
        for view, rows_of_view in views.items():
            ragged, vocabulary = isinstance(rows_of_view, list), VOCABULARY if view == "ids" else 0
            kind = {"ragged": ragged, "dtype": dtypes[view]}
            features.begin(features.new_view(view, rows_of_view[0].shape, **kind, vocabulary=vocabulary))
            with ViewWriter(features, view, **kind) as writer:
                for block in features.pending(view) if blocks is None else blocks:
                    rows = np.array(features.rows_of(view, block))
                    writer.add(rows, [rows_of_view[row] for row in rows])
        return features

    return add


@pytest.fixture(scope="session")
def make_store_in(add_features):
    def make(
        folder, features, targets, splits, *, task="multilabel", absent=None, metrics=(), name="made", others=None
    ):
        """A store of features {modality: (N, D)}, with ``absent`` {modality: rows}, and other views by modality."""
        absent = absent or {}
        n, n_classes = len(targets), targets.shape[1] if targets.ndim == 2 else targets.max(initial=0) + 1
        manifest = parse_manifest(
            f'name = "{name}"\ntask = "{task}"\nmetrics = {list(metrics)}\nreader = {{ kind = "shapes" }}', "made.toml"
        )
        images = [None if row in absent.get("image", ()) else FileImage(Path(f"{row}.png")) for row in range(n)]
        texts = [() if row in absent.get("text", ()) else (f"text {row}",) for row in range(n)]
        dataset = Dataset(
            manifest=manifest,
            classes=tuple(f"class {c}" for c in range(n_classes)),
            ids=[f"row{row}" for row in range(n)],
            splits=np.array(splits),
            targets=targets,
            images=images if "image" in features else None,
            texts=texts if "text" in features else None,
            name=name,
        )
        store = open_store(folder / f"{name}.zarr", dataset)
        for modality, values in features.items():
            add_features(store, "toy", modality, values, **(others or {}).get(modality, {}))
        return store

    return make


@pytest.fixture
def make_store(tmp_path, make_store_in):
    return functools.partial(make_store_in, tmp_path)


@pytest.fixture(scope="session")
def toy_store_in(make_store_in):
    def make(folder, task="multilabel", seed=0, **options):
        rng = np.random.default_rng(seed)
        x = {"image": rng.normal(size=(60, 6)).astype(np.float16), "text": rng.normal(size=(60, 5)).astype(np.float16)}
        signal = np.concatenate([x["image"], x["text"]], axis=1).astype(np.float32) @ rng.normal(size=(11, 3))
        targets = (signal > 0).astype(np.int8) if task == "multilabel" else signal.argmax(1).astype(np.int32)
        targets[52:] = -1
        lengths = [1 + row % 5 for row in range(60)]
        others = {
            "image": {"tokens": rng.normal(size=(60, 4, 3)).astype(np.float16)},
            "text": {
                "tokens": [rng.normal(size=(n, 2)).astype(np.float16) for n in lengths],
                "ids": [rng.integers(VOCABULARY, size=n).astype(np.int32) for n in lengths],
            },
        }
        splits = ["train"] * 40 + ["val"] * 12 + ["test"] * 8
        return make_store_in(folder, x, targets, splits, task=task, others=others, **options)

    return make


@pytest.fixture(scope="session")
def toy_stores():
    """The folders of toy stores that are there already, by what was asked for."""
    return {}


@pytest.fixture
def toy_store(toy_store_in, toy_stores, tmp_path, tmp_path_factory):
    """60 rows that a linear head can learn: 40 train, 12 val, 8 unlabelled test; made once, and copied."""

    def make(*args, name="made", **options):
        path, asked = tmp_path / f"{name}.zarr", repr((args, name, options))
        if path.exists():
            return toy_store_in(tmp_path, *args, name=name, **options)
        if asked not in toy_stores:
            folder = tmp_path_factory.mktemp("toy")
            toy_store_in(folder, *args, name=name, **options)
            toy_stores[asked] = folder / path.name
        return FeatureStore(shutil.copytree(toy_stores[asked], path))

    return make


@pytest.fixture(scope="session")
def cma():
    """A small fusion of tokens beside pooled features."""
    options = {"width": 8, "heads": 2, "depth": 1}
    return TrainConfig(fusion="cma", fusion_options=options, head="linear", epochs=2, batch_size=16)


@pytest.fixture
def token_store(toy_store):
    """The toy store, in which row 3 lacks the image, row 2 the text, and row 41 both."""
    return toy_store(absent={"image": {3, 41}, "text": {2, 41}})


@pytest.fixture
def table(token_store, cma):
    """What a fusion of tokens reads of that store."""
    return load_table(token_store, select_features(token_store, views=cma.views), cma.views)


@pytest.fixture
def folder(tmp_path):
    """Where a sweep keeps its trials."""
    return tmp_path / "sweeps" / "one"
