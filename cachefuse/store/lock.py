"""One writer per store. The system frees the lock when the process ends; a file beside it names the holder."""

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
    """Hold the store's lock. Raises CacheError at once if another process holds it, naming it and its start."""
    make_folder(store_path.parent)
    lock = filelock.FileLock(store_path.with_name(f".{store_path.name}.lock"), timeout=0)
    holder_file = store_path.with_name(f".{store_path.name}.writer")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CacheError(
            f"another extract{_holder(holder_file)} is writing to {store_path}; wait until it has ended"
        ) from None
    try:
        started = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        holder_file.write_text(to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": started}), "utf-8")
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    """Return the process that holds the lock, for a message, or "" if it is unknown."""
    try:
        values = json.loads(file.read_bytes())
        host = "" if values["host"] == socket.gethostname() else f" on {values['host']}"
        return f" (process {int(values['pid'])}{host}, since {values['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its file yet
        return ""
