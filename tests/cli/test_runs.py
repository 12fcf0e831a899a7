import json
import logging
import re
import shutil

import pytest

from cachefuse.runs.files import list_runs
from cachefuse.runs.save import load_run
from fixtures.messages import says
from fixtures.runs import edit


@pytest.fixture
def several(cachefuse, workspace):
    """Three runs, the one made by the fixture the oldest."""
    cachefuse("train-head", "--head", "linear", "--epochs", "2", "--folds", "2", "--json")
    cachefuse("train-head", "--head", "linear", "--epochs", "2", "--fusion", "text", "--json")
    return workspace / "runs"


def test_lists_the_latest_first_with_the_metrics_of_rows_held_out(several):
    found = list_runs(several)
    assert [run.name for run in found] == ["mine-text-linear-asl-1", "mine-sum-linear-asl-2", "mine-sum-linear-asl-1"]
    assert [run.split for run in found] == ["val", "oof", "val"]
    assert [run.n_models for run in found] == [1, 2, 1]
    for run in found:
        whole = load_run(run.path)
        assert run.metrics == whole.metrics[run.split]
        assert run.n_rows == len(whole.held_out.rows)
        assert run.size_mb == pytest.approx(whole.size_mb, abs=1e-6)
        assert (run.dataset, run.created) == ("mine", whole.created)


def test_shows_them_as_a_table(cachefuse, several, fits):
    result = cachefuse("runs")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].strip() == "mine: 3 runs, measured on rows held out"
    assert lines[3].startswith("mine-text-linear-asl-1 ")
    assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d, 1 model, val", lines[4])
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d, 2 models, oof; [a-z0-9 ;-]*folds 2", " ".join(result.out.split()))
    newest = list_runs(several)[0]
    values = [f"{newest.metrics[name]:.3f}" for name in ("micro_f1", "macro_f1", "samples_f1", "macro_ap")]
    assert lines[3].split()[1:] == [str(newest.n_rows), *values, f"{newest.size_mb:.2f}"]
    fits(result.out)


def test_as_json(cachefuse, several):
    found = json.loads(cachefuse("runs", "--json").out)
    assert [run["name"] for run in found] == [run.name for run in list_runs(several)]
    assert found[0]["metrics"] == list_runs(several)[0].metrics
    assert found[0]["path"] == "workspace/runs/mine-text-linear-asl-1"


def test_only_those_of_a_dataset_and_a_table_for_each(cachefuse, several, fits):
    edit(several / "mine-sum-linear-asl-1" / "run.json", dataset="other_x")
    result = cachefuse("runs")
    assert "mine: 2 runs" in result.out
    assert "other_x: 1 run, " in result.out
    fits(result.out)
    for dataset, names in {
        "mine": ["mine-text-linear-asl-1", "mine-sum-linear-asl-2"],
        "./mine.toml": ["mine-text-linear-asl-1", "mine-sum-linear-asl-2"],
        "other_x": ["mine-sum-linear-asl-1"],
        "none": [],
    }.items():
        assert [run["name"] for run in json.loads(cachefuse("runs", "--dataset", dataset, "--json").out)] == names


def test_a_run_that_held_out_nothing_is_listed_without_figures(cachefuse, several):
    path = several / "mine-text-linear-asl-1" / "run.json"
    edit(path, results={"train": json.loads(path.read_text())["results"]["train"]})
    assert (list_runs(several)[0].split, list_runs(several)[0].metrics) == (None, {})
    lines = cachefuse("runs").out.splitlines()
    assert lines[3].split()[1:-1] == ["-"] * 5
    assert ", 1 model; epochs 2" in " ".join(lines[4:6])


def test_damaged_runs_are_named_and_passed_over(cachefuse, several, caplog):
    names = [f"mine-sum-linear-asl-{n}" for n in range(1, 10)]
    for name in names[2:]:
        shutil.copytree(several / names[0], several / name)
    (several / names[2] / "run.json").write_text("{")
    (several / names[3] / "run.json").unlink()
    (several / names[4] / "model.safetensors").unlink()
    edit(several / names[5] / "run.json", format=1)
    edit(several / names[6] / "run.json", results={"val": {"n_rows": "many"}})
    (several / names[7] / "run.json").write_bytes(b"\xff\xfe[")
    edit(several / names[8] / "run.json", members=[])
    (several / "notes").mkdir()
    (several / "notes" / "read.me").write_text("no run")
    with caplog.at_level(logging.WARNING):
        found = list_runs(several)
    assert [run.name for run in found] == ["mine-text-linear-asl-1", names[1], names[0]]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 7
    for message, (name, reason) in zip(
        messages,
        {
            names[2]: "run.json: cannot be read",
            names[3]: "run.json is missing",
            names[4]: "model.safetensors is missing",
            names[5]: "run of another version (format 1, not 3)",
            names[6]: "run.json: has a wrong value: results.val.n_rows",
            names[7]: "run.json: cannot be read",
            names[8]: "run.json: has a wrong value: members",
        }.items(),
        strict=True,
    ):
        assert message.startswith(f"skipped: {several / name}")
        assert reason in message
    result = cachefuse("runs")
    assert result.code == 0
    assert result.err.count("note: skipped: workspace/runs/") == 7
    assert "mine: 3 runs" in result.out


def test_says_where_to_start(cachefuse, several):
    empty = cachefuse("runs", "--dataset", "none")
    assert (empty.code, empty.out) == (0, "")
    assert says(empty.err, "note none workspace/runs train-head")
    shutil.rmtree(several)
    assert says(cachefuse("runs").err, "note workspace/runs train-head")
    assert json.loads(cachefuse("runs", "--json").out) == []
