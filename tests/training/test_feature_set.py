import pickle
import shutil

import numpy as np
import pytest
import torch

import cachefuse
from cachefuse.errors import CacheError, ConfigError, DataError, UnknownNameError
from cachefuse.store.store import FeatureStore
from cachefuse.training.feature_set import FeatureSet, FeatureView, PickedRows, open_features
from cachefuse.training.feature_table import LOAD_ROWS
from fixtures.messages import naming


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(20, 3)).astype(np.float16), "text": rng.normal(size=(20, 2))}


@pytest.fixture
def view(arrays):
    return FeatureView.from_arrays(arrays)


def same(view, arrays, rows):
    """Whether a view holds some rows of arrays, to the bit."""
    return dict(view).keys() == arrays.keys() and all(
        np.array_equal(view[m], x[rows], equal_nan=True) and view[m].dtype == x.dtype for m, x in arrays.items()
    )


KEYS = {
    "slice": slice(3, 9),
    "backwards": slice(None, None, -2),
    "mask": np.arange(20) % 3 == 0,
    "numbers": np.array([4, -1, 4, 0]),
    "list": [7, 3],
    "none": [],
    "as scikit-learn does": (np.array([5, 6]), ...),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_rows_are_picked_as_from_an_array(view, arrays, key):
    picked, rows = view[key], np.arange(20)[key]
    assert same(picked, arrays, rows)
    assert len(picked) == picked.shape[0] == len(rows)
    assert picked.rows.tolist() == rows.tolist()
    assert picked.table is view.table  # nothing was copied


def test_one_row_is_a_view_of_one(view, arrays):
    assert same(view[-1], arrays, [19])


def test_a_view_of_a_view_counts_from_its_own_rows(view, arrays):
    assert same(view[5:15][[0, 9, -1]][1:], arrays, [14, 14])


def test_is_like_a_dictionary_and_like_one_array(view, arrays):
    assert view.shape == (20, 5)
    assert list(view) == list(view.keys()) == ["image", "text"]
    assert "image" in view
    assert "audio" not in view
    assert np.array_equal(np.asarray(view), np.concatenate([arrays["image"], arrays["text"]], axis=1))
    assert np.asarray(view[2:4], dtype=np.float32).dtype == np.float32
    assert repr(view) == "FeatureView of 20 rows: image (3), text (2)"


def test_what_it_gives_out_is_a_copy(view, arrays):
    before = arrays["image"].copy()
    view["image"][:] = 0
    assert np.array_equal(view["image"], before)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("imgae", UnknownNameError, "imgae image"),
        (20, IndexError, "20"),
        ((slice(None), 0), IndexError, "indices"),
        (np.ones(3, bool), IndexError, "boolean index"),
        (np.zeros((2, 2), int), IndexError, "numbers mask slice"),
    ],
)
def test_refuses_what_is_no_row_and_no_modality(view, key, error, message):
    with pytest.raises(error, match=naming(message)):
        view[key]


def test_a_row_of_nan_is_absent(arrays):
    arrays["text"][3] = np.nan
    view = FeatureView.from_arrays(arrays)
    assert same(view[2:5], arrays, slice(2, 5))
    table = view[2:5].to_table(torch.zeros(3, 1), np.array(["train"] * 3))
    assert table.present["text"].tolist() == [True, False, True]
    assert table.present["image"].tolist() == [True] * 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_any_other_nan_or_infinity(arrays, value):
    arrays["text"][7, 1] = value
    with pytest.raises(DataError, match=naming("text NaN infinity 7")):
        FeatureView.from_arrays(arrays)


def test_a_row_of_infinity_is_not_absent(arrays):
    arrays["image"][0] = np.inf
    with pytest.raises(DataError, match="image"):
        FeatureView.from_arrays(arrays)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda x: x.astype(">f4"), np.float32),
        (lambda x: x.astype(np.longdouble), np.float32),
        (lambda x: (10 * x).astype(np.int64), np.float32),
        (lambda x: x > 0, np.float32),
        (np.asfortranarray, np.float64),
        (lambda x: x[:, ::-1], np.float64),
        (lambda x: np.broadcast_to(x[:1], x.shape), np.float64),
        (torch.from_numpy, np.float64),
        (list, np.float64),
    ],
)
def test_takes_numbers_of_any_layout(arrays, make, dtype):
    x = make(arrays["text"])
    view = FeatureView.from_arrays({"text": x})
    assert view["text"].dtype == dtype
    assert np.array_equal(view["text"], np.asarray(x).astype(dtype))


def test_shares_the_memory_that_torch_can_write_to(arrays):
    x = arrays["text"]
    assert np.shares_memory(FeatureView.from_arrays(arrays).table.features["text"].numpy(), x)
    x.flags.writeable = False  # as joblib's memory maps are, of which torch would warn
    assert not np.shares_memory(FeatureView.from_arrays(arrays).table.features["text"].numpy(), x)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "none"),
        ({"a": np.ones((3, 2)), "b": np.ones((2, 2))}, "a 3 b 2"),
        ({"a": np.ones(3)}, "a float64 3"),
        ({"a": np.ones((3, 0))}, "float64 3 0"),
        ({"a": np.full((3, 1), "x")}, "<U1 3 1"),
        ({"a": np.full((3, 1), 1j)}, "complex128 3 1"),
        ({0: np.ones((3, 1))}, "modality 0 image"),
        ({"": np.ones((3, 1))}, "modality ''"),
        ({"a.b": np.ones((3, 1))}, "modality a.b"),
    ],
)
def test_refuses_what_is_no_features(features, message):
    with pytest.raises(DataError, match=naming(message)):
        FeatureView.from_arrays(features)


def test_picked_rows_are_as_columns_are():
    x = torch.arange(2 * LOAD_ROWS + 10, dtype=torch.float16)[:, None]
    rows = torch.tensor([5, 5, 2, len(x) - 1]).repeat(LOAD_ROWS)
    picked = PickedRows(x, rows)
    assert picked.shape == (4 * LOAD_ROWS, 1)
    assert picked.nbytes == x[rows].nbytes
    assert torch.equal(picked.index_select(0, torch.tensor([3, 0])), x[[len(x) - 1, 5]])
    assert picked.to("cpu") is picked
    moved = picked.to("meta")
    assert (moved.shape, moved.device.type) == (picked.shape, "meta")


def test_a_split_is_its_labelled_rows(toy_store):
    store = toy_store(absent={"text": {2, 41}})
    features = FeatureSet(store)
    assert features.splits == ["train", "val", "test"]
    assert features.classes == ("class 0", "class 1", "class 2")
    assert tuple(features.modalities) == ("image", "text")
    x, y = features.split("train")
    assert (x.shape, y.shape, y.dtype) == ((40, 11), (40, 3), np.int8)
    assert np.array_equal(y, store.targets[:40])
    stored = store.open_features("toy", "image").read()
    assert np.array_equal(x["image"], stored[:40])
    assert np.isnan(x["text"]).all(axis=1).nonzero()[0].tolist() == [2]
    both, y = features.split("val", "train")
    assert both.rows.tolist() == list(range(52))  # in the store's order
    assert np.array_equal(y, store.targets[:52])
    assert repr(features) == "FeatureSet of made: image (6), text (5); splits train (40), val (12), test (8); 3 classes"


def test_multi_class_targets_are_class_numbers(toy_store):
    store = toy_store(task="multiclass")
    _, y = FeatureSet(store).split("val")
    assert y.tolist() == store.targets[40:52].tolist()
    assert y.dtype == np.int32


def test_rows_without_labels_are_there_too(toy_store):
    features = FeatureSet(toy_store())
    assert features.rows("test").rows.tolist() == list(range(52, 60))
    with pytest.raises(DataError, match=naming("made test rows")):
        features.split("test")


def test_unlabelled_rows_among_others_are_left_out(make_store):
    targets = np.array([[0, 1], [-1, -1], [1, 1]], np.int8)
    store = make_store({"image": np.ones((3, 2), np.float16)}, targets, ["train"] * 3)
    x, y = FeatureSet(store).split("train")
    assert x.rows.tolist() == [0, 2]
    assert y.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("call", ["split", "rows"])
def test_an_unknown_split(toy_store, call):
    with pytest.raises(UnknownNameError, match=naming("trian train test val")):
        getattr(FeatureSet(toy_store()), call)("val", "trian")


def test_encoders_are_chosen_as_elsewhere(store, add_features):
    add_features(store, "hf:bert", "text", np.ones((len(store), 4), np.float16))
    classic = FeatureSet(store, ["classic"])
    assert FeatureSet(store).split("train")[0].shape[1] == classic.split("train")[0].shape[1] + 4
    assert FeatureSet(store, ["bert"]).modalities == ("text",)
    with pytest.raises(ConfigError, match="nope"):
        FeatureSet(store, ["nope"])


def test_open_features_finds_the_workspace(extracted, tmp_path, monkeypatch):
    for folder in ("workspace", "other"):
        shutil.copytree(extracted, tmp_path / folder / "cache" / "mine.zarr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHEFUSE_WORKSPACE", raising=False)

    def where(**options):
        return open_features("mine", **options).store.path.resolve().relative_to(tmp_path).parts[0]

    assert where() == "workspace"
    monkeypatch.setenv("CACHEFUSE_WORKSPACE", str(tmp_path / "other"))
    assert where() == "other"
    assert where(workspace="workspace") == where(workspace=tmp_path / "workspace") == "workspace"
    assert cachefuse.open_features("mine", encoders=["classic"]).modalities == ("image", "text")
    with pytest.raises(CacheError, match=naming("yours.zarr extract")):
        open_features("yours")


def test_a_view_of_a_store_goes_to_another_process_as_its_rows(extracted):
    whole = FeatureSet(FeatureStore(extracted)).rows("val")
    few = pickle.loads(pickle.dumps(whole[::5]))
    assert same(few, dict(whole), np.arange(len(whole))[::5])
    assert len(pickle.dumps(whole[:1])) < len(pickle.dumps(whole)) / 10
