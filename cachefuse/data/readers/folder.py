"""A folder of images with one sub-folder per class."""

import os
from collections.abc import Iterator
from pathlib import Path

from cachefuse.data.column import Column
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside, is_allowed, is_inside
from cachefuse.data.readers.base import InsidePath, Reader, Samples
from cachefuse.data.readers.lines import TEXT_ERRORS
from cachefuse.errors import DataError

EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


class FolderReader(Reader):
    """Reads `<split>/<class>/...` for each of ``splits``, or `<class>/...` in the root, all in the train split.

    The class is the first folder below the split's. Images directly in the split's folder are unlabelled.
    The id is the path below the root, with forward slashes.
    """

    splits: dict[str, InsidePath] | None = None  # split -> sub-folder

    def missing(self, root: Path) -> list[str]:
        return [f"{folder}/" for folder in (self.splits or {"train": ""}).values() if not (root / folder).is_dir()]

    def read(self, root: Path) -> Samples:
        images: list[FileImage] = []
        samples = Samples(modalities={"image": Column(images)})
        links: list[str] = []
        for split, folder in (self.splits or {"train": "."}).items():
            paths = sorted(image_paths(root, folder, links))
            if not paths:
                raise DataError(f"{root / folder}: has no images ({', '.join(sorted(EXTENSIONS))})")
            for path in paths:
                parents = path.relative_to(folder).parts[:-1]
                samples.ids.append(_as_text(path.as_posix()))
                samples.splits.append(split)
                samples.labels.append(tuple(map(_as_text, parents[:1])) or None)
                images.append(FileImage(root / path, root))
        note_links(samples.notes, links)
        return samples


def _as_text(name: str) -> str:
    """Return a file name that may not be UTF-8 as text, read as texts are."""
    return os.fsencode(name).decode("utf-8", TEXT_ERRORS)


def links_out(folder: Path, root: Path) -> set[str]:
    """Return the names of links in a folder that leave the root and may not. Raises DataError if the folder is one."""
    with os.scandir(check_inside(folder, root)) as entries:
        return {entry.name for entry in entries if entry.is_symlink() and not is_allowed(entry.path, root)}


def note_links(notes: list[str], links: list[str]) -> None:
    """Add a note on links that were not followed, if any."""
    if links:
        notes.append(f"skipped {len(links):,} links that leave the data folder, such as {min(links)}")


def image_paths(root: Path, folder: str, links: list[str]) -> Iterator[Path]:
    """Yield the images at any depth below a folder, as paths relative to the root.

    Links that leave the root and may not are added to ``links``. Raises DataError if the folder itself is such a link.
    Linked folders inside the root are left out, as they are walked anyway; each one outside of it is walked once.
    """
    walked: set[str] = set()
    waiting = [str(check_inside(root / folder, root))]
    for top in waiting:
        for parent, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in (name for name in folders if os.path.islink(os.path.join(parent, name))):
                path = Path(parent, name)
                if is_inside(path, root):
                    continue
                if not is_allowed(path, root):
                    links.append(str(path.relative_to(root)))
                elif (real := os.path.realpath(path)) not in walked:
                    walked.add(real)
                    waiting.append(str(path))
            for name in files:
                path = Path(parent, name)
                if name.startswith(".") or path.suffix.lower() not in EXTENSIONS:
                    continue
                if path.is_symlink() and not is_allowed(path, root):
                    links.append(str(path.relative_to(root)))
                    continue
                yield path.relative_to(root)
