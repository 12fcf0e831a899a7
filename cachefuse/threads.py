"""The number of threads that torch computes with: one for each idle core.

The threads of one matrix product wait for each other. If other work keeps a core busy, the thread on it is late in
every product, and all others spin. Beside four busy processes, two threads take several times as long as one. So the
load is measured at the start of work, between epochs and between windows of samples. `set_threads` and
``CACHEFUSE_THREADS`` fix the number; if ``OMP_NUM_THREADS`` is set, torch keeps its own. The last digits of a sum
depend on the number of threads: the same bytes need the same number.
"""

import logging
import math
import operator
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cachefuse.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "CACHEFUSE_THREADS"
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MOMENT = 0.1  # seconds; the system counts in hundredths
MOST = 512  # threads: torch crashes with many more
RECENT = 1.0  # seconds; an older look is out of date
IDLE = 0.7  # a core counts as idle if this share of its time is: even at rest a machine works a little
BUSY = ("nice", "irq", "softirq", "steal")  # counted with user and system time, if the system reports them

_chosen: int | None = None
_n_active = 0  # active blocks of ``idle_threads``, in all Python threads
_usual = 1  # the number of threads outside of these blocks
_active = threading.local()
_lock = threading.Lock()


def _renew_lock() -> None:
    """Give a forked process a new lock: a thread of the parent may hold the old one for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Look:
    """One look at the load: ``when``, time that ``others`` used on our cores (seconds), cores idle since the last."""

    when: float
    others: float
    n_idle: int = 1


_last: Look | None = None


def set_threads(n: int | None) -> None:
    """Fix the number of torch's threads in cachefuse's work; None, the default, takes one for each idle core.

    Raises ConfigError for a number below 1 or above ``MOST``.
    """
    global _chosen
    _chosen = None if n is None else _checked(n, "threads")


def fixed_threads() -> int | None:
    """Return the number of threads that the user has fixed, or None. Raises ConfigError if it is not valid."""
    if (same := getattr(_active, "same", None)) is not None:
        return int(same)
    if _chosen is not None:
        return _chosen
    if value := os.environ.get(VARIABLE):
        return _checked(value, VARIABLE)
    if os.environ.get("OMP_NUM_THREADS"):  # torch has read it already
        import torch

        return torch.get_num_threads()
    return None


def _checked(value: int | str, name: str) -> int:
    try:
        n = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        n = 0
    if not 1 <= n <= MOST:
        raise ConfigError(f"{name} must be a whole number from 1 to {MOST}. Got {value!r} instead")
    return n


@contextmanager
def idle_threads() -> Iterator[None]:
    """Compute with one thread for each idle core, or the fixed number; restore the old number at the end.

    Inside another such block this changes nothing.
    """
    import torch

    global _n_active, _usual
    if hasattr(_active, "most"):
        yield
        return
    with _lock:
        if not _n_active:
            # If another Python thread computes, torch's number is that thread's, not the usual one.
            _usual = torch.get_num_threads()
        _n_active += 1
        before = _usual
    _active.most = min(before, n_cores())
    try:
        adapt_threads(oldest_look=RECENT)
        yield
    finally:
        del _active.most
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
        with _lock:
            _n_active -= 1


@contextmanager
def same_threads() -> Iterator[None]:
    """Compute with a constant number of threads, one for each core idle now, so that results are comparable."""
    import torch

    with idle_threads():
        before = getattr(_active, "same", None)
        _active.same = torch.get_num_threads()
        try:
            yield
        finally:
            _active.same = before


def adapt_threads(oldest_look: float = math.inf) -> int:
    """Set the number of threads again, inside ``idle_threads``, and return it.

    It counts the cores idle since the last look. If that is older than ``oldest_look`` seconds, it takes a new look.
    """
    import torch

    n = fixed_threads() or min(_active.most, n_idle_cores(oldest_look))
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)
    return n


def n_idle_cores(oldest_look: float = math.inf) -> int:
    """Return how many cores no other process uses, at least 1: since the last look, or a new one if that is too old."""
    global _last
    with _lock:
        age = math.inf if _last is None else time.monotonic() - _last.when
        if _last is not None and age < MOMENT:
            return _last.n_idle
        try:
            if _last is None or age > oldest_look:
                _last = _look()
                time.sleep(MOMENT)
            now = _look()
        except Exception as error:  # of many kinds, on systems that do not report their load
            logger.debug("the load of this machine is unknown: %s: %s", type(error).__name__, error)
            return n_cores()
        busy = max(0.0, (now.others - _last.others) / (now.when - _last.when))
        _last = replace(now, n_idle=max(1, int(min(n_cores(), _n_allowed() - busy + 1 - IDLE))))
        return _last.n_idle


def _look() -> Look:
    import psutil

    cores = psutil.cpu_times(percpu=True)
    allowed = [cores[number] for number in _affinity() or range(len(cores)) if number < len(cores)]
    busy = sum(core.user + core.system + sum(getattr(core, name, 0.0) for name in BUSY) for core in allowed)
    this_process = os.times()
    return Look(time.monotonic(), busy - this_process.user - this_process.system)


def n_cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's quota."""
    return max(1, int(min(_n_allowed(), _quota())))


def _n_allowed() -> int:
    return len(_affinity() or ()) or os.cpu_count() or 1


def _affinity() -> set[int] | None:
    """Return the numbers of the cores that this process may run on, or None if the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _quota() -> float:
    """Return how many cores this process may use, by the limits of its control groups (versions 2 and 1)."""
    limits = [math.inf]
    for line in _read(OWN_CGROUP).splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        root = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
        if root == CGROUPS and controllers:
            continue
        group_folder = root / group.strip("/")
        for folder in (group_folder, *group_folder.parents):
            if folder.is_relative_to(root):
                limits.append(_limit(_read(folder / "cpu.max")))
                limits.append(_limit(f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"))
    return min(limits)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):  # missing, or not text
        return ""


def _limit(quota_and_period: str) -> float:
    try:
        quota, period = map(int, quota_and_period.split())
        return quota / period if quota > 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return math.inf
