import importlib.util
import json
from dataclasses import replace

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
from cachefuse.errors import ConfigError
from cachefuse.metrics import evaluation_metrics
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.metrics.tasks import bind_metrics
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming

CLASSES = 7


QUICK = TrainConfig(head="linear", epochs=3, lr=0.03)


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
    path = save_run(train_head(data.store, replace(QUICK, **settings)), tmp_path / "runs")
    held_out = "oof" if "folds" in settings else "val"
    written = json.loads((path / "run.json").read_text())["results"][held_out]
    found = evaluate(load_run(path), data.store, n_resamples=0)
    assert (found.run, found.dataset, found.split, found.without) == (path.name, "made", held_out, ())
    assert found.n_rows == written["n_rows"] == (89 if held_out == "oof" else 29)
    assert measured(found) == written["metrics"]
    assert {name: found.per_class[name] for name in written["per_class"]} == written["per_class"]
    assert found.caution is None
    assert evaluate(load_run(path), data.store, held_out, n_resamples=0) == found


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
    assert found.intervals == bootstrap_intervals(y, predicted.scores, predicted.labels, bind_metrics(names), 200, 3)
    assert all(low <= found.metrics[name] <= high for name, (low, high) in found.intervals.items() if "cal" not in name)
    assert heard[-1] == (200 * len(names), 200 * len(names))
    assert evaluate(run, data.store, "dev", n_resamples=200, seed=3) == found
    assert evaluate(run, data.store, "dev", n_resamples=0).intervals == {}
    with pytest.raises(ConfigError, match=naming("n_resamples 1 -1")):
        evaluate(run, data.store, "dev", n_resamples=-1)


def test_the_datasets_own_metrics_come_first(tmp_path, make_data):
    data = make_data(tmp_path / "made.zarr", metrics=["accuracy", "macro_ap"])
    run = train_head(data.store, replace(QUICK, folds=3))
    found = evaluate(run, data.store, n_resamples=10)
    assert list(found.metrics)[:3] == ["accuracy", "macro_ap", "micro_f1"]
    assert sorted(found.metrics) == sorted({"accuracy", *evaluation_metrics("multilabel", CLASSES)})
    assert list(found.intervals) == list(found.metrics)
    assert {name: found.metrics[name] for name in ("accuracy", "macro_ap")} == run.results["oof"].metrics


def test_no_public_name_is_a_module_as_well():
    """Importing such a module would put it in the name's place."""
    assert [name for name in cachefuse.__all__ if importlib.util.find_spec(f"cachefuse.{name}")] == []
    assert cachefuse.evaluate is evaluate
