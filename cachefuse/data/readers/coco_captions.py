"""COCO captions: photographs with about five captions each (arXiv:1504.00325), with the splits of 2017 or 2014."""

from dataclasses import dataclass, field
from pathlib import Path

from cachefuse.data.column import Column, TextOrSource, TooLong, checked_text
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples, well_formed
from cachefuse.data.readers.folder import links_out, note_links
from cachefuse.data.readers.json_file import read_objects
from cachefuse.errors import DataError
from cachefuse.files import JsonObject

YEARS = ("2017", "2014")  # both split the same photographs: only one year is read
SPLITS = ("train", "val")
MAX_JSON_BYTES = 200_000_000  # the largest has 92 MB
KEPT = frozenset(("images", "annotations", "id", "file_name", "image_id", "caption"))


@dataclass
class Photographs:
    """The images of all splits so far, None for a link out of the folder, and the captions of each."""

    images: list[FileImage | None] = field(default_factory=list)
    captions: list[tuple[TextOrSource, ...]] = field(default_factory=list)


class CocoCaptionsReader(Reader):
    """Reads every image of a year's annotation files, with all its captions. The id is the image's number there."""

    def missing(self, root: Path) -> list[str]:
        if any(_splits(root, year) for year in YEARS):
            return []
        needed = [name for split in SPLITS for name in (f"annotations/{_file(split, YEARS[0])}", f"{split}{YEARS[0]}/")]
        return [name for name in needed if not (root / name).exists()]

    def read(self, root: Path) -> Samples:
        samples, photographs = Samples(), Photographs()
        splits_by_year = {year: splits for year in YEARS if (splits := _splits(root, year))}
        if not splits_by_year:
            raise DataError(f"{root}: has no {' and no '.join(self.missing(root))}")
        year = max(splits_by_year, key=lambda year: len(splits_by_year[year]))  # the first of equals
        others = [other for other in splits_by_year if other != year]
        if others:
            samples.notes.append(f"takes the splits of {year}, and leaves out those of {', '.join(others)}")
        for split in SPLITS:
            if split not in splits_by_year[year]:
                missing = f"annotations/{_file(split, year)} or {split}{year}/"
                samples.notes.append(f"has no {split} split: {missing} is missing")
                continue
            _add(
                samples,
                photographs,
                split,
                root / "annotations" / _file(split, year),
                splits_by_year[year][split],
                root,
            )
        samples.modalities = {"image": Column(photographs.images), "text": Column.texts(photographs.captions)}
        return samples


def _file(split: str, year: str) -> str:
    return f"captions_{split}{year}.json"


def _splits(root: Path, year: str) -> dict[str, Path]:
    """Return the image folder of each split that has both images and annotations."""
    image_folders = {}
    for split in SPLITS:
        folders = [folder for folder in (root, root / "images") if (folder / f"{split}{year}").is_dir()]
        if folders and (root / "annotations" / _file(split, year)).is_file():
            image_folders[split] = folders[0] / f"{split}{year}"
    return image_folders


def _add(samples: Samples, photographs: Photographs, split: str, path: Path, folder: Path, root: Path) -> None:
    images, captions = _read_annotations(check_inside(path, root))
    links = links_out(folder, root)
    skipped = []
    for key, name in images:
        samples.ids.append(key)
        samples.splits.append(split)
        samples.labels.append(None)
        photographs.captions.append(tuple(captions.get(key, ())))
        photographs.images.append(None if name in links else FileImage(folder / name, root))
        if name in links:
            skipped.append(f"{folder.name}/{name}")
    note_links(samples.notes, skipped)
    known = {key for key, _ in images}
    unknown = [key for key in captions if key not in known]
    if unknown:
        n = sum(len(captions[key]) for key in unknown)
        samples.notes.append(f"dropped {n:,} captions of images that {path.name} does not list, such as {unknown[0]}")


def _read_annotations(path: Path) -> tuple[list[tuple[str, str]], dict[str, list[TextOrSource]]]:
    """Return each image's id and file name, and the captions by image. Raises DataError for other content."""
    # Most of the file is addresses and licences: they are dropped.
    images: list[tuple[str, str]] = []
    captions: dict[str, list[TextOrSource]] = {}
    for key, i, entry in read_objects(path, MAX_JSON_BYTES, "COCO", _keep, ("images", "annotations")):
        if key == "images":
            where = f"{path.name}: image {i}"
            images.append((_id(entry, "id", where), _plain_name(entry, where)))
            continue
        where = f"{path.name}: annotation {i}"
        caption = entry.get("caption")
        if not isinstance(caption, str | TooLong):
            raise DataError(f"{where} must have a caption. Got {str(caption)[:80]!r} instead")
        texts = captions.setdefault(_id(entry, "image_id", where), [])
        if isinstance(caption, TooLong):
            texts.append(caption)
        elif caption.strip():
            texts.append(checked_text(well_formed(caption.strip())))
    return images, captions


def _keep(entry: JsonObject) -> JsonObject:
    return {key: entry[key] for key in KEPT & entry.keys()}


def _id(entry: JsonObject, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise DataError(f"{where} must have a whole number as its {key}. Got {str(value)[:80]!r} instead")
    return well_formed(str(value))


def _plain_name(image: JsonObject, where: str) -> str:
    """Return an image's file name. Raises DataError for a path, which could leave the folder."""
    name = image.get("file_name")
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise DataError(f"{where} must have a file_name without folders. Got {str(name)[:80]!r} instead")
    return well_formed(name)
