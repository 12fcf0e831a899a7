"""One writer per store. The system frees the lock when the process ends; a file beside it names the holder."""

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock

from cachefuse.errors import CacheError
from cachefuse.files import make_folder, read_bounded, to_json, write_atomically

WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # of file systems such as some network mounts


@contextmanager
def only_writer(store_path: Path) -> Iterator[None]:
    """Hold the store's lock. Raises CacheError at once if another process holds it, naming it and its start."""
    make_folder(store_path.parent)
    lock_file = store_path.with_name(f".{store_path.name}.lock")
    holder_file = store_path.with_name(f".{store_path.name}.writer")
    try:
        lock = take_lock(lock_file)
    except filelock.Timeout as error:
        left = Path(error.lock_file)
        soft = f", or delete {left} if it is gone" if left.is_file() and left.stat().st_size else ""
        raise CacheError(
            f"another extract{_holder(holder_file)} is writing to {store_path}; wait until it has ended{soft}"
        ) from None
    try:
        started = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        holder = to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": started})
        write_atomically(holder_file, holder.encode())
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def take_lock(path: Path) -> filelock.BaseFileLock:
    """Take a lock that the system frees when the process ends, or where files have none, a lock that is a file.

    Raises filelock.Timeout at once if another process holds it.
    """
    lock: filelock.BaseFileLock = filelock.FileLock(path, timeout=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock says that it takes the second kind by itself
            lock.acquire()
    except NotImplementedError:  # of older versions of filelock
        return _soft_lock(path)
    except OSError as error:
        if isinstance(error, filelock.Timeout) or error.errno not in WITHOUT_LOCKS:
            raise
        return _soft_lock(path)
    return lock


def _soft_lock(path: Path) -> filelock.BaseFileLock:
    lock = filelock.SoftFileLock(path.with_name(f"{path.name}ed"), timeout=0)
    lock.acquire()
    return lock


def _holder(file: Path) -> str:
    """Return the process that holds the lock, for a message, or "" if it is unknown."""
    try:
        values = json.loads(read_bounded(file, 1 << 16))
        host = "" if values["host"] == socket.gethostname() else f" on {values['host']}"
        return f" (process {int(values['pid'])}{host}, since {values['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its file yet
        return ""
