"""One encoder's features of one modality in a store: which rows of its views are there, and how to read them."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cachefuse.errors import CacheError
from cachefuse.store.format import DTYPES, append_lines, block_rows, checksum, provenance_key, read_lines, seal, unseal
from cachefuse.store.opening import open_rows
from cachefuse.store.rows import Rows
from cachefuse.store.samples import StoredSamples
from cachefuse.store.views import View, Written, declare_group

logger = logging.getLogger(__name__)


JOURNAL = "journal.jsonl"


class Features:
    """One encoder's features of one modality: views (pooled, tokens, ids) of N rows, kept in blocks.

    A row is there if the journal says so, and a block is what the journal says only if its checksum fits.
    """

    def __init__(self, samples: StoredSamples, path: Path) -> None:
        self.samples = samples
        self.path = path
        try:
            declared = json.loads((path / "zarr.json").read_bytes())
            self._meta = unseal(declared["attributes"]["cachefuse"], path / "zarr.json")
            self.encoder: str = self._meta["encoder"]
            self.modality: str = self._meta["modality"]
            self.source: str = self._meta["source"]
            self.key: str = self._meta["key"]
            self.provenance: dict[str, str] = self._meta["provenance"]
            self.views = {view.name: view for view in map(View.from_dict, self._meta["views"])}
        except (OSError, ValueError, KeyError, TypeError, CacheError) as error:
            raise CacheError(f"{path}/zarr.json is damaged; delete {path} to extract these features again") from error
        self.n_rows = samples.n_items(self.modality)

    @classmethod
    def create(cls, samples: StoredSamples, path: Path, encoder: str, source: str, modality: str,
               provenance: Mapping[str, str]) -> "Features":  # fmt: skip
        """Make the group of features that are new; ``source`` opens the encoder."""
        key = provenance_key(provenance)
        about = {"encoder": encoder, "modality": modality, "source": source, "key": key}
        declare_group(samples.path / "features")
        declare_group(path.parent)
        declare_group(path, {"cachefuse": seal({**about, "provenance": dict(provenance), "views": []})})
        return cls(samples, path)

    @cached_property
    def _written(self) -> dict[tuple[str, int], Written]:
        found: dict[tuple[str, int], Written] = {}
        for line in read_lines(self.path / JOURNAL):
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # a line of another shape says nothing
                place = line["view"], line["block"]
                if "stale" in line:
                    old = found.get(place, Written(0, {}))
                    found[place] = Written(old.rows, old.files, old.stale | set(line["stale"]), old.cosine)
                else:
                    files = {name: (size, crc) for name, (size, crc) in line["files"].items()}
                    cosine = line.get("cosine")
                    found[place] = Written(line["rows"], files, frozenset(), cosine and (cosine[0], cosine[1]))
        return found

    @property
    def n_written(self) -> int:
        """The number of blocks in the journal, of all views."""
        return sum(bool(written.files) for written in self._written.values())

    def written(self, view: str, block: int) -> Written | None:
        """Return what the journal has of a block."""
        return self._written.get((view, block))

    def note_written(self, view: str, block: int, written: Written) -> None:
        """Add a block to the journal; from here on it counts."""
        line: dict[str, Any] = {"view": view, "block": block, "rows": written.rows, "files": dict(written.files)}
        if written.cosine:
            line["cosine"] = written.cosine
        append_lines(self.path / JOURNAL, [line])
        self._written[(view, block)] = written

    def forget(self, view: str, rows: Iterable[int]) -> None:
        """Note in the journal that some rows are outdated, so that they are computed again, and not read before."""
        blocks: dict[int, list[int]] = {}
        for row in rows:
            blocks.setdefault(row // self.views[view].block_rows, []).append(row)
        lines = [{"view": view, "block": block, "stale": stale} for block, stale in blocks.items()]
        append_lines(self.path / JOURNAL, [*lines, *lines])  # were the only one damaged, outdated rows would count
        self.__dict__.pop("_written", None)

    def n_blocks(self, view: str) -> int:
        """Return how many blocks a view has when it is whole."""
        return -(-self.n_rows // self.views[view].block_rows)

    def rows_of(self, view: str, block: int) -> range:
        """Return the rows of a block."""
        size = self.views[view].block_rows
        return range(block * size, min((block + 1) * size, self.n_rows))

    def files(self, view: str, block: int) -> dict[str, Path]:
        """Return where a block lies, by array."""
        return self.views[view].files(self.path, block)

    def is_whole(self, view: str, block: int) -> bool:
        """Whether a block is in the journal with all of its rows, and its files are there in their full size."""
        written = self.written(view, block)
        if written is None or written.stale or written.rows != len(self.rows_of(view, block)):
            return False
        return self._sizes_fit(view, block, written) or self.views[view].is_foreign(self.path, block)

    def pending(self, view: str) -> list[int]:
        """Return the blocks of a view that are not whole."""
        return [block for block in range(self.n_blocks(view)) if not self.is_whole(view, block)]

    def missing_rows(self, view: str) -> np.ndarray:
        """Return the rows of a view that are still to be computed."""
        if view not in self.views:
            return np.arange(self.n_rows)
        blocks = set(self.pending(view))
        if blocks:  # writing one in our layout makes those in another one unreadable
            blocks |= {block for block in range(self.n_blocks(view)) if self.views[view].is_foreign(self.path, block)}
        missing = [self.missing_rows_of(view, block) for block in sorted(blocks)]
        return np.concatenate(missing) if missing else np.empty(0, np.int64)

    def missing_rows_of(self, view: str, block: int) -> np.ndarray:
        """Return the rows of a block that are not written, or outdated; all of them if what is there is damaged."""
        return self.missing_and_stored(view, block)[0]

    def missing_and_stored(self, view: str, block: int) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
        """Return a block's missing rows, and its arrays as stored, which have the others; None if all are missing."""
        rows, written = np.array(self.rows_of(view, block)), self.written(view, block)
        stored = self.stored(view, block)
        if written is None or stored is None:
            return rows, None
        kept = (rows < rows[0] + written.rows) & ~np.isin(rows, list(written.stale))
        return rows[~kept], stored if kept.any() else None

    def stored(self, view: str, block: int) -> dict[str, np.ndarray] | None:
        """Return a block's arrays as they are stored, offsets included; None if any of it is not as it was written."""
        about, written, files = self.views[view], self.written(view, block), self.files(view, block)
        if written is None or not self._sizes_fit(view, block, written):
            return None
        arrays = {}
        n_rows = written.rows
        if about.ragged:
            arrays[about.offsets] = np.fromfile(files[about.offsets], "<i8")
            n_rows = int(arrays[about.offsets][-1])
        for name, (shape, dtype) in about.arrays.items():
            size = n_rows * math.prod(shape) * dtype.itemsize
            if not 0 <= size <= files[name].stat().st_size:
                return None
            arrays[name] = np.memmap(files[name], dtype, "r", shape=(n_rows, *shape)) if size else np.empty(
                (n_rows, *shape), dtype
            )  # fmt: skip
        return arrays if all(checksum(array) == written.files[name][1] for name, array in arrays.items()) else None

    def begin(self, view: View) -> None:
        """Add a view that is new."""
        self.views[view.name] = view
        self._meta["views"] = [view.to_dict() for view in self.views.values()]
        declare_group(self.path, {"cachefuse": seal(self._meta)})

    def new_view(self, name: str, row_shape: tuple[int, ...], *, ragged: bool, dtype: str, vocabulary: int = 0) -> View:
        """Return how a view is to be kept whose rows are (D,), (T, D), or where ragged (T_i, D), or (T_i,) of ids, with
        T_i near the given T."""
        row_bytes = math.prod(row_shape) * np.dtype(DTYPES[dtype]).itemsize
        return View(name, row_shape, block_rows(self.n_rows, row_bytes), ragged, dtype, vocabulary)

    def rows(self, view: str = "pooled", *, whole: bool = True) -> Rows:
        """Return a view's rows, to be read as they are asked for.

        Raises CacheError if any row is missing, saying how to go on; with ``whole`` False the blocks that are finished
        can be read while others are not. Nothing is read that was not written.
        """
        if view not in self.views:
            raise CacheError(
                f"{self.samples.path} has no {view} view of {self.encoder} ({self.modality}); make it with "
                f"cachefuse extract --dataset {self.samples.dataset} --encoder {self.source} --views {view}"
            )
        pending = self.pending(view)
        if pending and whole:
            raise CacheError(self._not_whole(view, pending))
        rows = self.open_blocks(view, [block for block in range(self.n_blocks(view)) if block not in set(pending)])
        if not rows.mapped:
            place = self.path / view
            logger.warning("%s is laid out in another way than cachefuse writes; zarr-python reads it, slower", place)
        return rows

    def open_blocks(self, view: str, blocks: Iterable[int]) -> Rows:
        """Return the rows of some blocks, whole ones; those of the others can't be read."""
        written = {block: note for block in blocks if (note := self.written(view, block)) is not None}
        return open_rows(self.views[view], self.path, self.name(view), self.n_rows, written)

    def read(self, view: str = "pooled", rows: int | slice | np.ndarray | None = None) -> Any:
        """Return rows of a view: (n, D), (n, T, D), for ragged tokens a list of n (T_i, D) arrays, for ids of (T_i,).

        See ``rows``.
        """
        return self.rows(view)[slice(None) if rows is None else rows]

    def name(self, view: str) -> str:
        """Return what messages call a view."""
        return f"{self.encoder} ({self.modality}, {view})"

    def _not_whole(self, view: str, pending: list[int]) -> str:
        n_missing = sum(len(self.missing_rows_of(view, block)) for block in pending)
        lost = [block for block in pending if self.written(view, block) and self.stored(view, block) is None]
        damage = f", and block {lost[0]} is damaged: it is gone, cut short or changed" if lost else ""
        return (
            f"{self.name(view)} has {self.n_rows - n_missing:,} of {self.n_rows:,} rows{damage}; "
            f"run the same cachefuse extract again to go on"
        )

    def _sizes_fit(self, view: str, block: int, written: Written) -> bool:
        try:
            sizes = {name: file.stat().st_size for name, file in self.files(view, block).items()}
        except (FileNotFoundError, NotADirectoryError):
            return False
        return sizes == {name: size for name, (size, _) in written.files.items()}
