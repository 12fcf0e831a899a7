"""Commands on a damaged run: one line that names the file, and never another run in its place."""

import json
import os
import shutil

import pytest

from fixtures.messages import says
from fixtures.runs import without_checksums

FIRST = "mine-sum-linear-asl-1"


@pytest.fixture
def runs(cachefuse, workspace):
    """The run of the fixture, and a newer one."""
    shutil.copytree(workspace / "runs" / FIRST, workspace / "runs" / "older")
    cachefuse("train-head", "--head", "linear", "--epochs", "2", "--fusion", "text")
    return workspace / "runs"


COMMANDS = [
    ["predict", "--run", FIRST],
    ["predict", "--run", FIRST, "--text", "an oak thing"],
    ["evaluate", "--run", FIRST],
    ["evaluate", "--run", "older", "--against", FIRST],
    ["report", "--run", FIRST],
    ["ensemble", "older", FIRST],
]


@pytest.mark.parametrize("name", ["run.json", "history.json", "model.safetensors", "held_out.safetensors"])
def test_every_command_names_the_damaged_file(name, cachefuse, runs, folder):
    file = runs / FIRST / name
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    for command in COMMANDS:
        result = cachefuse(*command)
        assert (result.code, result.out) == (1, ""), command
        assert says(result.error, f"workspace/runs/{FIRST}/{name}"), command
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    listed = cachefuse("runs", "--json")
    assert FIRST not in [run["name"] for run in json.loads(listed.out)]
    assert says(listed.err, f"note workspace/runs/{FIRST}/{name}")


@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_no_command_takes_an_older_run_in_place_of_the_damaged_latest(name, cachefuse, runs, folder):
    file = runs / "mine-text-linear-asl-1" / name
    file.unlink()
    os.mkfifo(file)
    for command in (["predict"], ["predict", "--text", "an oak thing"], ["evaluate"], ["report"]):
        result = cachefuse(*command)
        assert (result.code, result.out) == (1, ""), command
        assert says(result.error, f"workspace/runs/mine-text-linear-asl-1/{name}"), command
    assert not (folder / "submission.csv").exists()
    assert cachefuse("predict", "--run", FIRST).code == 0
    shutil.rmtree(file.parent)
    assert cachefuse("predict").code == 0


def test_a_run_without_checksums_is_said_once_a_command(cachefuse, runs):
    for path in runs.iterdir():
        without_checksums(path)
    for command in (["evaluate", "--run", "older", "--against", FIRST], ["runs"], ["predict"]):
        result = cachefuse(*command)
        assert result.code == 0
        notes = " ".join(result.err.split()).split("note: ")
        assert sum("checksums" in note for note in notes) == 1, command


def test_what_a_killed_writer_left_is_removed_by_the_next_one(cachefuse, runs):
    (runs / ".new-killed" / "run").mkdir(parents=True)
    (runs / ".new-killed" / "run" / "model.safetensors").write_bytes(b"half")
    (runs / "older" / ".README.md.1.tmp").write_bytes(b"half")
    cachefuse("ensemble", "older", FIRST)
    assert not list(runs.rglob(".*"))
    assert (runs / "mine-ensemble-1" / "run.json").is_file()
