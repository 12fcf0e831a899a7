"""Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels, their names from WordNet (Stanford CS231n)."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cachefuse.data.column import Column
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples
from cachefuse.data.readers.folder import image_paths, note_links
from cachefuse.data.readers.lines import read_lines
from cachefuse.errors import DataError

FOLDER = "tiny-imagenet-200"
NEEDED_FOLDERS = ("train", "val/images")
ANNOTATIONS = "val/val_annotations.txt"
WORDS = "words.txt"


class TinyImageNetReader(Reader):
    """Reads the unpacked folders, in the root or in `tiny-imagenet-200/`. Ids are the paths below that folder.

    The class is the first name of the image's WordNet id. If two classes have one name, the id follows it.
    """

    def missing(self, root: Path) -> list[str]:
        base = _base(root)
        missing = [f"{folder}/" for folder in NEEDED_FOLDERS if not (base / folder).is_dir()]
        return missing + ([] if (base / ANNOTATIONS).is_file() else [ANNOTATIONS])

    def read(self, root: Path) -> Samples:
        base = check_inside(_base(root), root)
        images: list[FileImage] = []
        samples, links = Samples(modalities={"image": Column(images)}), list[str]()
        train = sorted(image_paths(base, "train", links))
        wnids = {path: path.parts[1] for path in train if len(path.parts) > 2}
        if not wnids:
            raise DataError(f"{base / 'train'}: has no images in folders of classes")
        names = _class_names(base / WORDS, root, sorted(set(wnids.values())))
        samples.classes = tuple(names.values())
        labels = {path: names[wnid] for path, wnid in wnids.items()}
        val = sorted(image_paths(base, "val/images", links))
        labels |= _val_labels(base / ANNOTATIONS, root, names, val, samples.notes)
        test = sorted(image_paths(base, "test/images", links)) if (base / "test/images").is_dir() else []
        for split, paths in (("train", list(wnids)), ("val", val), ("test", test)):
            for path in paths:
                samples.ids.append(path.as_posix())
                samples.splits.append(split)
                samples.labels.append((labels[path],) if path in labels else None)
                images.append(FileImage(base / path, root))
        note_links(samples.notes, links)
        return samples


def _base(root: Path) -> Path:
    return root / FOLDER if not (root / "train").is_dir() and (root / FOLDER).is_dir() else root


def _class_names(path: Path, root: Path, wnids: Iterable[str]) -> dict[str, str]:
    """Return a unique name for each WordNet id: the id itself if the file has none."""
    names = {wnid: wnid for wnid in wnids}
    if path.is_file():
        for number, line in read_lines(check_inside(path, root)):
            wnid, tab, words = line.partition("\t")
            if not tab:
                raise DataError(f"{path.name} line {number}: expected wnid<TAB>names. Got {line[:80]!r} instead")
            if wnid.strip() in names:
                names[wnid.strip()] = words.partition(",")[0].strip() or wnid.strip()
    shared = Counter(names.values())
    return {wnid: f"{name} ({wnid})" if shared[name] > 1 else name for wnid, name in names.items()}


def _val_labels(path: Path, root: Path, names: dict[str, str], images: list[Path], notes: list[str]) -> dict[Path, str]:
    """Return the class of each listed image of the validation split. Raises DataError, naming the line."""
    files = {image.name: image for image in images}
    labels: dict[Path, str] = {}
    absent = []
    for number, line in read_lines(check_inside(path, root)):
        values = [value.strip() for value in line.split("\t")]
        where = f"{path.name} line {number}"
        if len(values) < 2:
            raise DataError(f"{where}: expected file<TAB>wnid<TAB>box. Got {line[:80]!r} instead")
        file, wnid = values[:2]
        if wnid not in names:
            raise DataError(f"{where}: {wnid[:80]!r} is not a class: train/ has no such folder")
        if file not in files:
            absent.append(file)
        elif labels.setdefault(files[file], names[wnid]) != names[wnid]:
            raise DataError(f"{where}: {file} is also in the class {labels[files[file]]!r}")
    if absent:
        notes.append(f"dropped {len(absent):,} names of {path.name} without an image file, such as {absent[0][:80]}")
    if len(labels) < len(images):
        n, first = len(images) - len(labels), next(image for image in images if image not in labels)
        notes.append(f"{n:,} images of val are not in {path.name} and have no label, such as {first.name}")
    return labels
