"""MM-IMDb: film posters, plots and genres, from the raw archive or from `multimodal_imdb.hdf5` (arXiv:1702.01992)."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from cachefuse.data.column import Column, Source, TextOrSource, TooLong, checked_text
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples, well_formed
from cachefuse.data.readers.hdf5 import ArrayImage
from cachefuse.data.readers.hdf5_file import find_dataset, image_column, open_hdf5, read_strings
from cachefuse.data.readers.json_file import read_json
from cachefuse.errors import DataError
from cachefuse.files import JsonObject
from cachefuse.printable import listed

SPLITS = {"train": "train", "dev": "val", "val": "val", "test": "test"}
MAX_JSON_BYTES = 1 << 30
MAX_FILMS = 1_000_000
MAX_GENRES = 100
HDF5_NAME = "multimodal_imdb.hdf5"
# The Caffe VGG means that the file's writer subtracted, in its B, G, R order.
BGR_MEANS = np.array([103.939, 116.779, 123.68], np.float32)[:, None, None]

_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True)
class Film:
    """One row of either layout, with all its genres."""

    id: str
    split: str
    genres: tuple[str, ...]
    image: Source
    plot: str | TooLong


@dataclass(frozen=True, slots=True)
class VggImage(ArrayImage):
    """A poster stored as input of VGG: (3, H, W) int32, blue first, channel means subtracted."""

    DTYPE: ClassVar[str] = "int32"

    def to_rgb(self, values: np.ndarray) -> np.ndarray:
        # The writer rounded `pixel - mean` towards zero: rounding away from zero restores the pixel.
        restored = np.clip(values, -255, 255).astype(np.float32) + BGR_MEANS
        restored = np.where(values < 0, np.floor(restored), np.ceil(restored))
        bgr: np.ndarray = np.clip(restored, 0, 255).astype(np.uint8)
        return bgr[::-1].transpose(1, 2, 0)


class MmImdbReader(Reader):
    """Reads the raw archive, or else the HDF5 file with plots from the archive's json files beside it.

    drop_genres: genres that are not classes; films without other genres are dropped.
    """

    drop_genres: tuple[str, ...] = ("News", "Adult", "Talk-Show", "Reality-TV")

    def missing(self, root: Path) -> list[str]:
        source = _raw_folder(root) or _hdf5_file(root)
        return [] if source else [f"split.json with dataset/ (or {HDF5_NAME})"]

    def read(self, root: Path) -> Samples:
        images: list[Source] = []
        plots: list[tuple[TextOrSource, ...]] = []
        samples = Samples(modalities={"image": Column(images), "text": Column.texts(plots)})
        folder, file = _raw_folder(root), _hdf5_file(root)
        if folder is not None and (file is None or any(islice((folder / "dataset").glob("*.jpeg"), 1))):
            films = list(_read_raw(folder, root, samples.notes))
        elif file is not None:
            films = _read_hdf5(check_inside(file, root), samples)
        else:
            raise DataError(f"{root}: has neither split.json with dataset/ nor {HDF5_NAME}")
        self._add(samples, films, images, plots)
        return samples

    def _add(
        self, samples: Samples, films: list[Film], images: list[Source], plots: list[tuple[TextOrSource, ...]]
    ) -> None:
        dropped = 0
        for film in films:
            genres = tuple(dict.fromkeys(genre for genre in film.genres if genre not in self.drop_genres))
            if not genres:
                dropped += 1
                continue
            samples.ids.append(film.id)
            samples.splits.append(film.split)
            samples.labels.append(genres)
            images.append(film.image)
            plots.append((film.plot,) if film.plot else ())
        if dropped:
            samples.notes.append(f"dropped {dropped:,} films that have none of the kept genres")


def _raw_folder(root: Path) -> Path | None:
    folders = (root, root / "mmimdb")
    return next((f for f in folders if (f / "split.json").is_file() and (f / "dataset").is_dir()), None)


def _hdf5_file(root: Path) -> Path | None:
    files = (root / HDF5_NAME, root / "mmimdb" / HDF5_NAME)
    return next((file for file in files if file.is_file()), None)


def _read_raw(folder: Path, root: Path, notes: list[str]) -> Iterator[Film]:
    unreadable: list[str] = []
    for split, ids in _read_split_file(check_inside(folder / "split.json", root)).items():
        for film in ids:
            path = check_inside(folder / "dataset" / f"{film}.json", root)
            content = _read_film(path)
            if content is None:
                unreadable.append(film)
                continue
            genres = tuple(genre for genre in _strings(content.get("genres")) if genre)
            image = FileImage(path.with_suffix(".jpeg"), root)
            yield Film(film, split, genres, image, _longest_plot(content))
    if unreadable:
        notes.append(f"dropped {len(unreadable):,} films of split.json without a readable json: {unreadable[0]} ...")


def _read_split_file(path: Path) -> dict[str, list[str]]:
    """Return film ids by our split names. Raises DataError if the file is not {"train": [ids], ...}."""
    try:
        content = read_json(path, MAX_JSON_BYTES, "MM-IMDb")
    except OSError as error:
        raise DataError(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content or content.keys() - SPLITS.keys():
        got = listed(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path.name}: must map train, dev and test to lists of film ids. Got {got or 'nothing'} instead"
        )
    splits: dict[str, list[str]] = {}
    for name, ids in content.items():
        if not isinstance(ids, list):
            raise DataError(f"{path.name}: {name} must be a list of film ids. Got {type(ids).__name__} instead")
        for film in ids:
            _check_id(film, path.name)
        splits.setdefault(SPLITS[name], []).extend(ids)
    return splits


def _check_id(film: object, origin: str) -> None:
    # Ids become file names: one with a slash would leave the folder, and a number has lost its leading zeros.
    if not isinstance(film, str) or not _ID.fullmatch(film):
        raise DataError(f"{origin}: a film id must be a string of letters and digits. Got {film!r} instead")


def _read_film(path: Path) -> JsonObject | None:
    try:
        content = read_json(path, MAX_JSON_BYTES, "MM-IMDb")
    except (OSError, DataError):
        return None
    return content if isinstance(content, dict) else None


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [well_formed(item).strip() for item in values if isinstance(item, str)]


def _longest_plot(content: JsonObject) -> str | TooLong:
    plots = content.get("plot")
    too_long = [plot for plot in (plots if isinstance(plots, list) else [plots]) if isinstance(plot, TooLong)]
    return max(too_long, key=lambda plot: plot.n_bytes, default=checked_text(max(_strings(plots), key=len, default="")))


def _read_hdf5(path: Path, samples: Samples) -> list[Film]:
    with open_hdf5(path) as file:
        n_images = len(image_column(file, "images", VggImage.DTYPE))
        ids = read_strings(find_dataset(file, "imdb_ids"), "ascii")
        genres = _read_genres(file, path.name, samples)
        if not n_images == len(ids) == len(genres):
            raise DataError(f"{path.name}: has {n_images} images, {len(ids)} imdb_ids and {len(genres)} rows of genres")
        splits = _read_split_attribute(file, path.name, len(ids))
    for film in ids:
        _check_id(film, path.name)
    plots = _plots_beside(path, ids, samples)
    unassigned = splits.count("")
    if unassigned:
        samples.notes.append(f"dropped {unassigned:,} rows that are in no split")
    return [
        Film(ids[row], split, genres[row], VggImage(path, "images", row), plots[row])
        for row, split in enumerate(splits)
        if split
    ]


def _read_genres(file: h5py.File, name: str, samples: Samples) -> list[tuple[str, ...]]:
    dataset = find_dataset(file, "genres")
    shape = dataset.shape
    if len(shape) != 2 or shape[0] > MAX_FILMS or shape[1] > MAX_GENRES or dataset.dtype.kind not in "biuf":
        raise DataError(f"{name}: genres must be a matrix of 0 and 1. Got {dataset.dtype} of shape {shape} instead")
    try:
        names = json.loads(dataset.attrs.get("target_names", "null"))
    except (TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(set(map(str, names))) != shape[1]:
        raise DataError(f"{name}: attribute target_names of genres must be a JSON list of {shape[1]} different names")
    classes = tuple(map(str, names))
    samples.classes = classes
    return [tuple(classes[i] for i in np.flatnonzero(row)) for row in dataset[:]]


def _read_split_attribute(file: h5py.File, name: str, n: int) -> list[str]:
    """Return each row's split, or "" without one, from the array of row ranges of the fuel library."""
    table = file.attrs.get("split")
    dtype: np.dtype = getattr(table, "dtype", np.dtype(object))
    kinds = {field: dtype[field].base.kind for field in dtype.names or ()}
    if [kinds.get(field) for field in ("split", "source", "start", "stop")] != ["S", "S", "i", "i"]:
        raise DataError(f"{name}: attribute split must be an array of split, source, start and stop")
    rows = table.ravel()
    genre_rows = rows[rows["source"] == b"genres"]  # every column is listed, with the same ranges
    splits = [""] * n
    for row in genre_rows if len(genre_rows) else rows:
        split, start, stop = row["split"].decode("ascii", "replace"), row["start"].item(), row["stop"].item()
        if split not in SPLITS:
            raise DataError(f"{name}: unknown split {split!r}; expected one of: {listed(SPLITS)}")
        if not 0 <= start <= stop <= n or ("indices" in kinds and row["indices"]):
            raise DataError(f"{name}: split {split!r} must be a range of {n:,} rows. Got {start:,} to {stop:,} instead")
        splits[start:stop] = [SPLITS[split]] * (stop - start)
    return splits


def _plots_beside(path: Path, ids: list[str], samples: Samples) -> Sequence[str | TooLong]:
    """Return each film's longest plot from `dataset/<id>.json` beside the HDF5 file, or "" without one."""
    folder = path.parent / "dataset"
    plots = [_longest_plot(_read_film(folder / f"{film}.json") or {}) for film in ids] if folder.is_dir() else []
    n_plots = sum(map(bool, plots))
    if not n_plots:
        del samples.modalities["text"]
        samples.notes.append(
            f"the text modality is absent: {path.name} has only word numbers, no plots; "
            "to add it, put dataset/<id>.json of the raw archive (mmimdb.tar.gz) beside the file"
        )
        return [""] * len(ids)
    if n_plots < len(ids):
        samples.notes.append(f"{len(ids) - n_plots:,} of {len(ids):,} films have no plot in dataset/<id>.json")
    return plots
