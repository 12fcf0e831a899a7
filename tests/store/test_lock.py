"""One writer per store, on file systems with and without locks, also after a kill."""

import errno
import os
import signal
import subprocess
import sys

import pytest

WRITE = """
import fcntl, os, signal, subprocess, sys
from pathlib import Path
from cachefuse.errors import CacheError
from cachefuse.store.lock import only_writer

store, code, then = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def refuse(*arguments):
    raise OSError(code, os.strerror(code))

if code:
    fcntl.flock = refuse
try:
    with only_writer(store):
        if then == "again":
            subprocess.run([sys.executable, "-c", sys.argv[4], str(store), str(code), "end"], check=True)
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("wrote")
except CacheError as error:
    print(error)
"""


@pytest.mark.parametrize("code", [0, errno.ENOLCK, errno.ENOSYS], ids=["locks", "ENOLCK", "ENOSYS"])
def test_one_process_writes_at_a_time_and_a_killed_one_is_forgotten(tmp_path, code):
    def write(then):
        command = [sys.executable, "-c", WRITE, tmp_path / "x.zarr", str(code), then, WRITE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if then == "kill" else 0), done.stderr
        assert not done.stderr
        return done.stdout.splitlines()

    refused, wrote = write("again")
    assert refused.startswith("another extract (process ")
    assert str(tmp_path / "x.zarr") in refused
    assert wrote == "wrote"
    assert write("kill") == []
    assert write("end") == ["wrote"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".locked", ".writer"))]
