"""What raw data may take: memory and sizes. One set of limits holds for a process: all its workers share it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MIN_MEMORY = 900_000_000  # nearly every image that is allowed fits, so that machines seldom differ


def default_memory() -> int:
    """Return the default of ``Limits.memory``: a 32nd of the machine's memory, at least 900 MB."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        machine = 0
    return max(MIN_MEMORY, machine // 32)


@dataclass(frozen=True)
class Limits:
    """memory: bytes that all images in work may take together. text_bytes: of one text, in UTF-8.

    outside_links: whether links in a data folder may lead out of it.
    columns, rows: the most of one table. file_bytes: the largest table or annotation file, None for any size.
    """

    memory: int = default_memory()
    text_bytes: int = 1 << 20
    outside_links: bool = True
    columns: int = 1_000_000
    rows: int = 50_000_000
    file_bytes: int | None = None


# For data of strangers.
UNTRUSTED = Limits(
    text_bytes=1 << 16, outside_links=False, columns=10_000, rows=1_000_000, file_bytes=1 << 28
)  # fmt: skip

_current = Limits()


def limits() -> Limits:
    """Return the limits that hold now."""
    return _current


@contextmanager
def limited(new: Limits) -> Iterator[None]:
    """Let other limits hold within a block, in all threads."""
    global _current
    before, _current = _current, new
    try:
        yield
    finally:
        _current = before
