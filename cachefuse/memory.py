"""The budget of memory that all images in work share: a sample takes its need once, and what does not fit now waits.

The need is an estimate from the image's header. ``limits().memory`` bounds the sum over all threads of a process.
"""

import mmap
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachefuse.errors import BadSampleError
from cachefuse.files import format_bytes
from cachefuse.limits import limits

TAKES = "takes about "  # the beginning of the reason, which stores keep
LEAST = 1 << 25  # bytes that any decoder may ask for
# Shared memory, which is the default, is not counted by all of a system's limits.
PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
# In the words of decoders: of Pillow's codecs (libtiff's is -9), and of libwebp, which gives no cause.
SIGNS = ("memory", "allocat", "decoder error -9", "could not create decoder object")
PrepareBytes = Callable[[int, int], int]  # an image's width and height to bytes


class Budget:
    """Counts bytes in use. Takers wait in their order, so that many small needs cannot keep out a large one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self.used = 0

    def take(self, n_bytes: int) -> None:
        """Wait until ``n_bytes`` fit, and take them. More than the whole limit waits until nothing else is in use."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._fits(n_bytes))
                self.used += n_bytes
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def take_now(self, n_bytes: int) -> bool:
        """Take bytes if that needs no wait."""
        with self._changed:
            if fits := not self._waiting and self._fits(n_bytes):
                self.used += n_bytes
        return fits

    def give(self, n_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.used -= n_bytes
            self._changed.notify_all()

    def _fits(self, n_bytes: int) -> bool:
        return not self.used or self.used + n_bytes <= limits().memory


class _Sample(threading.local):
    """What the sample of a thread holds. ``depth`` counts the blocks that work on it."""

    depth = 0
    held = 0
    prepare_bytes: PrepareBytes | None = None


_budget = Budget()
_sample = _Sample()


def _renew() -> None:
    """Give a forked process its own budget: the threads that hold the old one are not in it."""
    global _budget, _sample
    _budget, _sample = Budget(), _Sample()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def budget() -> Budget:
    """Return the budget of this process."""
    return _budget


@contextmanager
def one_sample(prepare_bytes: PrepareBytes | None = None) -> Iterator[None]:
    """Work on one sample: what ``reserve`` takes within the block is given back at the end of the outermost block.

    ``prepare_bytes`` tells what is done with an image after it is decoded.
    """
    if _sample.depth == 0:
        _sample.prepare_bytes = prepare_bytes
    _sample.depth += 1
    try:
        yield
    finally:
        _sample.depth -= 1
        if _sample.depth == 0:
            release()


def reserve(n_bytes: int) -> None:
    """Hold ``n_bytes`` for the sample of this thread, in place of what it held. Call it before that memory is in use.

    What was held is given back before the wait: nobody waits for memory and keeps some. Raises BadSampleError for a
    need over the whole budget, which would wait for ever.
    """
    _check(n_bytes)
    release()
    _budget.take(n_bytes)
    _sample.held = n_bytes


def reserve_now(n_bytes: int) -> bool:
    """Hold ``n_bytes`` as ``reserve`` does, if that needs no wait; else keep what is held, and return False."""
    _check(n_bytes)
    more = n_bytes - _sample.held
    if more > 0:
        if not _budget.take_now(more):
            return False
        _sample.held = n_bytes
    return True


def _check(n_bytes: int) -> None:
    if not _sample.depth:
        raise RuntimeError("memory must be reserved within one_sample")
    if n_bytes > limits().memory:
        raise BadSampleError(f"{TAKES}{format_bytes(n_bytes)} of memory, over the limit (--memory allows more)")


def fits_now(reason: str) -> bool:
    """Whether an image that was refused for this reason fits in the budget of this process."""
    found = re.match(rf"{TAKES}([0-9.e+]+) (B|kB|MB|GB|TB) of memory", reason)
    if found is None:
        return False
    n_bytes = float(found[1]) * 1000 ** ("B", "kB", "MB", "GB", "TB").index(found[2])
    return bool(1.01 * n_bytes <= limits().memory)  # 1%: the figure is rounded


def reserve_all() -> None:
    """Hold the whole budget: no other sample is in work then."""
    reserve(limits().memory)


def release() -> None:
    """Give back what the sample of this thread holds."""
    held, _sample.held = _sample.held, 0
    if held:
        _budget.give(held)


def bytes_to_prepare(width: int, height: int) -> int:
    """Return what the user of a decoded image takes beside it."""
    return 0 if _sample.prepare_bytes is None else _sample.prepare_bytes(width, height)


def may_be_short(error: BaseException) -> bool:
    """Whether an error may come from too little memory: it says so, or the system limits that of this process.

    Then decoders report all kinds of errors: libjpeg's is that of a damaged image.
    """
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in words for sign in SIGNS) or _is_limited()


def is_short(n_bytes: int) -> bool:
    """Whether the system gives this process no ``n_bytes`` more."""
    try:
        mmap.mmap(-1, max(n_bytes, LEAST), **PRIVATE).close()
    except (OSError, ValueError, OverflowError, MemoryError):
        return True
    return False


def _is_limited() -> bool:
    if sys.platform == "win32":
        return False
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)
