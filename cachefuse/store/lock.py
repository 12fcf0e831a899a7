"""One writer a store: the lock is the system's, and ends with the process; beside it stands who holds it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock

from cachefuse.errors import CacheError
from cachefuse.files import make_folder, to_json


@contextmanager
def only_writer(store_path: Path) -> Iterator[None]:
    """Hold the store's lock. Raises CacheError at once, naming the process and its start, if another one holds it."""
    make_folder(store_path.parent)
    lock = filelock.FileLock(store_path.with_name(f".{store_path.name}.lock"), timeout=0)
    about = store_path.with_name(f".{store_path.name}.writer")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CacheError(
            f"another extract{_describe(about)} is writing to {store_path}; wait until it has ended"
        ) from None
    try:
        started = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        about.write_text(to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": started}), "utf-8")
        yield
    finally:
        about.unlink(missing_ok=True)
        lock.release()


def _describe(about: Path) -> str:
    try:
        values = json.loads(about.read_bytes())
        host = "" if values["host"] == socket.gethostname() else f" on {values['host']}"
        return f" (process {int(values['pid'])}{host}, since {values['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock and has not yet said who it is
        return ""
