"""Measure ours and a baseline in turns, so other work on the machine affects both; figures are ratios."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cachefuse.device import resolve_device
from cachefuse.files import JsonObject
from cachefuse.threads import n_cores


@dataclass(frozen=True)
class BenchRow:
    """One figure in ``unit``: the medians of ours and the baseline, and the median ``ratio`` of their pairs.

    ``goal`` is the minimum of the ratio, or with ``at_most`` the maximum of ours. A figure of None was not measured; a
    goal of None is no goal. ``note`` gives the reason and other facts.
    """

    name: str
    what: str
    unit: str
    ours: float | None
    baseline: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a figure."""
        value = self.ours if self.at_most else self.ratio
        if self.goal is None or value is None:
            return None
        return value <= self.goal if self.at_most else value >= self.goal


def in_turns(ours: Callable[[], float], baseline: Callable[[], float], n_pairs: int) -> np.ndarray:
    """Call both functions in turns and return their seconds, (n_pairs, 2)."""
    return np.array([(ours(), baseline()) for _ in range(n_pairs)])


def seconds(function: Callable[[], object]) -> float:
    """Call a function and return the seconds that it took."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls ``function`` and returns the seconds."""
    return lambda: seconds(function)


def rates(
    pairs: np.ndarray, work: float, name: str, what: str, unit: str, *, goal: float | None = None, note: str = ""
) -> BenchRow:
    """Return the row for pairs of seconds (n, 2) in which each side did the same ``work``, as rates in ``unit``."""
    ours, baseline = (work / np.median(pairs, axis=0)).tolist()
    ratio = float(np.median(pairs[:, 1] / pairs[:, 0]))
    return BenchRow(name, what, unit, ours, baseline, ratio, goal, note=note)


def describe_machine(device: str = "auto") -> JsonObject:
    """Return the processor, the number of cores that this process may use, torch's version and the device."""
    device = resolve_device(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
    return {"cpu": cpu, "cores": n_cores(), "torch": torch.__version__, "device": name}
