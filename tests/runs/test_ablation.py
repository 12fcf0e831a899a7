"""Evaluations without a modality, and how much each counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    f1_score,
)

from cachefuse.metrics import METRICS
from cachefuse.metrics.thresholds import choose_thresholds
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig

QUICK = TrainConfig(head="linear", epochs=3, lr=0.03)


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
    scores = np.zeros_like(run.held_out.scores)
    for member in run.members:
        blind = run.held_out.parts == member.fold if "folds" in settings else np.ones(len(scores), bool)
        scores[blind] = text_alone(run, member, data, run.held_out.rows[blind])
    np.testing.assert_array_equal(run.held_out_scores(StoreTables([run], data.store, without=["image"])), scores)
    found = evaluate(run, data.store, without=["image"], n_resamples=0)
    y = data.hot[run.held_out.rows]
    assert found.without == ("image",)
    assert found.metrics["macro_ap"] == METRICS["macro_ap"](y, scores, y)
    assert found.metrics["micro_ap"] == METRICS["micro_ap"](y, scores, y)
    assert found.metrics["macro_ap"] < evaluate(run, data.store, n_resamples=0).metrics["macro_ap"]


@pytest.mark.parametrize("kind", ["global", "class"])
def test_without_a_modality_thresholds_stay_those_chosen_with_it(kind, data):
    """As in use: what decides was chosen before the modality went missing, and on other rows."""
    run = train_head(data.store, replace(QUICK, folds=3, epochs=20, thresholds=kind))
    y, held_out = data.hot[run.held_out.rows], run.held_out
    scores = run.held_out_scores(StoreTables([run], data.store, without=["text"]))
    decided = np.zeros(y.shape, bool)
    for fold in range(3):
        mine = held_out.parts == fold
        decided[mine] = scores[mine] >= choose_thresholds(y[~mine], held_out.scores[~mine], "micro_f1", kind == "class")
    found = evaluate(run, data.store, without=["text", "text"], n_resamples=0)
    assert found.without == ("text",)
    assert found.metrics["micro_f1"] == f1_score(y, decided, average="micro")
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(y, decided, average="macro", zero_division=0))


@pytest.mark.parametrize("kind", ["auto", "global"])
def test_two_rows_held_out_are_enough_to_leave_a_modality_out(kind, tmp_path, make_data):
    data = make_data(tmp_path / "made.zarr")
    data.store.splits = np.where(data.store.splits == "val", "dev", data.store.splits)
    data.store.splits[[70, 71]] = "val"
    run = train_head(data.store, replace(QUICK, patience=0, thresholds=kind))
    scores = run.held_out_scores(StoreTables([run], data.store, without=["text"]))
    chosen = [
        choose_thresholds(data.hot[[row]], run.held_out.scores[[i]], "micro_f1", False) for i, row in ((1, 71), (0, 70))
    ]
    found = evaluate(run, data.store, without=["text"], n_resamples=0)
    assert found.metrics["micro_f1"] == f1_score(data.hot[[70, 71]], scores >= np.array(chosen), average="micro")


def test_without_nothing_its_own_scores_come_out_again(data):
    run = train_head(data.store, replace(QUICK, folds=3, members=2))
    np.testing.assert_allclose(run.held_out_scores(StoreTables([run], data.store)), run.held_out.scores, atol=1e-6)


def test_a_multi_class_run_without_a_modality(multiclass):
    run = train_head(multiclass.store, QUICK)
    scores = run.held_out_scores(StoreTables([run], multiclass.store, without=["text"]))
    found = evaluate(run, multiclass.store, without=["text"], n_resamples=0)
    assert found.metrics["accuracy"] == accuracy_score(multiclass.hot[run.held_out.rows].argmax(1), scores.argmax(1))


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
    rows = run.held_out.rows
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
    held_out = gated.held_out
    mine = ~data.hot[held_out.rows, 2]
    few = replace(
        gated,
        held_out=replace(held_out, rows=held_out.rows[mine], parts=held_out.parts[mine], scores=held_out.scores[mine]),
    )
    found = evaluate(few, data.store, n_resamples=0)
    assert np.isnan(found.gates_per_class["image"][2])
    assert np.isnan(found.per_class["ap"][2])
    assert evaluate(plain, data.store, n_resamples=0).gates == {}
    joined = ensemble([plain, gated], data.store)
    assert evaluate(joined, data.store, n_resamples=0).gates == evaluate(gated, data.store, n_resamples=0).gates
