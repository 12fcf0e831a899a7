"""The groups of a manifest in a store: kept by extract, added to an older store, joined with shared inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cachefuse.extraction.extract import extract
from cachefuse.extraction.verify import verify
from cachefuse.runs.run import split_digest
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TrainingData, groups_of
from cachefuse.training.selection import load_table


def with_groups(dataset, names):
    return replace(dataset, groups=None if names is None else np.array(names, np.dtypes.StringDType()))


def run(dataset, store_path):
    return extract(dataset, ["toy"], store_path, device="cpu", batch_size=8)


@pytest.fixture
def names(shapes):
    return [f"product {i // 3}" if i % 7 else "" for i in range(len(shapes))]


def test_an_older_store_gains_groups_and_keeps_the_rest(shapes, names, store_path, toy, tools):
    run(shapes, store_path)
    older, before = FeatureStore(store_path), tools.files(store_path)
    assert older.groups is None
    assert groups_of(older) is None
    assert not any(run(with_groups(shapes, names), store_path).computed.values())
    newer, after = FeatureStore(store_path), tools.files(store_path)
    assert newer.groups.tolist() == names
    assert split_digest(newer) == split_digest(older)
    parts = "samples/digest", "samples/id", "features"
    assert all(after[name] == data for name, data in before.items() if str(name).startswith(parts))
    assert not verify(newer).damage
    run(with_groups(shapes, names), store_path)
    again = tools.files(store_path)
    assert again == {**after, **{name: again[name] for name in again if str(name) == "zarr.json"}}


def test_other_groups_replace_them(shapes, names, store_path, toy):
    run(with_groups(shapes, names), store_path)
    others = names[::-1]
    assert not any(run(with_groups(shapes, others), store_path).computed.values())
    assert FeatureStore(store_path).groups.tolist() == others
    run(shapes, store_path)
    assert FeatureStore(store_path).groups is None


def test_rows_without_a_group_are_alone(shapes, names, store_path, toy):
    run(with_groups(shapes, names), store_path)
    groups = groups_of(FeatureStore(store_path))
    for i, name in enumerate(names):
        same = {names[j] for j in np.flatnonzero(groups == groups[i])}
        assert same == {name}
        assert name or (groups == groups[i]).sum() == 1


def test_a_shared_input_and_a_group_join(shapes, store_path, toy, tools):
    """Rows 0 and 1 share an image, rows 1 and 2 a group: all three are one."""
    numbers = [0, 0, *range(1, 79)]
    images = [None if i == 79 else tools.FakeImage(i) for i in numbers]
    texts = [(f"question {i}",) for i in range(80)]
    dataset = tools.make_dataset(shapes, images=images, texts=texts, shared=True)
    run(with_groups(dataset, ["", "a", "a", *[""] * 76, "b"]), store_path)
    store = FeatureStore(store_path)
    groups = groups_of(store)
    assert groups.tolist() == [0, 0, 0, *range(1, 78)]
    data = TrainingData.of(store, load_table(store, {"text": [store.open_features("toy", "text")]}))
    rows = torch.arange(80)
    folds = data.folds(rows, 5, 0).numpy()
    assert len({*folds[:3]}) == 1
    assert {*folds} == {0, 1, 2, 3, 4}
    assert data.n_groups(rows) == 78
