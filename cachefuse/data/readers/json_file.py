"""JSON files of raw data: their size is limited, they are read value by value, and their content is checked first."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cachefuse.data.readers.json_stream import JsonStream
from cachefuse.errors import DataError
from cachefuse.files import JsonObject, open_regular
from cachefuse.limits import limits


@contextmanager
def _open(path: Path, most_bytes: int, kind: str, keep: Callable[[JsonObject], object] | None) -> Iterator[JsonStream]:
    try:
        with open_regular(path) as file:
            most = min(most_bytes, limits().file_bytes or most_bytes)
            if path.stat().st_size > most:
                raise DataError(f"{path.name}: is larger than {most:,} bytes, the limit for a {kind} file")
            yield JsonStream.of_file(file, keep)
    except DataError:
        raise
    except RecursionError as error:  # Python versions word it differently
        raise DataError(f"{path.name}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path.name}: not valid JSON: {error}") from error


def read_json(path: Path, most_bytes: int, kind: str) -> object:
    """Return a file's content, with ``TooLong`` in place of long texts.

    Raises DataError, naming the file, if it is not JSON, or larger than the limit for its ``kind``.
    """
    with _open(path, most_bytes, kind, None) as stream:
        value: object = stream.value()
        stream.end()
        return value


def read_objects(
    path: Path, most_bytes: int, kind: str, keep: Callable[[JsonObject], object], keys: Collection[str]
) -> Iterator[tuple[str, int, JsonObject]]:
    """Yield (key, number from 1, object) for the objects in the lists under some keys of a file, in file order.

    Only one object is held at a time. ``keep`` reduces each one to the keys that are needed. Raises DataError, naming
    the file, if it is not JSON, larger than the limit for its ``kind``, or lacks a list.
    """
    found: set[str] = set()

    def wrong(key: str) -> DataError:
        return DataError(f'{path.name}: must be a JSON object with one list "{key}" of objects')

    with _open(path, most_bytes, kind, keep) as stream:
        if stream.peek() != "{":
            stream.value()  # for the error of what is not JSON
            raise wrong(next(iter(keys)))
        for key in stream.names():
            if key in keys and (key in found or stream.peek() != "["):
                raise wrong(key)
            found.add(key)
            if stream.peek() != "[":
                stream.value()
                continue
            for number, value in enumerate(stream.items(), start=1):
                if key not in keys:
                    continue
                if not isinstance(value, dict):
                    raise wrong(key)
                yield key, number, value
        stream.end()
    for key in keys:
        if key not in found:
            raise wrong(key)
