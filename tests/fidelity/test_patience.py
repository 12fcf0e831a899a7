"""Early stopping without folds: the rows that are reported chose the epoch, which is said wherever they are."""

import json

import numpy as np
import pytest

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.finetune import fine_tune
from cachefuse.alignment.run import Alignment, list_alignments
from cachefuse.alignment.train import align
from cachefuse.report.alignment_page import training_note
from cachefuse.report.run_page import report_html
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.files import list_runs
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig

SMALL = {"layers": (8,), "epochs": 3}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, False),
        ({"patience": 2}, True),
        ({"patience": 2, "refit": True}, True),
        ({"patience": 2, "folds": 2}, False),
    ],
)
def test_a_run_says_that_its_rows_chose_the_epoch(toy_store, tmp_path, settings, says):
    store = toy_store()
    run = train_head(store, TrainConfig(**SMALL, **settings))
    folder = save_run(run, tmp_path)
    assert (json.loads((folder / "run.json").read_text())["caution"] is not None) == says
    assert ("chose the epoch" in (folder / "README.md").read_text()) == says
    assert list_runs(tmp_path)[0].caution == run.caution
    loaded = load_run(folder)
    assert loaded.caution == run.caution
    evaluation = evaluate(loaded, store, n_resamples=0)
    assert evaluation.caution == run.caution
    assert (run.caution is not None) == says
    assert ("chose the epoch" in report_html(loaded, store)) == says


@pytest.mark.parametrize(("settings", "says"), [({"patience": 0}, True), ({"epochs": 1, "patience": 0}, False)])
def test_an_alignment_keeps_its_best_epoch_without_patience_too(make_store_in, tmp_path, settings, says):
    """An alignment and what is fine-tuned from it: val rows chose the parent's weights, with patience its own too."""
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(60, 6)).astype(np.float16) for name in ("image", "text")}
    store = make_store_in(tmp_path, x, rng.integers(2, size=(60, 1)).astype(np.int8), ["train"] * 40 + ["val"] * 20)
    run = align(store, AlignConfig(**{"epochs": 6, "width": 8, "batch_size": 64} | settings))
    run.save(tmp_path / "runs")
    (listed,) = list_alignments(tmp_path / "runs")
    assert (run.caution is not None) == says
    assert (listed.split, listed.caution) == ("val", run.caution)
    assert ("chose the epoch" in training_note(run)) == says
    for patience in (0, 2):
        tuned, _ = fine_tune(run, store, tmp_path / "runs", epochs=8, lr=0.1, patience=patience)
        again = Alignment.load(tmp_path / "runs" / tuned.name)
        chose = says or not all(epoch.best for epoch in tuned.history.epochs)
        assert chose == (says or patience > 0)
        assert (tuned.caution is not None) == (again.caution is not None) == chose


def test_of_training_rows_it_says_that_they_were_trained_on(toy_store):
    store = toy_store()
    run = train_head(store, TrainConfig(**SMALL, patience=2))
    assert "trained on train" in evaluate(run, store, "train", n_resamples=0).caution
