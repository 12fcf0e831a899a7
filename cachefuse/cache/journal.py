"""Files of JSON lines that only ever grow. A line cut short or changed is passed over: its checksum tells."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cachefuse.cache.layout import seal, unseal
from cachefuse.errors import CacheError
from cachefuse.runtime import sync_folder


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines and have them on the disk before going on; a torn last line is closed off first."""
    text = "".join(json.dumps(seal(line), ensure_ascii=False) + "\n" for line in lines)
    data = text.encode("utf-8", "backslashreplace")
    if not data:
        return
    with path.open("ab+") as file:
        begun = file.tell()
        if begun:
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if not begun:
        sync_folder(path.parent)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that are whole."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield unseal(json.loads(line), path)
        except (ValueError, AttributeError, CacheError):
            continue
