"""Files of JSON lines that only ever grow, and that a crash can at worst cut short by a line."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines and have them on the disk before going on; a torn last line is closed off first."""
    data = b"".join(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for line in lines)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield JSON lines, passing over one that a crash cut short."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
