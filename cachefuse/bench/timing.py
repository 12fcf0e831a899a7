"""Figures as ratios: ours and a baseline by turns, so that whatever else the machine does weighs on both alike."""

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
    """One figure in ``unit``: ours and the baseline's, medians both; ``ratio`` is the median of the pairs' ratios.

    ``goal`` is the least ratio, or with ``at_most`` the most that ours may be. What is None was not measured or has no
    goal; ``note`` says why, or what else to know.
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
        """Whether the goal is met; None where there is none, or nothing was measured."""
        judged = self.ours if self.at_most else self.ratio
        if self.goal is None or judged is None:
            return None
        return judged <= self.goal if self.at_most else judged >= self.goal


def by_turns(ours: Callable[[], float], baseline: Callable[[], float], n_pairs: int) -> np.ndarray:
    """Call both by turns; each returns its seconds. Return (n_pairs, 2)."""
    return np.array([(ours(), baseline()) for _ in range(n_pairs)])


def seconds(function: Callable[[], object]) -> float:
    """Call a function and return how long it took."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Make a function return how long it took."""
    return lambda: seconds(function)


def rates(
    pairs: np.ndarray, work: float, name: str, what: str, unit: str, *, goal: float | None = None, note: str = ""
) -> BenchRow:
    """Return the row of pairs of seconds (n, 2) in which each side did so much ``work``, counted as ``unit`` says."""
    ours, baseline = (work / np.median(pairs, axis=0)).tolist()
    ratio = float(np.median(pairs[:, 1] / pairs[:, 0]))
    return BenchRow(name, what, unit, ours, baseline, ratio, goal, note=note)


def describe_machine(device: str = "auto") -> JsonObject:
    """Return what figures depend on: the processor, the cores this process may use, torch's version, the device."""
    device = resolve_device(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
    return {"cpu": cpu, "cores": n_cores(), "torch": torch.__version__, "device": name}
