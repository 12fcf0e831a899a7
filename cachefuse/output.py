"""Files that a person names for results, such as a submission; a store or a run writes its own with ``files``."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cachefuse.errors import ConfigError
from cachefuse.files import named, opened_atomically


def check_output(path: Path, *inputs: Path | None) -> None:
    """Raise ConfigError if nothing can be written to ``path``, or if it is one of the ``inputs``.

    For a check before hours of work.
    """
    folder = _followed(path).parent
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file")
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {folder}; make it first")
    for file in inputs:
        if file is not None and path.exists() and file.exists() and path.samefile(file):
            raise ConfigError(f"cannot write {path}: it is the input {file}; name another file")


def check_different(path: Path, other: Path) -> None:
    """Raise ConfigError if two files to write are the same one."""
    if os.path.realpath(path) == os.path.realpath(other):
        raise ConfigError(f"cannot write both {path} and {other}: they are one file; name another file")


def write_output(path: Path, data: bytes, *, own: Path | None = None) -> None:
    """Write a file as ``open_output`` does."""
    with open_output(path, own=own) as file:
        file.write(data)


@contextmanager
def open_output(path: Path, *, own: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write as its user expects: a link is followed, and a pipe or another special file written to.

    A regular file is replaced, completely or not at all. So is all in ``own``, the folder of a run, where another one
    may have left a link. Raises ConfigError as ``check_output`` does, and for a pipe whose reader stops early.
    """
    check_output(path)
    is_own = own is not None and own.exists() and path.parent.samefile(own)
    target = path if is_own else _followed(path)
    is_plain = path.is_file() and target.exists() and target.samefile(path) and not _is_stdout(path)
    if is_own or is_plain or not path.exists():
        with opened_atomically(target) as file:
            yield file
    else:
        try:
            sys.stdout.flush()
            with named(path), open(1, "wb", closefd=False) if _is_stdout(path) else path.open("wb") as file:
                yield file
        except BrokenPipeError as error:  # the command line takes it for one of stdout
            raise ConfigError(f"cannot write all of {path}: its reader has stopped") from error


def _is_stdout(path: Path) -> bool:
    """Whether a path is that of this process's output, such as /dev/stdout: another opening would write over it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path
