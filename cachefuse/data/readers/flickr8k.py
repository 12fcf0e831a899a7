"""Flickr8k: photographs with five captions each, and lists of the splits (Hodosh, Young, Hockenmaier, 2013)."""

import re
from pathlib import Path

from cachefuse.data.column import Column, TextOrSource
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples
from cachefuse.data.readers.folder import links_out, note_links
from cachefuse.data.readers.lines import read_fields, read_lines
from cachefuse.errors import DataError

IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset")  # the original archive spells the second one so
CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


class Flickr8kReader(Reader):
    """Reads every image in a split list, with all its captions. The id is the file's name without extension."""

    def missing(self, root: Path) -> list[str]:
        missing = []
        if not any((root / folder).is_dir() for folder in IMAGE_FOLDERS):
            missing.append(f"{IMAGE_FOLDERS[0]}/")
        if not any((root / file).is_file() for file in CAPTION_FILES):
            missing.append(f"{CAPTION_FILES[0]} (or {CAPTION_FILES[1]})")
        return missing

    def read(self, root: Path) -> Samples:
        folder = next(root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir())
        captions = _read_captions(
            check_inside(next(root / file for file in CAPTION_FILES if (root / file).is_file()), root)
        )
        links, notes = links_out(folder, root), list[str]()
        files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".jpg" and path.name[0] != ".")
        files = [file for file in files if file not in links]
        note_links(notes, sorted(links))
        splits = _read_splits(root, notes) or dict.fromkeys(files, "train")
        kept = [file for file in files if file in splits]
        _note_dropped(notes, "images that are in no split", set(files) - splits.keys())
        _note_dropped(notes, "captioned names without an image file", captions.keys() - set(files))
        _note_dropped(notes, "names in the split lists without an image file", splits.keys() - set(files))
        return Samples(
            ids=[Path(file).stem for file in kept],
            splits=[splits[file] for file in kept],
            labels=[None] * len(kept),
            modalities={
                "image": Column([FileImage(folder / file, root) for file in kept]),
                "text": Column.texts([tuple(captions.get(file, ())) for file in kept]),
            },
            notes=notes,
        )


def _read_captions(path: Path) -> dict[str, list[TextOrSource]]:
    """Return each file name's captions, from `name,caption` with a header, or from `name#number<TAB>caption`."""
    tabs = path.name != CAPTION_FILES[0]
    separator = "\t" if tabs else ","
    captions: dict[str, list[TextOrSource]] = {}
    for number, fields in read_fields(path, separator, 1, "replace"):
        name, caption = fields if len(fields) == 2 else (fields[0], None)
        if caption is None or not isinstance(name, str):
            expected = "name#number<TAB>caption" if tabs else "name,caption"
            raise DataError(f"{path.name} line {number}: expected {expected}. Got {str(name)[:80]!r} instead")
        if number == 1 and name.lower() == "image" and str(caption).lower() == "caption":
            continue
        name = re.sub(r"#\d+$", "", name.strip()) if tabs else name.strip()
        if isinstance(caption, str):
            caption = caption.strip() if tabs else _unquote(caption.strip())
        texts = captions.setdefault(name, [])
        if caption:
            texts.append(caption)
    return captions


def _unquote(caption: str) -> str:
    # Quotes around the whole caption are csv quoting; all others are part of the sentence.
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', caption)
    return quoted[1].replace('""', '"').strip() if quoted else caption


def _read_splits(root: Path, notes: list[str]) -> dict[str, str]:
    """Return the split of each listed file name. If lists are missing, this adds a note."""
    splits: dict[str, str] = {}
    absent = []
    for split, file in SPLIT_FILES.items():
        path = next((p for p in (root / file, root / "Flickr8k_text" / file) if p.is_file()), None)
        if path is None:
            absent.append(file)
            continue
        for number, line in read_lines(check_inside(path, root)):
            name = line.strip()
            if splits.setdefault(name, split) != split:
                raise DataError(f"{file} line {number}: {name} is in the {splits[name]} split too")
    if absent:
        rest = "" if splits else "; all rows are in the train split"
        notes.append(f"split lists are missing: {', '.join(absent)}{rest}")
    return splits


def _note_dropped(notes: list[str], reason: str, names: set[str]) -> None:
    if names:
        notes.append(f"dropped {len(names):,} {reason}, such as {min(names)}")
