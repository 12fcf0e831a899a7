import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fixtures.messages import says

QUICK = ("--head", "linear", "--epochs", "2")


def test_trains_on_what_was_extracted_last(cachefuse, workspace, fits):
    result = cachefuse("train-head", *QUICK)
    assert (result.code, result.err) == (0, "run mine-sum-linear-asl-2: sum of classic (image), classic (text)\n")
    assert "micro-F1" in result.out
    assert "classes on val" in result.out
    assert "next  cachefuse predict" in result.out
    fits(result.out)


def test_as_json(cachefuse, workspace):
    result = cachefuse("train-head", *QUICK, "--fusion", "mixed", "--loss", "asl", "--json")
    run = json.loads(result.out)
    assert run["run"] == "mine-mixed-linear-asl-1"
    assert (workspace / "runs" / run["run"] / "run.json").is_file()
    assert set(run["metrics"]) == {"train", "val"}
    assert len(run["per_class"]["val"]["f1"]) == len(run["classes"]) == 11


def test_finds_the_dataset_by_its_manifest(cachefuse, workspace):
    assert cachefuse("train-head", *QUICK, "--dataset", "./mine.toml", "--batch-size", "all").code == 0
    assert cachefuse("train-head", *QUICK, "--dataset", "mine", "--encoder", "classic", "--layers", "").code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--fusion", "smu"],
            "fusion smu sum cma concat gated image",
        ),
        (["--head", "ml"], "head ml"),
        (["--loss", "bc"], "loss bc"),
        (["--loss", "ce"], "loss ce"),
        (["--activation", "rel"], "rel"),
        (["--optimizer", "adan"], "optimizer adan"),
        (["--encoder", "bert"], "bert classic"),
        (["--dataset", "other"], "other extract --dataset"),
        (["--lr", "0"], "lr 0"),
        (["--lr", "1e39"], "lr 0 1e+06 1e+39"),
        (["--epochs", "0"], "epochs 1 1e+09"),
        (["--batch-size", "0"], "batch-size 1 0"),
        (["--batch-size", "²"], "batch-size 1 ²"),
        (["--layers", "8,x"], "layers 2048,512 8,x"),
        (["--layers", "8"], "head linear layers 8 mlp"),
        (["--seed", "-1"], "seed 0 2^63 1"),
        (["--device", "gpu"], "device gpu"),
        (["--lr", "1e6", "--optimizer", "sgd"], "lr"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace):
    before = sorted((workspace / "runs").iterdir())
    result = cachefuse("train-head", *QUICK, *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert sorted((workspace / "runs").iterdir()) == before


def test_says_where_to_start(cachefuse):
    result = cachefuse("train-head")
    assert says(result.error, "workspace extract --dataset NAME")


def test_says_that_features_are_incomplete(cachefuse, workspace):
    shutil.rmtree(workspace / "cache" / "mine.zarr" / "features" / "classic" / "image" / "pooled" / "c")
    result = cachefuse("train-head", *QUICK)
    assert says(result.error, "classic image block 0 damaged verify --repair")


def interrupt_after(epochs, monkeypatch):
    import cachefuse_cli.shared.progress as progress

    real = progress.TrainProgress.update

    def update(self, now):
        real(self, now)
        if now.epoch.epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.TrainProgress, "update", update)


def test_an_interrupt_keeps_a_usable_run(cachefuse, workspace, monkeypatch):
    interrupt_after(2, monkeypatch)
    result = cachefuse("train-head", "--head", "linear", "--json")
    assert result.code == 130
    run = json.loads(result.out)
    assert says(result.err, f"note {run['best_epochs'][0]}")
    assert says(cachefuse("predict").err, f"{run['run']}")


def test_an_interrupt_before_the_first_epoch_writes_nothing(cachefuse, workspace, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cachefuse.training.data.load_table", stop)
    result = cachefuse("train-head", *QUICK)
    assert (result.code, result.out) == (130, "")
    assert says(result.err, "note interrupted")
    assert len(list((workspace / "runs").iterdir())) == 1


SIGNALLED = """
import sys
from cachefuse_cli import app
from cachefuse_cli.shared import progress
real = progress.TrainProgress.update
def update(self, now):
    real(self, now)
    print("epoch", now.epoch.epoch, file=sys.stderr, flush=True)
progress.TrainProgress.update = update
app.main(["train-head", "--epochs", "1000000", "--patience", "0", "--layers", "8", "--json"])
"""


@pytest.mark.slow
def test_sigint_in_a_real_process(workspace, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stderr.readline() == "epoch 1\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert says(err, "interrupted epoch")
    assert (workspace / "runs" / json.loads(out)["run"] / "run.json").is_file()


def test_a_damaged_store_of_another_dataset_is_passed_over(cachefuse, workspace):
    damaged = workspace / "cache" / "other.zarr"
    damaged.mkdir()
    (damaged / "zarr.json").write_text("{")
    result = cachefuse("train-head", "--head", "linear", "--epochs", "1")
    assert result.code == 0
    assert says(result.err, "note workspace/cache/other.zarr damaged zarr.json")
    assert says(cachefuse("train-head", "--dataset", "other").error, "other.zarr damaged")


def test_more_than_fits_in_memory_is_one_line(cachefuse, workspace):
    result = cachefuse("train-head", "--layers", "1,1000000,1000000")
    assert says(result.error, "memory --batch-size --layers --limit")
    assert len(list((workspace / "runs").iterdir())) == 1


def test_threads(cachefuse, workspace):
    for number in ("1", "2"):
        cachefuse("train-head", "--fusion", "image", "--head", "linear", "--epochs", "2", "--threads", number)
        run = max((workspace / "runs").iterdir(), key=lambda path: (path / "run.json").stat().st_mtime_ns)
        (history,) = json.loads((run / "history.json").read_text())["histories"]
        assert [epoch["threads"] for epoch in history["epochs"]] == [int(number)] * 2


@pytest.mark.parametrize("value", ["0", "two"])
def test_no_number_of_threads(cachefuse, value, monkeypatch):
    assert cachefuse("train-head", "--threads", value).code == 2
    monkeypatch.setenv("CACHEFUSE_THREADS", value)
    result = cachefuse("train-head")
    assert result.code == 2
    assert "CACHEFUSE" in result.err


def test_calibration_is_reported_before_and_after(cachefuse, workspace, fits):
    args = "train-head", "--head", "linear", "--epochs", "2", "--calibrate", "temperature"
    result = cachefuse(*args)
    run = json.loads(cachefuse(*args, "--json").out)
    before, after = run["calibration_errors"]["calibration_error"]
    assert before > after
    line = f"calibrated (temperature): ECE {before:.3f} before, {after:.3f} after"
    assert line in result.out.splitlines()
    fits(result.out)
    evaluated = cachefuse("evaluate", "--no-intervals")
    assert f"calibrated: ECE {before:.3f} before, {after:.3f} after" in evaluated.out.splitlines()
    assert "ECE" in next(line for line in evaluated.out.splitlines() if line.startswith("class "))
    fits(evaluated.out)
    found = json.loads(cachefuse("evaluate", "--no-intervals", "--json").out)
    assert found["calibration_errors"] == run["calibration_errors"]
    assert found["metrics"]["calibration_error"] == after
    assert "calibrated on rows held out" in (workspace / "runs" / run["run"] / "README.md").read_text()
