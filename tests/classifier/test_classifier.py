import inspect
import io
import random
from copy import copy
from dataclasses import fields, replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from cachefuse import FeatureSet, FeatureView, FusionClassifier
from cachefuse.data.dataset import load_dataset
from cachefuse.data.folds import stratified_folds
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.runs.predict import predict_split
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.feature_table import multi_hot
from cachefuse.training.held_out import HeldOut
from cachefuse.training.resolved import resolve

KINDS = np.array(["cat", "dog", "emu"])


QUICK = {"head": "linear", "optimizer": "lbfgs", "epochs": 2}  # trains in hundredths of a second


SHAPES = """
name = "{task}"
task = "{task}"
{more}
reader = {{ kind = "shapes", train = 120, test = 40 }}
"""


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # scikit-learn's, of a y of NaN
@parametrize_with_checks([FusionClassifier(**QUICK)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module", params=["multilabel", "multiclass"])
def store(request, tmp_path_factory):
    """A store whose val rows are those that the classifier holds out of train and val, for seed 3."""
    dataset = load_dataset(parse_manifest(SHAPES.format(task="multilabel", more="min_labels = 1"), "made.toml"), Path())
    if request.param == "multiclass":
        kinds = dataset.targets.argmax(axis=1).astype(np.int32) % 3
        manifest = parse_manifest(SHAPES.format(task="multiclass", more=""), "made.toml")
        dataset = replace(dataset, manifest=manifest, classes=tuple(KINDS), targets=kinds)
    labelled = np.flatnonzero(np.isin(dataset.splits, ("train", "val")))
    parts = stratified_folds(multi_hot(dataset.targets[labelled], len(dataset.classes)), 10, seed=3)
    splits = dataset.splits.copy()
    splits[labelled] = np.where(parts == 0, "val", "train")
    path = tmp_path_factory.mktemp("agrees") / "made.zarr"
    extract(replace(dataset, splits=splits), ["classic"], path, device="cpu")
    return FeatureStore(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 1, "epochs": 20, "lr": 0.01},
        {"members": 2},
        {"folds": 2},
        {"refit": True},
        {"head": "linear", "optimizer": "lbfgs", "scheme": "staged", "class_weights": "balanced"},
        {"fusion": "image", "ema": 0.9, "loss": "focal", "loss_options": {"reduction": "sum"}, "lr": 1e-5},
    ],
    ids=str,
)
@pytest.mark.one_in(4)
def test_trains_the_models_that_train_head_does(store, options):
    options = {"epochs": 3, "patience": 2, **options}
    run = train_head(store, TrainConfig(**options, seed=3))
    predicted = predict_split(run, store, "test")
    features = FeatureSet(store)
    x, y = features.split("train", "val")
    fitted = FusionClassifier(**options, min_labels=store.manifest.min_labels, random_state=3).fit(x, y)
    assert fitted.histories_ == run.histories
    assert fitted.thresholds_.tolist() == run.thresholds.tolist()
    np.testing.assert_allclose(fitted.predict_proba(features.rows("test")), predicted.scores, atol=1e-7)
    labels = fitted.predict(features.rows("test"))
    assert np.array_equal(labels, predicted.labels if y.ndim == 2 else predicted.labels.argmax(axis=1))


def test_where_nothing_is_chosen_every_row_is_trained_on(arrays, indicator):
    """L-BFGS finds the optimum, which is scikit-learn's."""
    indicator = np.random.default_rng(1).permutation(indicator)  # not separable
    settings = {"fusion": "concat", "head": "linear", "optimizer": "lbfgs", "thresholds": "none", "epochs": 30}
    settings["weight_decay"] = 0.0
    x = np.concatenate(list(arrays.values()), axis=1)
    scores = FusionClassifier(**settings, loss="bce").fit(arrays, indicator).predict_proba(arrays)
    for c in range(3):
        theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(x, indicator[:, c]).predict_proba(x)
        np.testing.assert_allclose(scores[:, c], theirs[:, 1], atol=1e-3)
    y = KINDS[np.random.default_rng(1).integers(3, size=60)]
    ours, theirs = FusionClassifier(**settings).fit(x, y), LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.fit(x, y).predict_proba(x), atol=1e-3)
    assert ours.predict(x).tolist() == theirs.predict(x).tolist()


def test_its_parameters_are_the_settings_of_a_training():
    parameters = inspect.signature(FusionClassifier).parameters
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    ours = {name: parameter.default for name, parameter in parameters.items()}
    assert ours.pop("min_labels") == 0
    assert ours.pop("device") == "auto"
    assert ours.pop("loss_options") is ours.pop("fusion_options") is ours.pop("shuffle") is None
    ours["seed"] = ours.pop("random_state")
    settings = {field.name: field.default for field in fields(TrainConfig)}
    apart = ("views", "duplicates", "loss_options", "fusion_options", "shuffle")
    assert ours == {name: value for name, value in settings.items() if name not in apart}


def test_parameters_are_kept_as_they_are_given(view, labels):
    given = {"layers": [8, 4], "loss": "ce", "loss_options": {"smoothing": 0.1}, "epochs": 2, "schedule": None}
    classifier = FusionClassifier(**given)
    assert {name: value for name, value in classifier.get_params().items() if name in given} == given
    twin = clone(classifier.fit(view, labels)).set_params(epochs=1, fusion="concat")
    assert (twin.layers, twin.loss_options, twin.epochs, twin.fusion) == ([8, 4], {"smoothing": 0.1}, 1, "concat")
    assert not hasattr(twin, "models_")
    assert classifier.config_ == resolve(TrainConfig(**{**given, "layers": (8, 4)}), "multiclass", 60)
    assert len(classifier.histories_[0].epochs) == 2


def test_values_of_numpy_and_of_the_command_line_are_settings_too(view, labels):
    spelled = {"layers": "8,4", "batch_size": "all", "epochs": np.int64(2), "lr": np.float32(0.5), "refit": np.False_}
    plain = {"layers": [8, 4], "batch_size": 0, "epochs": 2, "lr": 0.5, "refit": False}
    spelled |= {
        "fusion": "tirg",
        "fusion_options": {"width": np.int64(8)},
        "loss_options": {"smoothing": np.float16(0.5)},
    }
    plain |= {"fusion": "tirg", "fusion_options": {"width": 8}, "loss_options": {"smoothing": 0.5}}
    fitted = [FusionClassifier(**settings).fit(view, labels).config_ for settings in (spelled, plain)]
    assert fitted[0] == fitted[1]


@pytest.mark.parametrize("make", [FeatureView.from_arrays, dict, "view of a view"])
def test_a_view_and_a_dictionary_are_alike(arrays, labels, make):
    if make == "view of a view":
        order = np.random.default_rng(0).permutation(60)
        shuffled = FeatureView.from_arrays({m: x[order] for m, x in arrays.items()})
        x = shuffled[np.argsort(order)]
    else:
        x = make(arrays)
    expected = FusionClassifier(**QUICK).fit(arrays, labels).predict_proba(arrays)
    assert np.array_equal(FusionClassifier(**QUICK).fit(x, labels).predict_proba(x), expected)


def test_a_row_that_occurs_twice_counts_twice(view, labels):
    settings = {**QUICK, "weight_decay": 0.1}
    rows = np.append(np.arange(60), [0] * 40)
    twice = FusionClassifier(**settings).fit(view[rows], labels[rows])
    copied = FusionClassifier(**settings).fit({m: view[m][rows] for m in view}, labels[rows])
    assert np.array_equal(twice.predict_proba(view), copied.predict_proba(view))
    once = FusionClassifier(**settings).fit(view, labels)
    assert not np.allclose(twice.predict_proba(view), once.predict_proba(view), atol=1e-3)


@pytest.mark.parametrize(
    "y",
    [
        KINDS[np.arange(60) % 3],
        KINDS[np.arange(60) % 3].tolist(),
        KINDS[np.arange(60) % 3].astype(object),
        np.arange(60) % 2 == 0,
        np.arange(60) % 3 * 10 - 5,
        (np.arange(60) % 2).astype(float),
        np.arange(60, dtype=np.uint8) % 4,
    ],
    ids=["text", "list", "object", "bool", "int", "float", "uint8"],
)
def test_labels_of_any_kind_come_back_as_they_were(view, y):
    classifier = FusionClassifier(**QUICK).fit(view, y)
    assert classifier.classes_.tolist() == sorted(set(np.asarray(y).tolist()))
    assert classifier.predict(view).dtype == np.asarray(y).dtype
    scores = classifier.predict_proba(view)
    assert scores.shape == (60, len(classifier.classes_))
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(classifier.predict(view), classifier.classes_[scores.argmax(axis=1)])
    assert classifier.score(view, y) == accuracy_score(y, classifier.predict(view))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, bool, float, csr_array, list], ids=str)
def test_multi_label_targets_of_any_kind(view, indicator, kind):
    y = indicator.tolist() if kind is list else kind(indicator) if kind is csr_array else indicator.astype(kind)
    classifier = FusionClassifier(**QUICK).fit(view, y)
    chosen = classifier.predict(view)
    assert chosen.dtype == np.int64
    assert np.array_equal(chosen, classifier.predict_proba(view) >= classifier.thresholds_)
    assert classifier.classes_.tolist() == [[0, 1]] * 3
    assert classifier.score(view, indicator) == (chosen == indicator).all(axis=1).mean()


def test_at_least_so_many_labels(view, indicator):
    y = np.where(np.arange(60)[:, None] % 3 > 0, 0, indicator)
    few = FusionClassifier(**QUICK).fit(view, y).predict(view)
    one = FusionClassifier(**QUICK, min_labels=1).fit(view, y).predict(view)
    assert few.sum(axis=1).min() == 0
    assert one.sum(axis=1).min() == 1


@pytest.mark.parametrize(
    ("task", "settings", "held_out"),
    [
        ("multilabel", {}, True),
        ("multilabel", {"thresholds": "class"}, True),
        ("multilabel", {"thresholds": "none"}, False),
        ("multilabel", {"thresholds": "none", "patience": 5}, True),
        ("multiclass", {}, False),
        ("multiclass", {"patience": 5}, True),
    ],
    ids=str,
)
def test_a_stratified_tenth_is_held_out_where_something_is_chosen(
    view, indicator, labels, monkeypatch, task, settings, held_out
):
    seen = []
    join = HeldOut.join
    monkeypatch.setattr(HeldOut, "join", lambda *args: seen.append(join(*args)) or seen[-1])
    y = indicator if task == "multilabel" else labels
    FusionClassifier(**QUICK, **settings, random_state=5).fit(view, y)
    targets = indicator if task == "multilabel" else (labels[:, None] == KINDS).astype(int)
    expected = np.flatnonzero(stratified_folds(targets, 10, 5) == 0).tolist()
    assert (seen[0].rows.tolist() if held_out else seen) == (expected if held_out else [None])


def test_thresholds_are_one_a_label(view, indicator):
    settings = {**QUICK, "folds": 3}
    assert len(set(FusionClassifier(**settings, thresholds="class").fit(view, indicator).thresholds_)) > 1
    assert len(set(FusionClassifier(**settings, thresholds="global").fit(view, indicator).thresholds_)) == 1
    assert FusionClassifier(**settings, thresholds="none").fit(view, indicator).thresholds_.tolist() == [0.5] * 3
    with pytest.raises(ConfigError, match="thresholds"):
        FusionClassifier(**settings, thresholds="class").fit(view, indicator[:, 0])


def test_folds_and_members_are_averaged(view, indicator):
    classifier = FusionClassifier(**QUICK, folds=3, members=2).fit(view, indicator)
    assert len(classifier.models_) == len(classifier.histories_) == 6
    whole = classifier.predict_proba(view)
    parts = []
    for model in classifier.models_:
        one = copy(classifier)
        one.models_ = [model]
        parts.append(one.predict_proba(view))
    np.testing.assert_allclose(whole, np.mean(parts, axis=0), atol=1e-6)
    assert np.ptp(parts, axis=0).max() > 0.01


@pytest.mark.parametrize("settings", [{}, {"folds": 2, "members": 2}, {"head": "mlp", "optimizer": "adam"}], ids=str)
def test_a_fitted_one_can_be_pickled(view, indicator, settings):
    fitted = FusionClassifier(**{**QUICK, **settings}).fit(view, indicator)
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    loaded = joblib.load(file)
    assert np.array_equal(loaded.predict_proba(view), fitted.predict_proba(view))
    assert np.array_equal(loaded.predict(view), fitted.predict(view))
    assert loaded.get_params() == fitted.get_params()


def test_same_random_state_same_bytes(view, labels):
    def weights(random_state):
        classifier = FusionClassifier(layers=(8,), epochs=2, random_state=random_state).fit(view, labels)
        return [x.numpy().tobytes() for x in classifier.models_[0].state_dict().values()]

    assert weights(1) == weights(1) == weights(np.int64(1)) != weights(2)
    one, other = np.random.RandomState(0), np.random.RandomState(0)
    assert weights(one) == weights(other) != weights(one)  # a generator moves on
    assert weights(None) != weights(None)


def test_leaves_the_random_state_alone(view, labels):
    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()

    def seeded():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    FusionClassifier(**QUICK).fit(view, labels)
    assert draws() == expected
    seeded()
    with pytest.raises(ConfigError, match="gama"):
        FusionClassifier(**QUICK, loss="bce", loss_options={"gama": 1}).fit(view, labels)
    assert draws() == expected
