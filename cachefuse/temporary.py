"""Temporary files and folders, beside what they become. Their writer holds a lock of the system on each.

The lock ends with the process, also if it is killed. So a leftover that nobody holds is removed by the next writer: a
process number would not do, since another process may have it by then.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OLD = 24 * 3600  # seconds; where a file system has no locks, an older leftover belongs to nobody
SUFFIX = ".tmp"


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of ``target`` at the end, on disk; an error leaves the target as it was.

    Removes the leftovers of writers of the same target first.
    """
    sweep_files(target.parent, f".{target.name}.")
    path = target.with_name(f".{target.name}.{os.getpid()}{SUFFIX}")
    with open(_create(path), "wb") as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            path.replace(target)
        except BaseException:
            if fcntl is None:
                file.close()
            path.unlink(missing_ok=True)
            raise


def _create(path: Path) -> int:
    """Return a descriptor of a file that this thread alone holds."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        _lock(descriptor, wait=True)
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # another one renamed or removed it while this one waited for the lock


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in ``parent``, and remove it at the end. Removes others' leftovers of this prefix first."""
    sweep(parent.glob(f"{prefix}*"))
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        if fcntl is None:
            descriptor = None
            break
        with suppress(FileNotFoundError):  # a sweep of another process was between
            descriptor = os.open(path, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if _is_at(path, descriptor):
                break
            os.close(descriptor)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def hold(path: Path) -> int | None:
    """Lock a file or folder until this process ends, or closes the descriptor that this returns; None without locks."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    _lock(descriptor, wait=True)
    return descriptor


def sweep_files(folder: Path, prefix: str = ".") -> None:
    """Remove the temporary files in a folder that no living process holds."""
    with suppress(OSError):
        names = os.listdir(folder)
        sweep(folder / name for name in names if name.startswith(prefix) and name.endswith(SUFFIX))


def sweep(leftovers: Iterable[Path]) -> None:
    """Remove files and folders that no living process holds."""
    for path in leftovers:
        with suppress(OSError):
            _remove_unheld(path)


def _remove_unheld(path: Path) -> None:
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        return
    descriptor = None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        free = None if descriptor is None else _lock(descriptor, wait=False)
        if free is None:
            free = time.time() - status.st_mtime > OLD
        if not free or (descriptor is not None and not _is_at(path, descriptor)):
            return
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool | None:
    """Lock a file or folder; False if another one holds it, None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names the open file or folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
