"""Where things run and where they are kept: devices, seeds, files, the workspace."""

import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefuse.errors import ConfigError

MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup 2, 1


@dataclass(frozen=True)
class Workspace:
    """The folder that commands share: raw data, feature stores, runs."""

    root: Path = Path("workspace")

    def data(self, dataset: str) -> Path:
        return self.root / "data" / dataset

    def store(self, dataset: str) -> Path:
        return self.root / "cache" / f"{dataset}.zarr"

    @property
    def stores(self) -> list[Path]:
        return sorted((self.root / "cache").glob("*.zarr"))

    @property
    def runs(self) -> Path:
        return self.root / "runs"


def resolve_device(name: str = "auto") -> str:
    """Return "cpu" or a CUDA device. Raises ConfigError if CUDA is asked for and absent."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; choose from: auto, cpu, cuda, cuda:0") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} was asked for, but there is none here; use --device cpu or auto")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; choose from: auto, cpu, cuda, cuda:0")
    return str(device)


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container that this runs in."""
    return min([_machine_memory(), *map(_limit, MEMORY_LIMITS)])


def _limit(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none: no such file, or "max"
        return sys.maxsize


def _machine_memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 16 << 30  # on Windows, where Python can't tell, what laptops have


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch as it was, whatever is seeded and drawn meanwhile.

    A caller's random splits, say, would all be the same after trainings that are.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def slug(text: str) -> str:
    """Turn any text into one safe folder name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "unnamed"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, even through a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and have their names on the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Have a folder's names on the disk; where a folder can't be opened for that (Windows), the system sees to it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def format_bytes(n_bytes: float) -> str:
    """Return "3.07 GB": three digits, in powers of 1,000."""
    unit = min(4, int(math.log10(max(1, n_bytes)) / 3 + 1e-9))
    return f"{n_bytes / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def to_json(value: Any) -> str:
    """Serialise for people and machines alike: indented, in order; NaN and infinity, which JSON lacks, as null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
