"""How many threads torch computes with: as many as there are idle cores.

Threads of one product wait for each other. On a core that other work keeps busy one of them is late at every product,
and all others spin meanwhile: beside four busy processes, two threads take several times as long as one. So work looks
at the machine when it begins, and again between epochs and between windows of samples. `set_threads` and
``CACHEFUSE_THREADS`` fix the number; where ``OMP_NUM_THREADS`` is set, torch's own stays. A sum depends in its last
digits on the number of threads that share it, so the same bytes take the same number.
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
MOST = 512  # threads: far more than that end torch
RECENT = 1.0  # seconds for which a look is of now
IDLE = 0.7  # of a core's time that makes it count as idle: a machine at rest does a little all the time
BUSY = ("nice", "irq", "softirq", "steal")  # beside user and system time, where a system tells them apart

_chosen: int | None = None
_n_active = 0  # blocks of ``idle_threads``, in all Python threads
_usual = 1  # the number of threads outside of them
_active = threading.local()
_lock = threading.Lock()


def _renew_lock() -> None:
    """Let a forked process take the lock that a thread may hold which it does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Look:
    """At a time, in seconds: the time that others had on the cores this process may use; idle cores since the last."""

    when: float
    others: float
    n_idle: int = 1


_last: Look | None = None


def set_threads(n: int | None) -> None:
    """Have torch compute with ``n`` threads whenever cachefuse does; with None by what is idle, as it is at first.

    Raises ConfigError for a number below 1 or above ``MOST``.
    """
    global _chosen
    _chosen = None if n is None else _checked(n, "threads")


def fixed_threads() -> int | None:
    """Return the number of threads that a person has fixed, or None. Raises ConfigError if it can't be one."""
    if (same := getattr(_active, "same", None)) is not None:
        return int(same)
    if _chosen is not None:
        return _chosen
    if given := os.environ.get(VARIABLE):
        return _checked(given, VARIABLE)
    if os.environ.get("OMP_NUM_THREADS"):  # torch has read it, and made of it what it can
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
    """Compute with as many threads as there are idle cores, or the fixed number, and afterwards as before.

    Inside of another such block it changes nothing.
    """
    import torch

    global _n_active, _usual
    if hasattr(_active, "most"):
        yield
        return
    with _lock:
        if not _n_active:
            # While another Python thread computes, torch's number is the one that it takes just now.
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
    """Compute with one number of threads throughout, by what is idle now: what is compared must have the same."""
    import torch

    with idle_threads():
        before = getattr(_active, "same", None)
        _active.same = torch.get_num_threads()
        try:
            yield
        finally:
            _active.same = before


def adapt_threads(oldest_look: float = math.inf) -> int:
    """Take the number of threads anew, inside of ``idle_threads``, and return it.

    It goes by what was idle since the last look, or for a moment from now if that is older (in seconds).
    """
    import torch

    n = fixed_threads() or min(_active.most, n_idle_cores(oldest_look))
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)
    return n


def n_idle_cores(oldest_look: float = math.inf) -> int:
    """Return how many cores nobody else uses, 1 at least: since the last look, or if that is older, in a moment."""
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
        except Exception as error:  # of many kinds, where a system does not let its load be seen
            logger.debug("the load of this machine can't be seen: %s: %s", type(error).__name__, error)
            return n_cores()
        busy = max(0.0, (now.others - _last.others) / (now.when - _last.when))
        _last = replace(now, n_idle=max(1, int(min(n_cores(), _n_allowed() - busy + 1 - IDLE))))
        return _last.n_idle


def _look() -> Look:
    import psutil

    cores = psutil.cpu_times(percpu=True)
    allowed = [cores[number] for number in _affinity() or range(len(cores)) if number < len(cores)]
    busy = sum(core.user + core.system + sum(getattr(core, kind, 0.0) for kind in BUSY) for core in allowed)
    own = os.times()
    return Look(time.monotonic(), busy - own.user - own.system)


def n_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its container."""
    return max(1, int(min(_n_allowed(), _quota())))


def _n_allowed() -> int:
    return len(_affinity() or ()) or os.cpu_count() or 1


def _affinity() -> set[int] | None:
    """Return the numbers of the cores that this process may run on; None where a system can't say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _quota() -> float:
    """Return how many cores' time this process may use, by the limits of its control groups (versions 2 and 1)."""
    limits = [math.inf]
    for line in _read(OWN_CGROUP).splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        root = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
        if root == CGROUPS and controllers:
            continue
        own = root / group.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                limits.append(_limit(_read(folder / "cpu.max")))
                limits.append(_limit(f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"))
    return min(limits)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):  # there is none, or it is not what it should be
        return ""


def _limit(quota_and_period: str) -> float:
    try:
        quota, period = map(int, quota_and_period.split())
        return quota / period if quota > 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return math.inf
