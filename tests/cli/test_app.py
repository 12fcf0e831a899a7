import json
import subprocess
import sys

import pytest

from cachefuse import __version__
from cachefuse_cli.app import COMMANDS
from fixtures.messages import says


def test_help_lists_the_commands(cachefuse, fits):
    result = cachefuse("--help")
    assert result.code == 0
    assert all(f" {command} " in result.out for command in COMMANDS)
    fits(result.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, cachefuse, fits):
    result = cachefuse(command, "-h")
    assert (result.code, result.err) == (0, "")
    assert f"Usage: cachefuse {command} " in result.out
    fits(result.out)


def test_version(cachefuse):
    assert cachefuse("--version").out == f"{__version__}\n"


@pytest.mark.parametrize("args", [["nope"], ["extract"], ["train-head", "--epochs", "many"], ["predict", "--nope"]])
def test_wrong_usage_exits_with_2(args, cachefuse):
    result = cachefuse(*args)
    assert (result.code, result.out) == (2, "")
    assert says(result.err, "Usage")


def test_an_error_is_one_line_on_stderr(cachefuse):
    result = cachefuse("train-head", "--dataset", "mine")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1


def test_a_second_ctrl_c_changes_nothing():
    """It may come while the first is told of, or while the process ends."""
    script = """
import atexit, os, signal, typer
from cachefuse_cli.shared import render

interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
atexit.register(interrupt)
try:
    with render.interruptible("go on"):
        interrupt()
except typer.Exit as ended:
    interrupt()
    raise SystemExit(ended.exit_code)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "note: interrupted; go on\n")


def test_a_ctrl_c_in_a_destructor_is_not_lost():
    """Python prints and forgets what is raised there."""
    script = """
import os, signal, sys, time, typer
from cachefuse_cli.shared import render
from cachefuse_cli.shared.console import on_unraisable

class Dies:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

class Breaks:
    def __del__(self):
        raise AttributeError("half built")

sys.unraisablehook = on_unraisable
try:
    with render.interruptible("go on"):
        Dies()
        time.sleep(30)
except typer.Exit as ended:
    Breaks()
    raise SystemExit(ended.exit_code)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (130, "note: interrupted; go on\n")


@pytest.mark.slow
def test_debug_shows_the_traceback(folder):
    script = "import sys; from cachefuse_cli.app import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "train-head", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert says(result.stderr, "CacheError workspace")


def test_presets_are_listed_and_shown_with_their_sources(cachefuse, fits):
    listed = cachefuse("presets")
    assert listed.code == 0
    fits(listed.out)
    assert all(name in listed.out for name in ("cma-paper", "lit-table", "cbmf-paper"))
    shown = cachefuse("presets", "lit-paper")
    fits(shown.out)
    assert says(shown.out, "lr 5e-05 section 4.1 max-tokens 256 chosen")
    found = json.loads(cachefuse("presets", "cbmf-paper", "--json").out)
    assert found["cbmf-paper"]["command"] == "align"
    wrong = cachefuse("presets", "cma-papre")
    assert (wrong.code, wrong.out) == (1, "")
    assert says(wrong.err, "cma-papre cma-paper")
