import csv
import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from cachefuse.runs.save import load_run
from fixtures.messages import says


@pytest.fixture
def two(cachefuse, workspace):
    cachefuse("train-head", "--head", "linear", "--epochs", "20", "--fusion", "concat", "--json")
    return ["mine-sum-linear-asl-1", "mine-concat-linear-asl-1"]


def test_joins_runs_and_shows_them_side_by_side(cachefuse, workspace, two, fits):
    result = cachefuse("ensemble", *two)
    assert (result.code, result.err) == (0, "")
    joined = load_run(workspace / "runs" / "mine-ensemble-1")
    assert joined.sources == tuple(two)
    lines = result.out.splitlines()
    assert re.split(" {2,}", lines[0].strip()) == ["run", "held out", "micro-F1", "macro-F1", "samples-F1", "macro-AP"]
    names = ("micro_f1", "macro_f1", "samples_f1", "macro_ap")
    for line, name in zip(lines[1:4], [*two, "mine-ensemble-1"], strict=True):
        run = load_run(workspace / "runs" / name)
        rows = f"{len(run.held_out.rows)} val"
        assert re.split(" {2,}", line.strip()) == [name, rows, *(f"{run.metrics['val'][m]:.3f}" for m in names)]
    assert f"2 models, {joined.n_parameters:,} parameters in total" in result.out
    fits(result.out)


def test_the_ensemble_predicts_and_evaluates_like_any_run(cachefuse, workspace, two):
    found = json.loads(cachefuse("ensemble", *two, "--thresholds", "class", "--json").out)
    assert (found["run"], found["models"], found["sources"]) == ("mine-ensemble-1", 2, two)
    assert len(set(found["thresholds"])) > 1
    assert cachefuse("predict", "--run", "mine-ensemble-1").code == 0
    with Path("submission.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 41
    assert cachefuse("predict", "--text", "an oak thing").code == 0
    evaluated = json.loads(cachefuse("evaluate", "--no-intervals", "--json").out)
    assert evaluated["run"] == "mine-ensemble-1"
    assert {name: evaluated["metrics"][name] for name in found["metrics"]["val"]} == found["metrics"]["val"]
    assert json.loads(cachefuse("runs", "--json").out)[0]["name"] == "mine-ensemble-1"
    without = cachefuse("evaluate", "--drop-modality", "image", "--no-intervals")
    assert without.code == 0
    assert "without image" in without.out


def test_rows_that_differ_are_told_and_nothing_stands_out(cachefuse, workspace, two):
    cachefuse("train-head", "--head", "linear", "--epochs", "2", "--folds", "2", "--json")
    result = cachefuse("ensemble", two[0], "mine-sum-linear-asl-2")
    assert result.code == 0
    assert says(result.err, "note mine-sum-linear-asl-2 mine-sum-linear-asl-1")
    assert re.search(r"^mine-ensemble-1 +- +- +- +- +-$", result.out, flags=re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mine-sum-linear-asl-1"], "2 1"),
        (["mine-sum-linear-asl-1", "workspace/runs/mine-sum-linear-asl-1"], "mine-sum-linear-asl-1"),
        (["mine-sum-linear-asl-1", "nope"], "nope workspace/runs"),
        (["mine-sum-linear-asl-1", "mine-concat-linear-asl-1", "--thresholds", "best"], "thresholds"),
        (["mine-sum-linear-asl-1", "mine-concat-linear-asl-1", "--device", "tpu"], "device tpu"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace, two):
    result = cachefuse("ensemble", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert not (workspace / "runs" / "mine-ensemble-1").exists()


def test_takes_runs(cachefuse):
    assert cachefuse("ensemble").code == 2


def test_the_best_of_a_column_stands_out_and_a_lower_calibration_error_is_better(
    cachefuse, workspace, two, monkeypatch
):
    from rich.console import Console

    from cachefuse_cli.shared import eval_tables

    runs = [load_run(workspace / "runs" / name) for name in two]
    manifest = runs[0].manifest.model_copy(update={"metrics": ("micro_f1", "calibration_error", "macro_ap")})
    figures = [(0.7, 0.2, np.nan), (0.6, 0.1, 0.4), (0.7, 0.3, np.nan)]
    everyone = []
    for run, values in zip([*runs, replace(runs[0], name="joined")], figures, strict=True):
        metrics = dict(zip(manifest.metrics, values, strict=True))
        everyone.append(replace(run, manifest=manifest, results={"val": replace(run.results["val"], metrics=metrics)}))
    console = Console(width=80, force_terminal=True, color_system="standard", record=True, file=StringIO())
    monkeypatch.setattr(eval_tables, "out", lambda: console)
    eval_tables.ensemble_report(everyone[-1], everyone[:-1])
    shown = console.export_text(styles=True)
    assert re.findall(r"\x1b\[1;32m *(\S+?)\x1b", shown) == ["0.700", "0.100", "0.400", "0.700"]
