import importlib.util
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

import cachefuse
from cachefuse.cache.store import FeatureStore
from cachefuse.cache.writer import ViewWriter
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError, DataError, RunError, UnknownNameError
from cachefuse.evaluation import evaluate
from cachefuse.metrics import METRICS, bootstrap_intervals, decide, evaluation_metrics
from cachefuse.predict import predict_split
from cachefuse.training.config import TrainConfig
from cachefuse.training.ensemble import ensemble
from cachefuse.training.run import Run
from cachefuse.training.thresholds import choose_thresholds
from cachefuse.training.train import train_head
from cachefuse.training.used import StoreTables

QUICK = TrainConfig(head="linear", epochs=3, lr=0.03)
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
        self.store = FeatureStore.for_dataset(path, dataset)
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


def measured(found):
    return {name: found.metrics[name] for name in ("micro_f1", "macro_f1", "samples_f1", "macro_ap")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"members": 2, "thresholds": "class", "threshold_metric": "macro_f1"},
        {"thresholds": "none"},
        {"folds": 3},
        {"refit": True},
        {"folds": 3, "members": 2, "refit": True},
    ],
    ids=str,
)
def test_figures_of_the_rows_held_out_are_those_of_the_training(settings, data, tmp_path):
    path = train_head(data.store, replace(QUICK, **settings)).save(tmp_path / "runs")
    held = "oof" if "folds" in settings else "val"
    written = json.loads((path / "run.json").read_text())["results"][held]
    found = evaluate(Run.load(path), data.store, n_resamples=0)
    assert (found.run, found.dataset, found.split, found.without) == (path.name, "made", held, ())
    assert found.n_rows == written["n_rows"] == (89 if held == "oof" else 29)
    assert measured(found) == written["metrics"]
    assert found.per_class == written["per_class"]
    assert found.caution is None
    assert evaluate(Run.load(path), data.store, held, n_resamples=0) == found


def test_those_of_a_multi_class_run_as_well(multiclass):
    run = train_head(multiclass.store, replace(QUICK, folds=3))
    found = evaluate(run, multiclass.store, n_resamples=0)
    assert {name: found.metrics[name] for name in ("accuracy", "macro_f1", "macro_ap")} == run.results["oof"].metrics


def calibration_error(targets, probabilities):
    """Equation 3 of arXiv 1706.04599, bin by bin."""
    total = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        mine = (probabilities > low) & (probabilities <= high) | ((low == 0) & (probabilities == 0))
        if mine.any():
            total += mine.mean() * abs(targets[mine].mean() - probabilities[mine].mean(dtype=np.float64))
    return total


def recall_at_p90(targets, scores):
    precision, recall, _ = precision_recall_curve(targets, scores)
    return max(r for p, r in zip(precision, recall, strict=True) if p >= 0.9)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_every_figure_equals_scikit_learns(task, request):
    data = request.getfixturevalue("data" if task == "multilabel" else "multiclass")
    run = train_head(data.store, replace(QUICK, epochs=30, members=2))
    found = evaluate(run, data.store, "train", n_resamples=0)
    rows = data.labelled("train")
    y, scores = data.hot[rows], run.scores(StoreTables([run], data.store), torch.from_numpy(rows))
    decided = scores >= run.thresholds if task == "multilabel" else np.eye(CLASSES, dtype=bool)[scores.argmax(1)]
    assert y.any(axis=0).all()
    expected = {
        "macro_f1": f1_score(y, decided, average="macro", zero_division=0),
        "weighted_f1": f1_score(y, decided, average="weighted", zero_division=0),
        "macro_ap": average_precision_score(y, scores, average="macro"),
        "micro_ap": average_precision_score(y, scores, average="micro"),
        "recall_at_p90": np.mean([recall_at_p90(y[:, c], scores[:, c]) for c in range(CLASSES)]),
    }
    if task == "multilabel":
        expected |= {
            "micro_f1": f1_score(y, decided, average="micro", zero_division=0),
            "samples_f1": f1_score(y, decided, average="samples", zero_division=0),
            "exact_match": accuracy_score(y, decided),
            "calibration_error": calibration_error(y, scores),
        }
    else:
        labels = y.argmax(1)
        expected |= {
            "accuracy": accuracy_score(labels, scores.argmax(1)),
            "top5_accuracy": top_k_accuracy_score(labels, scores, k=5),
            "top_calibration_error": calibration_error(labels == scores.argmax(1), scores.max(1)),
        }
    assert found.metrics == pytest.approx(expected)
    precision, recall, f1, support = precision_recall_fscore_support(y, decided, zero_division=0)
    assert found.per_class["precision"] == pytest.approx(precision)
    assert found.per_class["recall"] == pytest.approx(recall)
    assert found.per_class["f1"] == pytest.approx(f1)
    assert found.per_class["support"] == support.tolist()
    assert found.per_class["ap"] == pytest.approx(average_precision_score(y, scores, average=None))
    assert found.per_class["recall_at_p90"] == pytest.approx(
        [recall_at_p90(y[:, c], scores[:, c]) for c in range(CLASSES)]
    )


def text_alone(run, member, data, rows):
    """The scores of a sum's text head alone, under its meta-classifier, for rows that have a text or none."""
    model = member.model
    x = torch.from_numpy(data.x["text"][rows])
    here = torch.from_numpy(data.store.present("text")[rows])
    with torch.inference_mode():
        logits = model.fusion.heads["text"](model.standardize["text"](x)) * here[:, None]
        return model.fusion.meta(logits).sigmoid().numpy()


@pytest.mark.parametrize("settings", [{}, {"folds": 3}], ids=str)
def test_a_sum_without_the_image_equals_the_text_head_alone(settings, data):
    run = train_head(data.store, replace(QUICK, epochs=30, **settings))
    scores = np.zeros_like(run.held.scores)
    for member in run.members:
        blind = run.held.parts == member.fold if "folds" in settings else np.ones(len(scores), bool)
        scores[blind] = text_alone(run, member, data, run.held.rows[blind])
    np.testing.assert_array_equal(run.held_out_scores(StoreTables([run], data.store, without=["image"])), scores)
    found = evaluate(run, data.store, without=["image"], n_resamples=0)
    y = data.hot[run.held.rows]
    assert found.without == ("image",)
    assert found.metrics["macro_ap"] == METRICS["macro_ap"](y, scores, y)
    assert found.metrics["micro_ap"] == METRICS["micro_ap"](y, scores, y)
    assert found.metrics["macro_ap"] < evaluate(run, data.store, n_resamples=0).metrics["macro_ap"]


@pytest.mark.parametrize("kind", ["global", "class"])
def test_without_a_modality_thresholds_stay_those_chosen_with_it(kind, data):
    """As in use: what decides was chosen before the modality went missing, and on other rows."""
    run = train_head(data.store, replace(QUICK, folds=3, epochs=20, thresholds=kind))
    y, held = data.hot[run.held.rows], run.held
    scores = run.held_out_scores(StoreTables([run], data.store, without=["text"]))
    decided = np.zeros(y.shape, bool)
    for fold in range(3):
        mine = held.parts == fold
        decided[mine] = scores[mine] >= choose_thresholds(y[~mine], held.scores[~mine], "micro_f1", kind == "class")
    found = evaluate(run, data.store, without=["text", "text"], n_resamples=0)
    assert found.without == ("text",)
    assert found.metrics["micro_f1"] == f1_score(y, decided, average="micro")
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(y, decided, average="macro", zero_division=0))


@pytest.mark.parametrize("kind", ["auto", "global"])
def test_two_rows_held_out_are_enough_to_leave_a_modality_out(kind, tmp_path):
    data = Data(tmp_path / "made.zarr")
    data.store.splits = np.where(data.store.splits == "val", "dev", data.store.splits)
    data.store.splits[[70, 71]] = "val"
    run = train_head(data.store, replace(QUICK, patience=0, thresholds=kind))
    scores = run.held_out_scores(StoreTables([run], data.store, without=["text"]))
    chosen = [
        choose_thresholds(data.hot[[row]], run.held.scores[[i]], "micro_f1", False) for i, row in ((1, 71), (0, 70))
    ]
    found = evaluate(run, data.store, without=["text"], n_resamples=0)
    assert found.metrics["micro_f1"] == f1_score(data.hot[[70, 71]], scores >= np.array(chosen), average="micro")


def test_without_nothing_its_own_scores_come_out_again(data):
    run = train_head(data.store, replace(QUICK, folds=3, members=2))
    np.testing.assert_allclose(run.held_out_scores(StoreTables([run], data.store)), run.held.scores, atol=1e-6)


def test_a_multi_class_run_without_a_modality(multiclass):
    run = train_head(multiclass.store, QUICK)
    scores = run.held_out_scores(StoreTables([run], multiclass.store, without=["text"]))
    found = evaluate(run, multiclass.store, without=["text"], n_resamples=0)
    assert found.metrics["accuracy"] == accuracy_score(multiclass.hot[run.held.rows].argmax(1), scores.argmax(1))


@pytest.mark.parametrize("without", [(), ("image",)])
def test_another_labelled_split_is_decided_as_predict_does(without, data):
    run = train_head(data.store, replace(QUICK, folds=3, thresholds="class"))
    found = evaluate(run, data.store, "dev", without=without, n_resamples=0)
    rows = data.labelled("dev")
    if without:
        labels = run.decide(run.scores(StoreTables([run], data.store, without=without), torch.from_numpy(rows)))
    else:
        labels = predict_split(run, data.store, "dev").labels
    assert (found.split, found.n_rows, found.caution) == ("dev", 20, None)
    assert found.metrics["micro_f1"] == f1_score(data.hot[rows], labels, average="micro")


def test_rows_without_labels_do_not_count(data):
    run = train_head(data.store, replace(QUICK, folds=3))
    assert evaluate(run, data.store, "val", n_resamples=0).n_rows == 29


def test_intervals_are_the_bootstraps(data):
    run = train_head(data.store, QUICK)
    heard = []
    found = evaluate(
        run, data.store, "dev", n_resamples=200, seed=3, on_progress=lambda *progress: heard.append(progress)
    )
    predicted = predict_split(run, data.store, "dev")
    names = evaluation_metrics("multilabel", CLASSES)
    y = data.hot[data.labelled("dev")]
    assert found.intervals == bootstrap_intervals(y, predicted.scores, predicted.labels, names, 200, 3)
    assert all(low <= found.metrics[name] <= high for name, (low, high) in found.intervals.items() if "cal" not in name)
    assert heard[-1] == (200 * len(names), 200 * len(names))
    assert evaluate(run, data.store, "dev", n_resamples=200, seed=3) == found
    assert evaluate(run, data.store, "dev", n_resamples=0).intervals == {}
    with pytest.raises(ConfigError, match=r"n_resamples must be at least 1\. Got -1 instead"):
        evaluate(run, data.store, "dev", n_resamples=-1)


def test_the_datasets_own_metrics_come_first(tmp_path):
    data = Data(tmp_path / "made.zarr", metrics=["accuracy", "macro_ap"])
    run = train_head(data.store, replace(QUICK, folds=3))
    found = evaluate(run, data.store, n_resamples=10)
    assert list(found.metrics)[:3] == ["accuracy", "macro_ap", "micro_f1"]
    assert sorted(found.metrics) == sorted({"accuracy", *evaluation_metrics("multilabel", CLASSES)})
    assert list(found.intervals) == list(found.metrics)
    assert {name: found.metrics[name] for name in ("accuracy", "macro_ap")} == run.results["oof"].metrics


def gates(member, data, rows, gone=()):
    """Softmax of a linear map of the standardised features, over the modalities that are there: (n, 2)."""
    model, parts, here = member.model, [], []
    for modality in ("image", "text"):
        present = data.store.present(modality)[rows] & (modality not in gone)
        with torch.inference_mode():
            x = model.standardize[modality](torch.from_numpy(data.x[modality][rows])).numpy()
        parts.append(x * present[:, None])
        here.append(present)
    gate = model.fusion.gate
    raw = np.exp(np.concatenate(parts, axis=1) @ gate.weight.detach().numpy().T + gate.bias.detach().numpy())
    raw *= np.stack(here, axis=1)
    return raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-30)


@pytest.mark.parametrize("gone", [(), ("image",)])
def test_weights_of_gated_modalities(gone, data):
    run = train_head(data.store, replace(QUICK, fusion="gated", epochs=40, members=2))
    rows = run.held.rows
    expected = np.mean([gates(member, data, rows, gone) for member in run.members], axis=0)
    found = evaluate(run, data.store, without=gone, n_resamples=0)
    for m, modality in enumerate(("image", "text")):
        assert found.gates[modality] == pytest.approx(expected[:, m].mean(), abs=1e-6)
        by_class = [expected[positive, m].mean() if positive.any() else np.nan for positive in data.hot[rows].T]
        assert found.gates_per_class[modality] == pytest.approx(by_class, abs=1e-6, nan_ok=True)
    if gone:
        assert found.gates["image"] == 0
        assert found.gates["text"] == pytest.approx(data.store.present("text")[rows].mean())


def test_a_class_without_positives_has_no_weights_and_a_run_without_gates_none_at_all(data):
    gated = train_head(data.store, replace(QUICK, fusion="gated"))
    plain = train_head(data.store, replace(QUICK, seed=1))
    held = gated.held
    mine = ~data.hot[held.rows, 2]
    few = replace(gated, held=replace(held, rows=held.rows[mine], parts=held.parts[mine], scores=held.scores[mine]))
    found = evaluate(few, data.store, n_resamples=0)
    assert np.isnan(found.gates_per_class["image"][2])
    assert np.isnan(found.per_class["ap"][2])
    assert evaluate(plain, data.store, n_resamples=0).gates == {}
    joined = ensemble([plain, gated], data.store)
    assert evaluate(joined, data.store, n_resamples=0).gates == evaluate(gated, data.store, n_resamples=0).gates


@pytest.mark.parametrize(
    ("settings", "split", "seen"),
    [
        ({}, "train", True),
        ({"folds": 3}, "train", True),
        ({"folds": 3}, "val", True),
        ({"refit": True}, "train", True),
        ({"refit": True}, "val", False),
        ({}, "val", False),
        ({"folds": 3}, "dev", False),
    ],
    ids=str,
)
def test_says_that_a_run_was_trained_on_the_rows(settings, split, seen, data):
    run = train_head(data.store, replace(QUICK, **settings))
    found = evaluate(run, data.store, split, n_resamples=0)
    caution = (
        f"run made-sum-linear-asl was trained on {split} rows: its figures there do not tell how good it is on new"
    )
    assert (found.caution or "").startswith(caution) == seen
    assert (found.caution is not None) == seen


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({}, {"split": "prod"}, DataError, "made has no rows in split 'prod'; its splits are: train, val, test, dev"),
        ({}, {"split": "oof"}, DataError, "made has no rows in split 'oof'; its splits are: train, val, test, dev"),
        ({"folds": 3}, {"split": "OOF"}, DataError, "made has no rows in split 'OOF'"),
        (
            {},
            {"split": "test"},
            DataError,
            "made has no labels in split 'test'; those with labels are: train, val, dev",
        ),
        ({}, {"without": ["audio"]}, UnknownNameError, "unknown modality 'audio'; choose from: image, text"),
        ({"fusion": "text"}, {"without": ["image"]}, UnknownNameError, "unknown modality 'image'; choose from: text"),
        ({"fusion": "text"}, {"without": ["text"]}, ConfigError, "reads text; without them it has nothing to go by"),
        ({}, {"without": ["text", "image"]}, ConfigError, "reads image and text; without them it has nothing to go by"),
        (
            {"refit": True},
            {"without": ["text"]},
            RunError,
            "have seen the rows held out; name another labelled --split",
        ),
        ({}, {"device": "tpu"}, ConfigError, "unknown device 'tpu'"),
    ],
)
def test_refuses_what_can_not_be_measured(settings, options, error, message, data):
    run = train_head(data.store, replace(QUICK, **settings))
    with pytest.raises(error, match=re.escape(message)):
        evaluate(run, data.store, **options, n_resamples=0)


def test_a_run_that_held_out_nothing_needs_a_split(data):
    run = replace(train_head(data.store, QUICK), held=None)
    with pytest.raises(RunError, match="has no rows held out; name a labelled --split: train, val, dev"):
        evaluate(run, data.store)
    assert evaluate(run, data.store, "dev", n_resamples=0).n_rows == 20


@pytest.mark.parametrize("folds", [0, 3])
def test_rows_that_were_appended_are_noticed(folds, tmp_path):
    path = tmp_path / "made.zarr"
    run = train_head(Data(path, n=80).store, replace(QUICK, folds=folds))
    more = Data(path)
    assert len(more.store) == 120
    for split in (None, "oof") if folds else (None,):
        with pytest.raises(
            RunError, match=r"changed since .* \(rows were added or refreshed, say\), so .* --split: train, val, dev"
        ):
            evaluate(run, more.store, split)
    val = evaluate(run, more.store, "val", n_resamples=0)
    labels = predict_split(run, more.store, "val").labels[np.arange(60, 90) != 85]
    assert val.n_rows == 29
    assert val.metrics["micro_f1"] == f1_score(more.hot[more.labelled("val")], labels, average="micro")
    assert ("was trained on val rows" if folds else "it may have seen some of these rows") in val.caution
    assert "it may have seen some of these rows" in evaluate(run, more.store, "dev", n_resamples=0).caution


def test_another_store_is_refused(data):
    run = train_head(data.store, QUICK)
    used = {modality: (replace(group[0], key="0" * 32),) for modality, group in run.members[0].features.items()}
    other = replace(run, members=[replace(run.members[0], features=used)])
    with pytest.raises(RunError, match="was trained on another store"):
        evaluate(other, data.store)
    with pytest.raises(RunError, match="was trained on other classes"):
        evaluate(replace(run, classes=("a", "b", "c")), data.store)


def test_min_labels_count_as_in_training(data):
    manifest = data.store.manifest.model_copy(update={"min_labels": 2})
    run = replace(train_head(data.store, QUICK), manifest=manifest, thresholds=np.full(CLASSES, 0.999))
    found = evaluate(run, data.store, "dev", n_resamples=0)
    labels = decide(predict_split(run, data.store, "dev").scores, "multilabel", run.thresholds, 2)
    assert set(labels.sum(axis=1)) == {2}
    assert found.metrics["micro_f1"] == f1_score(data.hot[data.labelled("dev")], labels, average="micro")


def test_nothing_is_logged_and_the_run_stays_as_it_was(data, caplog):
    run = train_head(data.store, QUICK)
    before = run.held.scores.copy(), run.thresholds.copy()
    with caplog.at_level(logging.WARNING):
        evaluate(run, data.store, without=["image"], n_resamples=10)
    assert caplog.text == ""
    np.testing.assert_array_equal(before[0], run.held.scores)
    np.testing.assert_array_equal(before[1], run.thresholds)


def test_no_public_name_is_a_module_as_well():
    """Importing such a module would put it in the name's place."""
    assert [name for name in cachefuse.__all__ if importlib.util.find_spec(f"cachefuse.{name}")] == []
    assert cachefuse.evaluate is evaluate
