"""What a killed writer leaves, and who removes it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cachefuse.files import write_atomically
from cachefuse.temporary import OLD, sweep, sweep_files, temporary_folder

WRITER = """
import os, signal, sys, time
from pathlib import Path
from cachefuse.temporary import replacing, temporary_folder
folder = Path(sys.argv[1])
with replacing(folder / "file") as file, temporary_folder(folder, ".new-") as new:
    file.write(b"half")
    file.flush()
    (new / "half").write_bytes(b"half")
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that writes a file and a folder, and is in the middle of it."""
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def hidden(folder):
    return sorted(path.name[:5] for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_living_writer_holds_is_kept_and_what_a_killed_one_left_is_removed(tmp_path, writer):
    write_atomically(tmp_path / "file", b"mine")
    with temporary_folder(tmp_path, ".new-"):
        assert hidden(tmp_path) == [".file", ".new-", ".new-"]
    assert hidden(tmp_path) == [".file", ".new-"]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert hidden(tmp_path) == [".file", ".new-"]
    write_atomically(tmp_path / "file", b"next")
    with temporary_folder(tmp_path, ".new-") as new:
        assert list(tmp_path.glob(".*")) == [new]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"next"


def test_a_number_of_a_process_shows_nothing(tmp_path):
    (tmp_path / f".file.{os.getpid()}.tmp").write_bytes(b"of a process that had this number")
    (tmp_path / f".file.{os.getppid()}.tmp").write_bytes(b"of another machine")
    write_atomically(tmp_path / "file", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_other_files_are_left_alone(tmp_path):
    for name in (".file", ".file.1.txt", ".other.1.tmp", "file.1.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".file.2.tmp").symlink_to(tmp_path / ".file")
    os.mkfifo(tmp_path / ".file.3.tmp")
    write_atomically(tmp_path / "file", b"whole")
    assert len(list(tmp_path.iterdir())) == 7
    assert (tmp_path / ".file").read_bytes() == b"mine"


def test_without_locks_leftovers_go_by_their_age(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, new = tmp_path / ".file.1.tmp", tmp_path / ".file.2.tmp"
    folders = tmp_path / ".new-1", tmp_path / ".new-2"
    for path in (old, new):
        path.write_bytes(b"half")
    for path in folders:
        path.mkdir()
    for path in (old, folders[0]):
        os.utime(path, (time.time() - 2 * OLD,) * 2)
    write_atomically(tmp_path / "file", b"whole")
    with temporary_folder(tmp_path, ".new-"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.2.tmp", ".new-2", "file"]


def test_threads_that_write_the_same_file_never_mix(tmp_path):
    path, contents = tmp_path / "file", [bytes([letter]) * 10_000 for letter in b"abcd"]

    def write(content):
        for _ in range(25):
            write_atomically(path, content)
            assert path.read_bytes() in contents

    failed = []
    threading.excepthook, before = lambda args: failed.append(args.exc_value), threading.excepthook
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = before
    assert failed == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweep_that_fails_is_no_error(tmp_path):
    sweep([tmp_path / "gone", tmp_path / "no" / "where"])
    sweep_files(tmp_path / "gone")
