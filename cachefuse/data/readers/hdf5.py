"""HDF5 files with one dataset per column, such as the image, text and label of every row."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
from PIL import Image
from pydantic import Field, field_validator, model_validator

from cachefuse.data.column import Column, TextOrSource
from cachefuse.data.digests import hash_parts
from cachefuse.data.images import FAILURES, file_fingerprint
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import InsidePath, Reader, Samples, split_names
from cachefuse.data.readers.hdf5_file import (
    file_name,
    find_dataset,
    image_column,
    open_hdf5,
    open_shared,
    read_strings,
    read_texts,
)
from cachefuse.errors import BadSampleError, DataError
from cachefuse.printable import listed


@dataclass(frozen=True, slots=True)
class ArrayImage:
    """One row of a dataset of images, (N, H, W, 3) or (N, 3, H, W). Its file is opened on demand."""

    DTYPE: ClassVar[str] = "uint8"
    path: Path
    key: str
    row: int

    @property
    def name(self) -> str:
        return f"{self.path}:{self.key}[{self.row}]"

    def load(self) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.to_rgb(self._read())))

    def to_rgb(self, values: np.ndarray) -> np.ndarray:
        """Convert a stored row to (H, W, 3) uint8."""
        return values if values.shape[-1] == 3 else values.transpose(1, 2, 0)

    def fingerprint(self) -> str:
        return f"{self.path.name}:{file_fingerprint(self.path)}:{self.key}:{self.row}"

    def digest(self) -> str:
        try:
            values = self._read()
        except BadSampleError:  # not its reason: h5py's have paths, addresses and times
            return hash_parts("unusable", "can't be read")
        return hash_parts("array", values.dtype.str, str(values.shape), values.tobytes())

    def _read(self) -> np.ndarray:
        """Return the stored row. Raises BadSampleError if it is not readable, OSError if the machine fails."""
        try:
            dataset = image_column(open_shared(self.path), self.key, self.DTYPE)
            if not 0 <= self.row < len(dataset):
                raise BadSampleError(f"there is no row {self.row}; {self.key!r} has {len(dataset):,}")
            values: np.ndarray = dataset[self.row]
        except (DataError, OSError, RuntimeError, KeyError) as error:
            if getattr(error, "errno", None) in FAILURES:
                raise
            raise BadSampleError(f"can't be read: {error}") from error
        return values


class Hdf5Reader(Reader):
    """Reads one file per split. image, text, labels, id and group are the keys of datasets, the same in every file."""

    files: dict[str, InsidePath] = Field(min_length=1)  # split -> file
    image: str | None = None
    text: str | None = None
    labels: str | None = None
    label_separator: str | None = None  # left out: one label per row
    id: str | None = None  # left out: "<split>-<row>"
    group: str | None = None
    encoding: str = "utf-8"
    drop_first_sentence: bool = False

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, encoding: str) -> str:
        try:
            b"a".decode(encoding)
        except (LookupError, UnicodeError):
            raise ValueError(f"unknown text encoding {encoding!r}; use one such as utf-8 or latin-1") from None
        return encoding

    @model_validator(mode="after")
    def _has_a_modality(self) -> "Hdf5Reader":
        if self.image is None and self.text is None:
            raise ValueError("must name an image or a text dataset, or both")
        return self

    def missing(self, root: Path) -> list[str]:
        return [file for file in self.files.values() if not (root / file).is_file()]

    def read(self, root: Path) -> Samples:
        samples = Samples(groups=[] if self.group else None)
        images: list[ArrayImage] = []
        texts: list[tuple[TextOrSource, ...]] = []
        for split, file in self.files.items():
            with open_hdf5(check_inside(root / file, root)) as opened:
                self._add(samples, split, opened)
                images += self._images(opened, root / file)
                texts += self._texts(opened)
        if self.image:
            samples.modalities["image"] = Column(images)
        if self.text:
            samples.modalities["text"] = Column.texts(texts)
        return samples

    def _add(self, samples: Samples, split: str, file: h5py.File) -> None:
        n = self._count_rows(file)
        samples.splits += [split] * n
        samples.ids += self._column(file, self.id) if self.id else [f"{split}-{row}" for row in range(n)]
        labels = self._column(file, self.labels) if self.labels else [""] * n
        samples.labels += [
            tuple(split_names(value, self.label_separator)) if value.strip() else None for value in labels
        ]
        if samples.groups is not None and self.group:
            samples.groups += self._column(file, self.group)

    def _images(self, file: h5py.File, path: Path) -> list[ArrayImage]:
        """Return a file's images. Raises DataError if its dataset has other data."""
        if not self.image:
            return []
        n = len(image_column(file, self.image, ArrayImage.DTYPE))
        return [ArrayImage(path, self.image, row) for row in range(n)]

    def _texts(self, file: h5py.File) -> list[tuple[TextOrSource, ...]]:
        """Return each row's text, or () if it is empty."""
        texts = read_texts(find_dataset(file, self.text), self.encoding) if self.text else []
        if self.drop_first_sentence:
            texts = [without_first_sentence(text) if isinstance(text, str) else text for text in texts]
        return [(text,) if text else () for text in texts]

    def _column(self, file: h5py.File, key: str) -> list[str]:
        return read_strings(find_dataset(file, key), self.encoding)

    def _count_rows(self, file: h5py.File) -> int:
        keys = [key for key in (self.image, self.text, self.labels, self.id, self.group) if key]
        counts = {key: len(find_dataset(file, key)) for key in keys}
        if len(set(counts.values())) > 1:
            lengths = listed(f"{key} has {n:,}" for key, n in counts.items())
            raise DataError(f"{file_name(file)}: its columns must have the same number of rows, but {lengths}")
        return counts[keys[0]]


def without_first_sentence(text: str) -> str:
    """Return a text without its first sentence."""
    return "".join(re.split(r"(?<=[.!?])\s+", text, maxsplit=1)[1:])
