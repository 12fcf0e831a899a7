"""Files written whole, names of folders, JSON, sizes in words."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any


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
