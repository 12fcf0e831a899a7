"""The bench of quality on small data: pipelines against scikit-learn's own compositions, folds, decisions, notes."""

import csv

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.metrics.pairwise import cosine_distances
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from cachefuse.bench.quality import OWN, bench_quality, out_of_fold, read_features, read_texts
from cachefuse.bench.simple_pipelines import PIPELINES, Fold, Inputs
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.extraction.extract import extract
from cachefuse.metrics.thresholds import crossfit_decisions
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from fixtures.messages import naming

SIMPLE = tuple(PIPELINES)
QUICK = ("tfidf+lr", "lr features", "knn")
MANIFEST = """
name = "notes"
task = "{task}"

[reader]
kind = "table"
files = {{ train = "train.csv" }}
id = "id"
text = "text"
labels = "{labels}"
separator = ";"
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads take many times as long where other work keeps a core busy."""
    monkeypatch.setenv("CACHEFUSE_THREADS", "1")
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """150 images with captions: the store, its dataset, and its rows out of fold."""
    manifest = parse_manifest(
        'name = "mine"\ntask = "multilabel"\nmin_labels = 1\nreader = { kind = "shapes", train = 120, test = 30 }\n',
        "mine.toml",
    )
    folder = tmp_path_factory.mktemp("quality")
    dataset = load_dataset(manifest, folder)
    extract(dataset, ["classic"], folder / "mine.zarr", device="cpu")
    return FeatureStore(folder / "mine.zarr"), dataset


@pytest.fixture(scope="module")
def fold(shapes):
    """The first of four folds."""
    store, dataset = shapes
    data = open_training_data(store, device="cpu")
    rows = data.rows("train", "val")
    parts = data.folds(rows, 4, 0).numpy()
    inputs = Inputs(read_texts(store, dataset, rows)[0], read_features(store, data, rows))
    train, held_out = np.flatnonzero(parts), np.flatnonzero(parts == 0)
    return Fold(inputs.take(train), data.learnt(rows)[train], inputs.take(held_out), seed=3)


def one_vs_rest(c, fold, x, held_out):
    model = OneVsRestClassifier(LogisticRegression(C=c, solver="liblinear"))
    return model.fit(x, fold.targets.astype(int)).predict_proba(held_out)


def tfidf(fold):
    """TF-IDF side by side, without a union."""
    kinds = {"ngram_range": (1, 2)}, {"ngram_range": (3, 5), "analyzer": "char_wb"}
    fitted = [TfidfVectorizer(sublinear_tf=True, **kind).fit(fold.train.texts) for kind in kinds]
    return [np.hstack([x.transform(i.texts).toarray() for x in fitted]) for i in (fold.train, fold.held_out)]


def expected(name, fold):
    x, held_out, targets = fold.train.features, fold.held_out.features, fold.targets.astype(int)
    if name == "tfidf+lr":
        return one_vs_rest(10, fold, *tfidf(fold))
    if name == "lr features":
        return one_vs_rest(3, fold, x, held_out)
    if name == "lr both":
        return one_vs_rest(3, fold, *(np.hstack(both) for both in zip(tfidf(fold), (x, held_out), strict=True)))
    if name == "mean of three":
        return sum(expected(one, fold) for one in ("tfidf+lr", "lr features", "lr both")) / 3
    if name == "mlp x5":
        settings = {"hidden_layer_sizes": 256, "learning_rate_init": 0.01, "max_iter": 20}
        with pytest.warns(ConvergenceWarning):
            models = [MLPClassifier(random_state=3 + i, **settings).fit(x, targets) for i in range(5)]
        return sum(model.predict_proba(held_out) for model in models) / 5
    if name == "knn":
        model = KNeighborsClassifier(20, weights="distance", metric="precomputed")
        model.fit(cosine_distances(x), targets)
        return np.stack([one[:, 1] for one in model.predict_proba(cosine_distances(held_out, x))], axis=1)
    model = OneVsRestClassifier(SVC(kernel="rbf", gamma="scale", C=1.0))
    return expit(model.fit(x, targets).decision_function(held_out))


@pytest.mark.parametrize("name", SIMPLE)
def test_scores_are_those_of_scikit_learn(name, fold):
    scores = PIPELINES[name].scores(fold)
    # liblinear stops at a tolerance; the place depends on the order in which it sums
    np.testing.assert_allclose(scores, expected(name, fold), atol=2e-3 if "lr" in name or "three" in name else 1e-5)
    learnt = average_precision_score(fold.targets, PIPELINES[name].scores(Fold(fold.train, fold.targets, fold.train)))
    assert learnt > 0.9


@pytest.mark.parametrize("name", SIMPLE)
def test_a_class_of_no_or_all_training_rows_has_a_constant_score(name, fold):
    targets = fold.targets.copy()
    targets[:, 0], targets[:, 2] = False, True
    scores = PIPELINES[name].scores(Fold(fold.train, targets, fold.held_out))
    assert (scores[:, 0] == 0).all()
    assert (scores[:, 2] == 1).all()
    alone = PIPELINES[name].scores(Fold(fold.train, targets[:, :2], fold.held_out))
    assert alone.shape == (len(fold.held_out), 2)
    assert len(np.unique(alone[:, 1])) > 5
    constant = PIPELINES[name].scores(Fold(fold.train, targets[:, :1], fold.held_out))
    assert (constant == 0).all()


def test_rows_and_folds_are_those_of_train_head(shapes, monkeypatch):
    store, dataset = shapes
    seen = {}

    def own(store, config, encoders, device):
        quick = TrainConfig(folds=config.folds, seed=config.seed, head="linear", epochs=3)
        seen["run"] = train_head(store, quick, encoders=encoders, device=device)
        return seen["run"]

    monkeypatch.setitem(OWN, "default", own)
    steps = []
    found = bench_quality(
        store, dataset, folds=3, seed=4, only=("default", *QUICK), device="cpu", on_progress=lambda *a: steps.append(a)
    )
    run = seen["run"]
    assert [row.name for row in found.rows] == ["default", *QUICK]
    assert (found.n_rows, found.n_classes, found.folds, found.left_out) == (120, len(store.classes), 3, {})
    assert not set(store.splits[run.held_out.rows]) & {"test"}
    default = found.rows[0]
    assert default.thresholds == "auto"
    for name, value in run.results["oof"].metrics.items():
        assert default.metrics[name] == value
    data = open_training_data(store, device="cpu")
    rows = torch.from_numpy(run.held_out.rows)
    targets = data.targets(rows)
    inputs = Inputs(read_texts(store, dataset, rows)[0], read_features(store, data, rows))
    for row in found.rows[1:]:
        scores = out_of_fold(PIPELINES[row.name], inputs, data, rows, run.held_out.parts, 4)
        by_kind = {}
        for kind in ("global", "class"):
            labels = crossfit_decisions(targets, scores, run.held_out.parts, "micro_f1", kind == "class", 1)
            by_kind[kind] = [f1_score(targets, labels, average=a) for a in ("micro", "macro", "samples")]
        best = max(by_kind, key=lambda kind: by_kind[kind][0])
        assert row.thresholds == best
        values = [*by_kind[best], average_precision_score(targets, scores)]
        assert list(row.metrics.values()) == pytest.approx(values)
        assert list(row.metrics) == ["micro_f1", "macro_f1", "samples_f1", "macro_ap"]
        assert row.seconds > 0
    assert steps == [
        ("mine: default", 0, 10),
        *((f"mine: {name}, fold {k + 1} of 3", 1 + 3 * i + k, 10) for i, name in enumerate(QUICK) for k in range(3)),
    ]


def write_notes(folder, *, task="multilabel", shuffled=False, n=150):
    """Notes whose words tell their labels; shuffled, they tell nothing. The second word is one of the labels."""
    rng = np.random.default_rng(0)
    words = {"red": "roses wine", "blue": "sea sky", "green": "grass trees"}
    chosen = [[name for name in words if rng.random() < 0.4] or ["red"] for _ in range(n)]
    texts = [" ".join(words[name] for name in names[: 1 if task == "multiclass" else 3]) for names in chosen]
    if shuffled:
        rng.shuffle(texts)
    lines = [(i, f"note {i % 9} {text}", ";".join(names), names[0])
             for i, (text, names) in enumerate(zip(texts, chosen, strict=True))]  # fmt: skip
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "labels", "first"), *lines])
    labels = "labels" if task == "multilabel" else "first"
    dataset = load_dataset(parse_manifest(MANIFEST.format(task=task, labels=labels), "notes.toml"), folder)
    extract(dataset, ["classic"], folder / "notes.zarr", device="cpu")
    return FeatureStore(folder / "notes.zarr"), dataset


def test_shuffled_texts_teach_nothing(tmp_path):
    store, dataset = write_notes(tmp_path, shuffled=True)
    base_rate = (store.targets > 0).mean()
    for row in bench_quality(store, dataset, folds=3, only=SIMPLE, device="cpu").rows:
        assert abs(row.metrics["macro_ap"] - base_rate) < 0.12, row


def test_one_label_per_row(tmp_path):
    store, dataset = write_notes(tmp_path, task="multiclass", n=90)
    found = bench_quality(store, dataset, folds=3, only=SIMPLE, device="cpu")
    assert found.metrics == ("accuracy", "macro_f1", "macro_ap")
    assert [row.name for row in found.rows] == [*SIMPLE]
    for row in found.rows:
        assert row.thresholds == "highest"
        assert row.metrics["accuracy"] > 0.9, row
        assert found.best("accuracy") >= row.metrics["accuracy"]


def test_without_texts_their_pipelines_are_left_out(shapes, tmp_path):
    store, dataset = shapes
    readers = {"tfidf+lr", "lr both", "mean of three"}
    names = (*sorted(readers), "knn")
    found = bench_quality(store, folds=2, only=names, device="cpu")
    assert [row.name for row in found.rows] == ["knn"]
    assert found.left_out.keys() == readers
    assert all("raw data" in why for why in found.left_out.values())
    (why,) = set(bench_quality(store, dataset.limit(50), folds=2, only=names, device="cpu").left_out.values())
    assert "lacks" in why
    rows = torch.arange(3)
    assert read_texts(store, dataset, rows)[0] == [" ".join(dataset.modalities["text"][row]) for row in range(3)]


def test_features_have_length_1_and_absent_ones_are_zeros(toy_store):
    store = toy_store(absent={"image": {3, 41}, "text": {2, 41}})
    data = open_training_data(store, device="cpu")
    rows = torch.tensor([0, 2, 3, 41])
    found = read_features(store, data, rows)
    lengths = [np.linalg.norm(found[:, :6], axis=1), np.linalg.norm(found[:, 6:], axis=1)]
    np.testing.assert_allclose(lengths, [[1, 1, 0, 0], [1, 0, 1, 0]], atol=1e-6)
    values = data.table.features["image"].index_select(0, rows[:1]).float().numpy()
    np.testing.assert_allclose(found[:1, :6], values / np.linalg.norm(values), rtol=1e-6)
    assert [row.name for row in bench_quality(store, folds=2, only=["knn"], device="cpu").rows] == ["knn"]


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"only": ["svm"]}, UnknownNameError, "svm classifier"),
        ({"folds": 1}, ConfigError, "folds 2 1"),
        ({"folds": 53}, ConfigError, "53 52"),
    ],
)
def test_says_what_is_wrong(options, error, names, toy_store):
    with pytest.raises(error, match=naming(names)):
        bench_quality(toy_store(), **{"only": ["knn"], "device": "cpu", **options})
