"""JSON files of raw data: their size is limited, and their content is checked first."""

import json
from collections.abc import Callable
from pathlib import Path

from cachefuse.errors import DataError
from cachefuse.files import JsonObject


def read_json(path: Path, most_bytes: int, kind: str, keep: Callable[[JsonObject], object]) -> object:
    """Return a file's content. ``keep`` reduces each object to the keys that are needed, to save memory.

    Raises DataError, naming the file, if it is not JSON, or larger than the limit for its ``kind``.
    """
    if path.stat().st_size > most_bytes:
        raise DataError(f"{path.name}: is larger than {most_bytes:,} bytes, the limit for a {kind} file")
    try:
        return json.loads(path.read_bytes(), object_hook=keep)
    except RecursionError as error:  # Python versions word it differently
        raise DataError(f"{path.name}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path.name}: not valid JSON: {error}") from error


def list_of_objects(content: object, key: str, path: Path) -> list[JsonObject]:
    """Return the list of objects under a key. Raises DataError, naming the file, for other content."""
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f'{path.name}: must be a JSON object with a list "{key}" of objects')
    return values
