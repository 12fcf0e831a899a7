"""A run that is of no use before another one is written: it is in no list, and a killed writer's is removed."""

import subprocess
import sys

import pytest

from cachefuse.errors import RunError
from cachefuse.runs.files import find_run
from cachefuse.runs.folder import HISTORY, WEIGHTS, finish_run, run_folders, write_run

FILES = {HISTORY: b"{}", WEIGHTS: b""}
WRITE = """
import os, sys
from pathlib import Path
from cachefuse.runs.folder import HISTORY, WEIGHTS, write_run

write_run(Path(sys.argv[1]), "tuned", {"kind": "alignment"}, {HISTORY: b"{}", WEIGHTS: b""}, unfinished=True)
print("written", flush=True)
sys.stdin.readline()
os._exit(9)
"""


def test_the_next_writer_removes_it_once_its_writer_is_gone(tmp_path):
    command = [sys.executable, "-c", WRITE, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        write_run(tmp_path, "other", {"kind": "head"}, FILES)
        assert (tmp_path / "tuned-1").is_dir()  # its writer is at work
        assert [path.name for path in run_folders(tmp_path)] == ["other-1"]
        writer.communicate("end\n")
    write_run(tmp_path, "other", {"kind": "head"}, FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "other-2"]


def test_it_counts_once_it_is_finished(tmp_path):
    path = write_run(tmp_path, "tuned", {"kind": "alignment", "format": 1, "created": ""}, FILES, unfinished=True)
    with pytest.raises(RunError, match="no alignments"):
        find_run(tmp_path, kind="alignment")
    finish_run(path)
    assert find_run(tmp_path, kind="alignment") == path
