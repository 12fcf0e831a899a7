"""Slow tests are left out unless ``-m`` or a test is given, and the last line says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN_SLOW = "python -m pytest -n 2 --dist worksteal -m slow"
TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_slow(n): pass

@pytest.mark.one_in(3)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cases(n): pass
"""


def run(folder, *options):
    """Run seven tests, of which four are slow; return how the run ended, and its last two lines."""
    shutil.copy(ROOT / "tests" / "fixtures" / "slow_tests.py", folder / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n  one_in")
    (folder / "test_seven.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # zarr's takes seconds
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize("options", [(), ("-n", "2", "-q")], ids=" ".join)
def test_the_last_line_says_what_was_left_out(options, tmp_path):
    summary, last = run(tmp_path, *options)
    assert "3 passed" in summary
    assert last == f"slow tests left out: 4; run them with: {RUN_SLOW}"


@pytest.mark.parametrize(
    ("options", "n"),
    [
        (("-m", "slow"), 4),
        (("-m", "slow or not slow"), 7),
        (("test_seven.py::test_slow",), 2),
        (("-n", "2", "test_seven.py::test_slow[1]"), 1),
    ],
    ids=["slow", "all", "named", "one"],
)
@pytest.mark.one_in(2)
def test_what_is_asked_for_is_run(options, n, tmp_path):
    _, last = run(tmp_path, *options)
    assert f"{n} passed" in last


def test_the_command_is_the_readme_s_and_ci_runs_it():
    (command,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install -e"))
    assert command.partition("&& ")[2] + " -m slow" == RUN_SLOW
    assert 'slow_command="${test_command#*&& } -m slow"' in (ROOT / ".ci" / "run").read_text()
