import re

import numpy as np
import pytest

from cachefuse.runs.model_card import model_card
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig

QUICK = {"head": "linear", "epochs": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"folds": 3, "members": 2, "thresholds": "class"},
        {"thresholds": "none", "dropout": 0.0},
        {"refit": True, "dropout": 0.0},
    ],
)
def test_states_the_runs_figures_features_and_thresholds(settings, toy_store, tmp_path):
    run = train_head(toy_store(), TrainConfig(**QUICK, **settings))
    path = save_run(run, tmp_path / "runs")
    card = (path / "README.md").read_text(encoding="utf-8")
    assert card == model_card(load_run(path))
    assert f"# {run.name}" in card
    for split, result in run.results.items():
        figures = " | ".join(f"{value:.4f}" for value in result.metrics.values())
        assert f"| {split} | {result.n_rows:,} | {figures} |" in card
    for group in run.features.values():
        assert all(f"`{used.key}`" in card for used in group)
    assert [float(x) for x in re.findall(r"\| class \d \| (\S+) \|", card)] == pytest.approx(run.thresholds, abs=1e-4)
    assert ("thresholds chosen on other rows" in card) == bool((run.thresholds != 0.5).any())
    assert ("Afterwards, the models in this folder were trained on all of it." in card) == run.config.refit
    assert f"| dropout | {run.config.dropout:g} |" in card


def test_a_threshold_that_no_score_reaches_is_said_to_be_one(toy_store):
    run = train_head(toy_store(), TrainConfig(**QUICK))
    run.thresholds = np.array([0.5, 1.5, 1.0])
    card = model_card(run)
    assert "| class 1 | more than 1: never predicted |" in card
    assert "| class 2 | 1.0000 |" in card


def test_names_from_data_cannot_break_out(toy_store):
    run = train_head(toy_store(), TrainConfig(**QUICK))
    run.classes = ("<img src=x onerror=alert(1)>", "a | b\n# c", "[x](http://y)`z` WWW.y.z @me $x$ ~~y~~")
    card = model_card(run)
    assert "http://" not in card
    assert "WWW." not in card
    assert "@" not in card
    assert not re.search(r"(?<!\\)[$~]", card)
    assert "<img" not in card
    assert "\n# c" not in card
    assert "[x](" not in card.replace("\\[x\\](", "")
    rows = [line for line in card.split("## Classes")[1].split("##")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_a_terminal_shows_names_as_they_are(toy_store):
    run = train_head(toy_store(), TrainConfig(**QUICK))
    run.classes, run.name = ("\x1b]0;title\x07", "a\u202eb", "\x9b2J"), "name\x1b"
    card = model_card(run)
    assert "| \\x1b\\]0;title\\x07 |" in card
    assert "| a\\u202eb |" in card
    assert "| \\x9b2J |" in card
    assert "cachefuse predict --run name\\x1b\n" in card
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", card)


def test_many_classes_are_cut(toy_store):
    run = train_head(toy_store(), TrainConfig(**QUICK))
    run.classes, run.thresholds = tuple(f"class {c}" for c in range(1000)), np.full(1000, 0.5)
    card = model_card(run)
    assert "and 900 more, in `run.json`" in card
    assert len(card) < 20_000
