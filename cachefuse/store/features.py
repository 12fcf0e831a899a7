"""One encoder's features of one modality in a store: the rows that each view has, and how to read them."""

import json
import logging
import math
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cachefuse.data.dataset import dataset_options
from cachefuse.errors import CacheError
from cachefuse.files import JsonObject, read_bounded
from cachefuse.store.format import (
    DTYPES,
    MAX_METADATA,
    append_lines,
    block_rows,
    checksum,
    n_damaged_lines,
    provenance_key,
    read_lines,
    seal,
    unseal,
)
from cachefuse.store.long_texts import LongTexts
from cachefuse.store.opening import open_rows
from cachefuse.store.rows import RowKey, Rows
from cachefuse.store.samples import StoredSamples
from cachefuse.store.views import View, Written, declare_group

logger = logging.getLogger(__name__)


JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Fault:
    """Why a block is not whole: it is damaged, or some of its rows are still to be computed."""

    reason: str
    is_damage: bool


class Features:
    """One encoder's features of one modality: views (pooled, tokens, ids, ngrams) of N rows, stored in blocks.

    A row exists if the journal lists it. A block is valid only if its checksum equals the journal's.
    """

    def __init__(self, samples: StoredSamples, path: Path) -> None:
        self.samples = samples
        self.path = path
        try:
            declared = json.loads(read_bounded(path / "zarr.json", MAX_METADATA))
            self._meta = unseal(declared["attributes"]["cachefuse"], path / "zarr.json")
            self.encoder: str = self._meta["encoder"]
            self.modality: str = self._meta["modality"]
            self.source: str = self._meta["source"]
            self.key: str = self._meta["key"]
            self.provenance: dict[str, str] = self._meta["provenance"]
            self.views = {view.name: view for view in map(View.from_dict, self._meta["views"])}
            # Views that were asked for, of which no row is written yet, with their dtypes.
            self.asked = {name: dtype for name, dtype in self._meta.get("asked", {}).items() if name not in self.views}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CacheError) as error:
            raise CacheError(
                f"{path}/zarr.json is damaged ({error}); delete {path} to extract these features again"
            ) from error
        self.n_rows = samples.n_items(self.modality)

    @classmethod
    def create(cls, samples: StoredSamples, path: Path, encoder: str, source: str, modality: str,
               provenance: Mapping[str, str]) -> "Features":  # fmt: skip
        """Create the group of new features. ``source`` is the spec that opens the encoder."""
        key = provenance_key(provenance)
        meta = {"encoder": encoder, "modality": modality, "source": source, "key": key}
        declare_group(samples.path / "features")
        declare_group(path.parent)
        declare_group(path, {"cachefuse": seal({**meta, "provenance": dict(provenance), "views": []})})
        return cls(samples, path)

    def ask(self, dtypes: Mapping[str, str]) -> None:
        """Note that views, with their dtypes, are to be extracted, so that they count as missing until they are."""
        asked = {**self.asked, **{view: dtype for view, dtype in dtypes.items() if view not in self.views}}
        if asked != self.asked:
            self.asked = asked
            self._declare()

    def _declare(self) -> None:
        self._meta.pop("asked", None)
        meta = {**self._meta, "asked": self.asked} if self.asked else self._meta
        declare_group(self.path, {"cachefuse": seal(meta)})

    @cached_property
    def _written(self) -> dict[tuple[str, int], Written]:
        blocks: dict[tuple[str, int], Written] = {}
        for line in read_lines(self.path / JOURNAL):
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # skip lines of another shape
                key = line["view"], line["block"]
                if "stale" in line:
                    old = blocks.get(key, Written(0, {}))
                    blocks[key] = replace(old, stale=old.stale | set(line["stale"]))
                else:
                    files = {name: (size, crc) for name, (size, crc) in line["files"].items()}
                    cosine = line.get("cosine")
                    long = dict(line["long"]) if "long" in line else None
                    blocks[key] = Written(line["rows"], files, frozenset(), cosine and (cosine[0], cosine[1]), long)
        return blocks

    @cached_property
    def n_damaged_lines(self) -> int:
        """The number of damaged lines in the journal, as it was first read."""
        return n_damaged_lines(self.path / JOURNAL)

    @property
    def n_written(self) -> int:
        """The number of blocks in the journal, over all views."""
        return sum(bool(written.files) for written in self._written.values())

    def written(self, view: str, block: int) -> Written | None:
        """Return the journal's entry for a block, or None."""
        return self._written.get((view, block))

    def note_written(self, view: str, block: int, written: Written) -> None:
        """Add a block to the journal. From then on its rows exist."""
        line: JsonObject = {"view": view, "block": block, "rows": written.rows, "files": dict(written.files)}
        if written.cosine:
            line["cosine"] = written.cosine
        if written.long is not None:
            line["long"] = sorted(written.long.items())
        append_lines(self.path / JOURNAL, [line])
        self._written[(view, block)] = written

    def forget(self, view: str, rows: Iterable[int]) -> None:
        """Mark rows as outdated in the journal: they are computed again before anything reads them."""
        blocks: dict[int, list[int]] = {}
        for row in rows:
            blocks.setdefault(row // self.views[view].block_rows, []).append(row)
        lines = [{"view": view, "block": block, "stale": stale} for block, stale in blocks.items()]
        append_lines(self.path / JOURNAL, [*lines, *lines])  # twice, in case one line gets damaged
        self.__dict__.pop("_written", None)

    def long_texts(self) -> LongTexts | None:
        """Return what is known of texts that are longer than the encoder's limit; None if they were not counted."""
        lengths: dict[int, int] = {}
        counted = False
        for written in self._written.values():
            if written.files and written.long is not None:
                counted = True
                lengths |= written.long
        if not counted or "max_length" not in self.provenance:  # a journal may be another encoder's
            return None
        n_texts = int(self.samples.present_rows(self.modality).sum())
        limit, windows = int(self.provenance["max_length"]), self.provenance.get("long_texts") == "windows"
        return LongTexts(n_texts, limit, tuple(lengths.values()), windows)

    def n_blocks(self, view: str) -> int:
        """Return the number of blocks of a complete view."""
        return -(-self.n_rows // self.views[view].block_rows)

    def rows_of(self, view: str, block: int) -> range:
        """Return the rows of a block."""
        size = self.views[view].block_rows
        return range(block * size, min((block + 1) * size, self.n_rows))

    def files(self, view: str, block: int) -> dict[str, Path]:
        """Return the files of a block, by array."""
        return self.views[view].files(self.path, block)

    def is_whole(self, view: str, block: int) -> bool:
        """Whether the journal lists all rows of a block, and its files have their full size."""
        written = self.written(view, block)
        if written is None or written.stale or written.rows != len(self.rows_of(view, block)):
            return False
        return self._sizes_fit(view, block, written) or self.views[view].is_foreign(self.path, block)

    def fault(self, view: str, block: int) -> Fault | None:
        """Return why a block is not whole; None if it is, as far as the sizes of its files tell."""
        if self.is_whole(view, block):
            return None
        written, n_rows = self.written(view, block), len(self.rows_of(view, block))
        if written is None or not written.files:
            lost = self.n_damaged_lines > 0
            return Fault(f"{JOURNAL} has damaged lines" if lost else "it is not computed yet", lost)
        if self.stored(view, block) is None:
            return Fault("it is lost, cut short or changed", True)
        return Fault(f"{len(self.missing_rows_of(view, block)):,} of its {n_rows:,} rows are to be computed", False)

    def is_complete(self, view: str) -> bool:
        """Whether all rows of a view are written."""
        return view in self.views and not self.pending(view)

    def pending(self, view: str) -> list[int]:
        """Return the blocks of a view that are not whole."""
        return [block for block in range(self.n_blocks(view)) if not self.is_whole(view, block)]

    def missing_rows(self, view: str) -> np.ndarray:
        """Return the rows of a view that are not computed yet."""
        if view not in self.views:
            return np.arange(self.n_rows)
        blocks = set(self.pending(view))
        if blocks:  # a new block in our layout makes blocks in another layout unreadable
            blocks |= {block for block in range(self.n_blocks(view)) if self.views[view].is_foreign(self.path, block)}
        missing = [self.missing_rows_of(view, block) for block in sorted(blocks)]
        return np.concatenate(missing) if missing else np.empty(0, np.int64)

    def missing_rows_of(self, view: str, block: int) -> np.ndarray:
        """Return the rows of a block that are not written or outdated; all rows if its files are damaged."""
        return self.missing_and_stored(view, block)[0]

    def missing_and_stored(self, view: str, block: int) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
        """Return a block's missing rows, and its stored arrays with the other rows; None if all rows are missing."""
        rows, written = np.array(self.rows_of(view, block)), self.written(view, block)
        stored = self.stored(view, block)
        if written is None or stored is None:
            return rows, None
        kept = (rows < rows[0] + written.rows) & ~np.isin(rows, list(written.stale))
        return rows[~kept], stored if kept.any() else None

    def stored(self, view: str, block: int) -> dict[str, np.ndarray] | None:
        """Return a block's stored arrays, offsets included; None if any of them is missing or damaged."""
        layout, written, files = self.views[view], self.written(view, block), self.files(view, block)
        if written is None or not self._sizes_fit(view, block, written):
            return None
        arrays = {}
        n_rows = written.rows
        if layout.ragged:
            arrays[layout.offsets] = np.fromfile(files[layout.offsets], "<i8")
            n_rows = int(arrays[layout.offsets][-1])
        for name, (shape, dtype) in layout.arrays.items():
            size = n_rows * math.prod(shape) * dtype.itemsize
            if not 0 <= size <= files[name].stat().st_size:
                return None
            arrays[name] = np.memmap(files[name], dtype, "r", shape=(n_rows, *shape)) if size else np.empty(
                (n_rows, *shape), dtype
            )  # fmt: skip
        return arrays if all(checksum(array) == written.files[name][1] for name, array in arrays.items()) else None

    def begin(self, view: View) -> None:
        """Add a new view."""
        self.views[view.name] = view
        self._meta["views"] = [view.to_dict() for view in self.views.values()]
        self.asked.pop(view.name, None)
        self._declare()

    def new_view(self, name: str, row_shape: tuple[int, ...], *, ragged: bool, dtype: str, vocabulary: int = 0) -> View:
        """Return the layout of a new view.

        Its rows are (D,), (T, D), or if ragged (T_i, D), (T_i,) of ids, or (T_i, 2) of n-grams. Of ragged rows, T is a
        typical T_i.
        """
        row_bytes = math.prod(row_shape) * np.dtype(DTYPES[dtype]).itemsize
        return View(name, row_shape, block_rows(self.n_rows, row_bytes), ragged, dtype, vocabulary)

    def rows(self, view: str = "pooled", *, whole: bool = True) -> Rows:
        """Return a view's rows, which are read lazily.

        Raises CacheError, with what to do, if any row is missing. If ``whole`` is False, finished blocks are readable
        while others are missing. Rows that were never written are never read.
        """
        if view not in self.views and view not in self.asked:
            raise CacheError(
                f"{self.samples.path} has no {view} view of {self.encoder} ({self.modality}); make it with "
                f"cachefuse extract {dataset_options(self.samples.dataset)} --encoder {self.source} --views {view}"
            )
        if view not in self.views:
            raise CacheError(self.not_whole(view))
        pending = self.pending(view)
        if pending and whole:
            raise CacheError(self.not_whole(view))
        rows = self.open_blocks(view, [block for block in range(self.n_blocks(view)) if block not in set(pending)])
        if not rows.mapped:
            logger.warning("%s is in another layout than cachefuse's; zarr-python reads it, slower", self.path / view)
        return rows

    def open_blocks(self, view: str, blocks: Iterable[int]) -> Rows:
        """Return a view's rows, of which those of the given blocks are readable; these must be whole."""
        written = {block: entry for block in blocks if (entry := self.written(view, block)) is not None}
        return open_rows(self.views[view], self.path, self.name(view), self.n_rows, written)

    def read(self, view: str = "pooled", rows: RowKey | None = None) -> np.ndarray | list[np.ndarray]:
        """Return rows of a view: (n, D) or (n, T, D); a list of n arrays, (T_i, D) for ragged tokens, (T_i,) for ids.

        Raises CacheError as ``rows`` does.
        """
        return self.rows(view)[slice(None) if rows is None else rows]

    def name(self, view: str) -> str:
        """Return a view's name for messages."""
        return f"{self.encoder} ({self.modality}, {view})"

    def not_whole(self, view: str) -> str:
        """Return a message: how many rows a view has, the first damaged block, and what to do."""
        pending = self.pending(view) if view in self.views else []
        n_missing = len(self.missing_rows(view))
        rows = f"{self.name(view)} has {self.n_rows - n_missing:,} of {self.n_rows:,} rows"
        for block in pending:
            fault = self.fault(view, block)
            if fault is not None and fault.is_damage:
                return f"{rows}, and block {block} is damaged ({fault.reason}); run cachefuse verify --repair"
        return f"{rows}; run the same cachefuse extract again to go on"

    def _sizes_fit(self, view: str, block: int, written: Written) -> bool:
        try:
            status = {name: file.stat() for name, file in self.files(view, block).items()}
        except OSError:  # gone, or behind a link that leads nowhere or round in a circle
            return False
        sizes = {name: entry.st_size for name, entry in status.items() if stat.S_ISREG(entry.st_mode)}
        return bool(sizes) and sizes == {name: size for name, (size, _) in written.files.items()}
