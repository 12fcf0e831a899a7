"""`cachefuse auto`, on a terminal of 80 columns."""

import json

import pytest

from cachefuse.experiments import halving
from cachefuse.experiments.candidates import candidates
from cachefuse.training.train import train_model
from fixtures.messages import says

QUICK = ("auto", "--trials", "2", "--folds", "2")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr("cachefuse.experiments.auto.RESAMPLES", 20)
    monkeypatch.setattr(halving, "candidates", lambda *args: candidates(*args)[:2])


def test_a_leaderboard_what_was_chosen_and_a_run(cachefuse, workspace, folder, fits):
    result = cachefuse(*QUICK)
    assert (result.code, result.err.count("\n")) == (0, 1), result.err
    lines = result.out.splitlines()
    assert lines[0].strip() == "120 rows, each scored by models that have not seen it, on up to 2 folds"
    assert lines[1].split() == ["model", "weight", "micro-F1", "95%", "log", "loss", "s", "MB", "ms/item"]
    assert lines[2].startswith("the mix")
    assert {line.split()[0] for line in lines[3:5]} == {"kernel-ridge-bce", "sum-mlp-bce"}
    fits("\n".join(lines[:5]))
    assert says(result.out, "lowest log loss rows held out")
    assert says(result.out, "Of 2 candidates, 2 trained on all 2 folds")
    runs = workspace / "runs"
    assert (runs / "mine-auto-1" / "leaderboard.csv").is_file()
    assert cachefuse("predict", "--output", "out.csv").code == 0
    assert cachefuse("report", "--output", "page.html").code == 0
    assert says((folder / "page.html").read_text(), "How it was found")
    values = json.loads(cachefuse(*QUICK, "--json").out)
    assert values["run"] == "mine-auto-2"
    assert [entry["n_folds"] for entry in values["leaderboard"]["entries"]] == [2, 2]


def test_an_interrupt_keeps_the_trials(cachefuse, workspace, monkeypatch):
    trained = []

    def stops(*args, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(train_model(*args, **options))
        return trained[-1]

    monkeypatch.setattr(halving, "train_model", stops)
    result = cachefuse(*QUICK)
    assert result.code == 130
    assert says(result.err, "interrupted finished trials are kept same command again to go on")
    assert not list((workspace / "runs").glob("*auto*"))
    assert len((workspace / "sweeps" / "mine-auto" / "trials.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--minutes", "0"), "minutes above 0"),
        (("--trials", "0"), "trials at least 1"),
        (("--folds", "1"), "folds 2"),
        (("--max-size-mb", "0.000001"), "no candidate within smallest"),
        (("--max-ms", "0"), "max-ms above 0"),
        (("--thresholds", "some"), "thresholds some"),
        (("--encoder", "nothing"), "nothing not in this store"),
    ],
)
def test_bad_options_are_one_line(cachefuse, workspace, args, message):
    result = cachefuse(*QUICK[:1], *args, *(QUICK[1:3] if "--trials" not in args and "--minutes" not in args else ()))
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
