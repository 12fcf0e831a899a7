"""The folder of a run: written whole, and read with checks. run.json has a checksum of each other file that is read.

The model card and reports are for people, who may edit them: nothing reads them, so they have no checksum.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cachefuse.errors import CacheError, RunError
from cachefuse.files import JsonObject, open_regular, read_bounded, slug, to_json, write_atomically
from cachefuse.store.format import PIECE, seal, unseal
from cachefuse.temporary import hold, sweep, sweep_files, temporary_folder

logger = logging.getLogger(__name__)

HEAD, ALIGNMENT = "head", "alignment"  # kinds of runs
FORMATS = {HEAD: 3, ALIGNMENT: 1}
USES = {
    HEAD: "is a head, not an alignment; use cachefuse predict, evaluate or report",
    ALIGNMENT: "is an alignment, without classes; use cachefuse retrieve, zero-shot, similarity, evaluate or report",
}
ABOUT, HISTORY, WEIGHTS, HELD_OUT = "run.json", "history.json", "model.safetensors", "held_out.safetensors"
CARD, LEADERBOARD = "README.md", "leaderboard.csv"
FILES = (ABOUT, HISTORY, WEIGHTS)  # every run has these
JSON_BYTES = 64 << 20  # the maximum of a JSON file of a run
NEW = ".new-"
UNFINISHED = ".unfinished"  # in the folder of a run that is of no use before another one is written
RESTORE = "restore it from a copy, or train again"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: the ``values`` of its run.json, and what it says of each other file that is read.

    ``files`` has the size ("bytes") and the SHA-256 ("sha256", in hex) of each. It is None for runs that were made
    before runs had checksums.
    """

    path: Path
    values: JsonObject
    files: Mapping[str, JsonObject] | None

    @classmethod
    def open(cls, path: Path, kind: str | None = None) -> "RunFolder":
        """Read run.json. Raises RunError if it is missing or damaged, or of another version or kind."""
        folder = cls.peek(path)
        folder._check_kind(kind)
        if folder.files is None:
            logger.warning(
                "a run was made before runs had checksums, so damage to its files may not be noticed; "
                "a run that is trained now has them"
            )
        return folder

    @classmethod
    def peek(cls, path: Path) -> "RunFolder":
        """Read a run.json of any version and kind. Raises RunError if it is missing, damaged or of another run."""
        file = path / ABOUT
        sealed = parse_object(file, _read(file, JSON_BYTES))
        if "files" not in sealed and "checksum" not in sealed:
            return cls(path, sealed, None)
        with _damage(file):
            values = unseal(sealed, file)
            files = values.get("files")
            if not isinstance(files, dict) or not {HISTORY, WEIGHTS} <= files.keys():
                raise CacheError(f"{file} is damaged: it lacks checksums")
        run = cls(path, values, files)
        run.read(HISTORY, JSON_BYTES)  # each run has its own, with its times: another run's file would hide this run
        return run

    @property
    def kind(self) -> str:
        return str(self.values.get("kind", HEAD))

    @property
    def created(self) -> str:
        return str(self.values.get("created", ""))

    def _check_kind(self, kind: str | None) -> None:
        if self.kind not in FORMATS:
            raise RunError(f"{self.path}: this version does not know runs of kind {self.kind!r}")
        if self.values.get("format") != FORMATS[self.kind]:
            raise RunError(
                f"{self.path}: a run of another version (format {self.values.get('format')}, not "
                f"{FORMATS[self.kind]}); train again"
            )
        if kind not in (None, self.kind):
            raise RunError(f"run {self.path.resolve().name} {USES[self.kind]}")

    def has(self, name: str) -> bool:
        """Whether the run has a file. Raises RunError for one that was added later."""
        there = os.path.lexists(self.path / name)
        if self.files is None:
            return there
        if there and name not in self.files:
            raise RunError(f"{self.path / name} is not a file of this run: {ABOUT} does not list it; move it away")
        return name in self.files

    def read(self, name: str, limit: int) -> bytes:
        """Return a file's bytes, of which there are at most ``limit``. Raises RunError if they are not as written."""
        data = _read(self.path / name, limit)
        self._check(name, describe(data))
        return data

    def read_json(self, name: str) -> JsonObject:
        """Return the JSON object in a file. Raises RunError if it is not as written, or not an object."""
        return parse_object(self.path / name, self.read(name, JSON_BYTES))

    def check(self) -> None:
        """Check that the run is complete and its files are as written, without keeping them. Raises RunError."""
        self.has(HELD_OUT)
        for name in FILES[1:] if self.files is None else self.files:
            digest, n_bytes = hashlib.sha256(), 0
            with _named_reads(self.path / name), open_regular(self.path / name) as file:
                n_bytes = os.fstat(file.fileno()).st_size
                if self.files is not None and n_bytes == self.files[name].get("bytes"):  # another size needs no reading
                    while piece := file.read(PIECE):
                        digest.update(piece)
            self._check(name, {"bytes": n_bytes, "sha256": digest.hexdigest()})

    def _check(self, name: str, found: JsonObject) -> None:
        if self.files is not None and found != self.files.get(name):
            raise RunError(f"{self.path / name} is damaged: its checksum does not fit {ABOUT}; {RESTORE}")


def _read(file: Path, limit: int) -> bytes:
    with _named_reads(file):
        return read_bounded(file, limit)


@contextmanager
def _named_reads(file: Path) -> Iterator[None]:
    """Turn an error of the system into a RunError that names the file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{file} is missing: {file.parent} is not a complete run; {RESTORE}") from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}; {RESTORE}") from error


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except CacheError as error:
        raise RunError(f"{error}; {RESTORE}") from None
    except RecursionError as error:
        raise RunError(f"{file} is damaged: {error}; {RESTORE}") from None


def parse_object(file: Path, data: bytes) -> JsonObject:
    """Return a JSON object. Raises RunError, naming the file, if the bytes are something else."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: cannot be read: {error}; {RESTORE}") from error
    if not isinstance(values, dict):
        raise RunError(f"{file}: must hold a JSON object. Got {type(values).__name__} instead; {RESTORE}")
    return values


def run_folders(runs: Path) -> list[Path]:
    """Return the folders in a directory that are, or were, runs, by name; also those that lack files or are closed."""
    try:
        entries = sorted(os.scandir(runs), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        return []
    return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and _like_run(Path(entry.path))]


def _like_run(path: Path) -> bool:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return False
        names = os.listdir(path)
    except OSError:
        return True  # a link that leads nowhere, or a folder that may not be read: nobody knows what it holds
    return UNFINISHED not in names and not {*FILES, HELD_OUT}.isdisjoint(names)


def write_run(
    runs: Path,
    name: str,
    about: JsonObject,
    files: Mapping[str, bytes],
    card: Callable[[str], bytes] | None = None,
    unfinished: bool = False,
) -> Path:
    """Write a run to a new directory name-1, name-2, ..., which appears only when all files are written.

    Its run.json has the values of ``about``, the checksums of ``files``, and its own. ``card`` gives the model card for
    the name of the run. An ``unfinished`` run is in no list until ``finish_run``; if this process ends before, the next
    writer removes it, with what other killed writers left.
    """
    runs.mkdir(parents=True, exist_ok=True)
    _sweep(runs)
    with temporary_folder(runs, NEW) as temporary:
        folder = temporary / "run"
        folder.mkdir()
        for file, data in files.items():
            write_atomically(folder / file, data)
        write_atomically(folder / ABOUT, to_json(sealed_about(about, files)).encode())
        if unfinished:
            write_atomically(folder / UNFINISHED, b"")
            hold(folder)  # the lock goes with the folder
        return _move_to_free(folder, runs / slug(name), card)


def finish_run(path: Path) -> None:
    """Let a run that was written as unfinished count as a run."""
    (path / UNFINISHED).unlink(missing_ok=True)


def _sweep(runs: Path) -> None:
    """Remove what killed writers left in a directory of runs."""
    for other in run_folders(runs):
        sweep_files(other)
    sweep(path.parent for path in runs.glob(f"*/{UNFINISHED}"))


def sealed_about(about: JsonObject, files: Mapping[str, bytes]) -> JsonObject:
    """Return the values of run.json with the checksums of the other files, and their own."""
    described = {file: describe(data) for file, data in files.items()}
    return seal(json.loads(to_json({**about, "files": described})))  # as they are read back: keys as text, NaN as null


def describe(data: bytes) -> JsonObject:
    """Return what run.json says of a file's bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _move_to_free(folder: Path, name: Path, card: Callable[[str], bytes] | None) -> Path:
    """Move a folder to the first free name of name-1, name-2, ...; another process may take one at any moment."""
    number = 1
    while True:
        path = name.with_name(f"{name.name}-{number}")
        try:
            if not path.exists():
                if card is not None:
                    write_atomically(folder / CARD, card(path.name))
                return folder.rename(path)
        except OSError:
            if not path.exists():
                raise
        number += 1


def time_of_creation(runs: Path) -> str:
    """Return the time of now, or the one just after the newest run in a directory if the clock was set back.

    The latest run, which commands use by default, is thus always the one that was made last.
    """
    clock, latest = datetime.now(UTC), None
    for path in run_folders(runs):
        with suppress(RunError, ValueError):
            created = datetime.fromisoformat(RunFolder.peek(path).created)
            created = created if created.tzinfo else created.replace(tzinfo=UTC)
            latest = max((created, path), latest or (created, path))
    now = clock.replace(microsecond=clock.microsecond // 1000 * 1000)
    if latest is not None and latest[0] >= now:
        with suppress(OverflowError):
            now = latest[0] + timedelta(milliseconds=1)
        if latest[0] - clock > timedelta(seconds=1):
            logger.warning(
                "run %s is of a later time (%s) than the clock shows; the new run counts as made just after it",
                latest[1].name,
                latest[0].isoformat(" ", timespec="seconds"),
            )
    return now.isoformat(timespec="milliseconds")
