"""Early stopping without folds: the rows that are reported chose the epoch, which is said wherever they are."""

import json

import pytest

from cachefuse.report.run_page import report_html
from cachefuse.runs.evaluate import evaluate
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
    loaded = load_run(folder)
    assert loaded.caution == run.caution
    evaluation = evaluate(loaded, store, n_resamples=0)
    assert evaluation.caution == run.caution
    assert (run.caution is not None) == says
    assert ("chose the epoch" in report_html(loaded, store)) == says


def test_of_training_rows_it_says_that_they_were_trained_on(toy_store):
    store = toy_store()
    run = train_head(store, TrainConfig(**SMALL, patience=2))
    assert "trained on train" in evaluate(run, store, "train", n_resamples=0).caution
