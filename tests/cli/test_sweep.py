import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from cachefuse.experiments.presets import GREEDY, PRESETS
from cachefuse.experiments.token_presets import TOKEN_PRESETS
from cachefuse_cli.commands.sweep import PRESET_NAMES
from fixtures.messages import says

QUICK = ("--head", "linear", "--epochs", "2", "--patience", "0", "--seeds", "2")
LOSSES = ("--grid", "loss=bce,asl")


def folders(workspace):
    return sorted(path.name for path in (workspace / "sweeps").iterdir())


def test_a_table_and_files(cachefuse, workspace, fits):
    result = cachefuse("sweep", *QUICK, *LOSSES, "--grid", "dropout=0,0.5", "--name", "mine/one")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].strip() == "mine"
    assert re.fullmatch(r"mean ± std of 2 seeds, \d\d rows of val", lines[1].strip())
    assert re.split(r"  +", lines[2].strip()) == [
        "loss, dropout", "micro-F1", "macro-F1", "samples-F1", "macro-AP", "s"
    ]  # fmt: skip
    assert [line.split("  ")[0].strip() for line in lines[3:7]] == ["bce, 0", "bce, 0.5", "asl, 0", "asl, 0.5"]
    assert re.search(r" 0\.\d{3}±\.\d{3} ", lines[3])
    assert lines[-1] == "wrote workspace/sweeps/mine-one"
    names = sorted(path.name for path in (workspace / "sweeps" / "mine-one").iterdir())
    assert names == [".lock", "summary.csv", "sweep.png", "sweep.svg", "trials.csv", "trials.jsonl"]
    fits(result.out)


@pytest.mark.slow
def test_goes_on(cachefuse, workspace):
    args = ("sweep", *QUICK, "--head", "mlp", "--layers", "4", "--grid", "lr=0.1,0.2")
    first = cachefuse(*args)
    (name,) = folders(workspace)
    journal = workspace / "sweeps" / name / "trials.jsonl"
    before = journal.read_bytes()
    assert cachefuse(*args).out == first.out
    assert journal.read_bytes() == before
    journal.write_bytes(before[:-30])
    assert cachefuse(*args, "--seeds", "3").code == 0
    assert folders(workspace) == [name]
    assert len(journal.read_bytes().splitlines()) == 4 + 2  # those that were whole or run again, and the new ones


def test_as_json(cachefuse, workspace):
    result = cachefuse("sweep", *QUICK, "--seed", "7", "--grid", "layers=4 4,4", "--head", "mlp", "--json")
    report = json.loads(result.out)
    (sweep,) = report["sweeps"]
    assert report["run"] is None
    assert report["path"].startswith("workspace/sweeps/mine-")
    assert [setting["setting"] for setting in sweep["settings"]] == [{"layers": [4]}, {"layers": [4, 4]}]
    assert (sweep["seeds"], sweep["split"]) == ([7, 8], "val")
    for setting in sweep["settings"]:
        figures = [trial["metrics"]["micro_f1"] for trial in setting["trials"]]
        assert setting["mean"]["micro_f1"] == pytest.approx(sum(figures) / 2)
        assert setting["diverged"] == 0


def test_one_seed_and_folds(cachefuse, workspace):
    result = cachefuse("sweep", *QUICK, "--seeds", "1", "--folds", "2", "--grid", "batch-size=all,16")
    assert "one seed, 120 rows of oof" in result.out
    assert re.search(r"^all  .* 0\.\d{3}  ", result.out, re.MULTILINE)
    assert re.search(r"^16  ", result.out, re.MULTILINE)


@pytest.mark.slow
def test_what_diverges(cachefuse, workspace, fits):
    args = ("--optimizer", "sgd", "--epochs", "20", "--grid", "lr=0.01,1e6")
    result = cachefuse("sweep", *QUICK, *args)
    assert re.search(r"^1e\+06 +diverged +- +- +- ", result.out, re.MULTILINE)
    assert re.search(r"^1e\+06, seed 0, 1: training diverged", result.out, re.MULTILINE)
    assert "0.000±" not in result.out
    report = json.loads(cachefuse("sweep", *QUICK, *args, "--json").out)
    wild = report["sweeps"][0]["settings"][1]
    assert (wild["diverged"], wild["mean"]["micro_f1"], wild["std"]["micro_f1"]) == (2, None, None)


def test_settings_from_a_file(cachefuse, workspace):
    (workspace.parent / "tried.toml").write_text(
        """
        [[setting]]
        loss = "focal"
        loss-options = { gamma = 1 }
        [[setting]]
        head = "mlp"
        layers = [8, 4]
        batch_size = "all"
        [[setting]]
        """
    )
    args = ("--epochs", "2", "--patience", "0", "--head", "linear", "--seeds", "1")
    report = json.loads(cachefuse("sweep", "--settings", "tried.toml", *args, "--json").out)
    (sweep,) = report["sweeps"]
    first, second, third = (setting["setting"] for setting in sweep["settings"])
    assert (first["loss"], first["loss_options"], first["head"]) == ("focal", {"gamma": 1.0}, "linear")
    assert (second["head"], second["layers"], second["batch_size"]) == ("mlp", [8, 4], 0)
    assert (third["head"], third["layers"]) == ("linear", [])
    table = cachefuse("sweep", "--settings", "tried.toml", *args)
    assert "gamma=1" in table.out


@pytest.mark.parametrize(
    "wide", [("--grid", "dropout=0.1,0.2", "--grid", "layers=1024-512-256-128,8", "--grid", "weight-decay=0.0001,0")]
)
@pytest.mark.slow
def test_fits_on_a_terminal(wide, cachefuse, workspace, fits):
    result = cachefuse("sweep", "--epochs", "1", "--seeds", "1", "--grid", "class_weights=balanced,effective", *wide)
    assert result.code == 0
    fits(result.out)


def test_the_presets_are_listed():
    assert PRESET_NAMES.split(", ") == [*PRESETS, GREEDY, *TOKEN_PRESETS]


@pytest.mark.parametrize("seeds", ["0", "-3", "99999999999999999999"])
def test_seeds_out_of_range_are_usage_errors(seeds, cachefuse, workspace):
    result = cachefuse("sweep", *LOSSES, "--seeds", seeds)
    assert result.code == 2
    assert says(result.err, "--seeds")
    assert re.search("than or equal to 1|1<=x<=1000", result.err)  # in the words of either version of Typer


def test_the_help_keeps_what_stands_in_brackets(cachefuse):
    assert "[[setting]]" in cachefuse("sweep", "--help").out
    assert "[@weights]" in cachefuse("extract", "--help").out


def test_a_preset(cachefuse, workspace, fits):
    result = cachefuse("sweep", "--preset", "mmc-fusion", "--epochs", "1", "--layers", "4", "--seeds", "1")
    assert result.code == 0
    assert result.out.startswith("MMC table 3: fusion")
    assert re.search(r"^sum .* 0\.863$", result.out, re.MULTILINE)
    assert "paper: samples-F1 of 5,000 rows" in result.out
    assert folders(workspace) == ["mine-mmc-fusion"]
    assert "0.86338" in (workspace / "sweeps" / "mine-mmc-fusion" / "summary.csv").read_text()
    fits(result.out)


@pytest.mark.slow
def test_the_greedy_preset_ends_in_a_run(cachefuse, workspace, monkeypatch, fits):
    from dataclasses import replace

    from cachefuse.experiments import presets

    for name, settings in {
        "mmc-layers": [{"layers": (4,)}, {"layers": (8, 4)}],
        "mmc-batch": [{"batch_size": 5_000, "lr": 0.1}],
        "mmc-epochs": [{"epochs": 3}, {"epochs": 4}],
    }.items():
        small = replace(PRESETS[name], settings=settings, published=[(0.5, 0.1)] * len(settings))
        monkeypatch.setitem(presets.PRESETS, name, small)
    monkeypatch.setattr(presets, "BASE", replace(presets.BASE, epochs=2))
    result = cachefuse("sweep", "--preset", "mmc-greedy", "--seeds", "1")
    assert (result.code, result.out.count("MMC table")) == (0, 5)
    best = r"labelled row: layers (4|8,4), batch_size \d\d, lr 0.1, epochs (3|4), activation "
    assert re.search(best, " ".join(result.out.split()))
    assert (workspace / "runs" / "mine-sum-mlp-bce-1" / "run.json").is_file()
    assert cachefuse("predict").code == 0
    fits(result.out)
    report = json.loads(cachefuse("sweep", "--preset", "mmc-greedy", "--seeds", "1", "--json").out)
    assert len(report["sweeps"]) == 5
    assert report["run"]["run"] == "mine-sum-mlp-bce-2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--grid --settings --preset"),
        ((*LOSSES, "--preset", "mmc-losses"), "--grid --settings --preset"),
        (("--grid", "loss"), "dropout=0,0.5 loss"),
        (("--grid", "loss="), "loss asl bce ce focal"),
        (("--grid", "=1"), "setting"),
        (("--grid", "dropout=0,,1"), "dropout"),
        (("--grid", "dropout=0,1"), "dropout 0 1 1.0"),
        (("--grid", "droput=0,1"), "droput dropout"),
        (("--grid", "epochs=two"), "epochs two"),
        (("--grid", "layers=8"), "head linear layers 8"),
        (("--grid", "seed=1,2"), "seed"),
        ((*LOSSES, *LOSSES), "loss"),
        ((*LOSSES, "--loss", "asl"), "loss --loss"),
        ((*LOSSES, "--refit"), "refit"),
        ((*LOSSES, "--dataset", "other"), "other workspace"),
        (("--settings", "none.toml"), "none.toml"),
        (("--preset", "mmc-losse"), "preset mmc-losse mmc-losses"),
        (("--preset", "mmc-losses", "--loss", "asl"), "preset loss"),
        (("--preset", "mmc-greedy"), "preset epochs"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace):
    result = cachefuse("sweep", *QUICK, *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert not (workspace / "sweeps").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setting = [", "tried.toml TOML"),
        (b"\xff", "tried.toml TOML"),
        ("", "tried.toml"),
        ("setting = 3", "tried.toml"),
        ("setting = [3]", "tried.toml"),
        ("[[setting]]\nlr = 1\n[other]", "tried.toml"),
        ("[[setting]]\nlr = 'x'", "lr x"),
        ("[[setting]]\nlr = true\nlosss = 1", "losss"),
        ("[[setting]]\nloss = 'asl'\nloss-options = { clipp = 1 }", "loss asl clipp"),
        (
            "[[setting]]\nloss-options = { clip = 'x' }",
            "loss clip x",
        ),
        ("setting = []", "setting seed"),
    ],
)
@pytest.mark.one_in(2)
def test_a_file_of_settings_that_is_none(text, message, cachefuse, workspace):
    path = workspace.parent / "tried.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = cachefuse("sweep", *QUICK, "--settings", "tried.toml")
    assert result.code == 1
    assert says(result.error, message)


COMMAND = (sys.executable, "-c", "import sys; from cachefuse_cli.app import main; main(sys.argv[1:])", "sweep")
ENDLESS = ("--head", "mlp", "--layers", "4", "--patience", "0", "--seeds", "1", "--grid", "epochs=2,3,1000000")


def wait_for_lines(workspace, n, process):
    deadline = time.monotonic() + 600
    while True:
        found = [path.read_bytes().splitlines() for path in workspace.glob("sweeps/*/trials.jsonl")]
        if found and len(found[0]) >= n:
            return found[0]
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_sigint_in_a_real_process(workspace, folder):
    process = subprocess.Popen([*COMMAND, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        kept = wait_for_lines(workspace, 2, process)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "note: interrupted; finished trials are kept; run the same command again to resume"
    assert wait_for_lines(workspace, 2, process) == kept


@pytest.mark.slow
def test_the_table_fills_on_a_terminal(workspace, folder):
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update(COLUMNS="80", LINES="30", TERM="xterm-256color")
        os.execv(sys.executable, [*COMMAND, *QUICK, "--head", "mlp", "--layers", "4", "--grid", "lr=0.1,0.2"])
    written = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert re.search(r"trials .* 4/4", text)
    before, _, after = text.rpartition("mean ± std of 2 seeds")
    assert "mean ± std of 2 seeds" in before
    assert len(re.findall(r"^0\.[12] ", after, re.MULTILINE)) == 2
