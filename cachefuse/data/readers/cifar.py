"""CIFAR-10 and CIFAR-100: images of 32 x 32 pixels, from the binary files or from folders (Krizhevsky, 2009)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from cachefuse.data.column import Column
from cachefuse.data.digests import hash_parts
from cachefuse.data.images import MAX_BYTES, file_fingerprint, read_file
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples
from cachefuse.data.readers.folder import FolderReader
from cachefuse.data.readers.lines import read_lines
from cachefuse.errors import BadSampleError, DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # bytes of an image: its red plane, then green, then blue
ROWS_AT_ONCE = 1024
SPLITS = ("train", "test")


class Layout(NamedTuple):
    """The files of one variant, by split, and the label bytes before each image."""

    folder: str
    archive: str
    files: dict[str, tuple[str, ...]]
    label_sizes: tuple[int, ...]  # classes per label byte; the last byte is the target
    names: str
    pickles: tuple[str, ...]  # files of the python version

    @property
    def all_files(self) -> list[str]:
        return [file for split in SPLITS for file in self.files[split]]

    def binary_folder(self, root: Path) -> Path | None:
        """Return the folder with most of the files, or None without any."""
        counts = {f: sum((f / file).is_file() for file in self.all_files) for f in (root, root / self.folder)}
        best = max(counts, key=lambda folder: counts[folder])
        return best if counts[best] else None


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        (10,),
        "batches.meta.txt",
        ("data_batch_1", "test_batch", "batches.meta", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": Layout(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        {"train": ("train.bin",), "test": ("test.bin",)},
        (20, 100),
        "fine_label_names.txt",
        ("train", "test", "meta", "cifar-100-python", "cifar-100-python.tar.gz"),
    ),
}
CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""",
}


@dataclass(frozen=True, slots=True)
class CifarImage:
    """One row of a binary file. Only its own bytes are read; ``start`` is the position of its first pixel."""

    path: Path
    row: int
    start: int

    @property
    def name(self) -> str:
        return f"{self.path}[{self.row}]"

    def load(self) -> Image.Image:
        planes = np.frombuffer(self._read(), np.uint8).reshape(3, SIDE, SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def fingerprint(self) -> str:
        return f"{self.path.name}:{file_fingerprint(self.path)}:{self.row}"

    def digest(self) -> str:
        try:
            return hash_parts("cifar", self._read())
        except BadSampleError as error:
            return hash_parts("unusable", str(error))

    def _read(self) -> bytes:
        data = read_file(str(self.path), self.start, PIXELS)
        if len(data) < PIXELS:
            raise BadSampleError(f"the file ends before the end of row {self.row}")
        return data


class CifarReader(Reader):
    """Reads the binary files, or else the image folders `train/<class>/` and `test/<class>/`.

    Ids of the binary version are "<split>-<number of the row>", in the order of the files.
    """

    variant: Literal["cifar10", "cifar100"]

    def missing(self, root: Path) -> list[str]:
        layout = LAYOUTS[self.variant]
        folder = layout.binary_folder(root)
        if folder is not None:
            files = [folder / file for file in layout.all_files]
            return [file.relative_to(root).as_posix() for file in files if not file.is_file()]
        if _class_folders(root):
            return []
        pickles = [name for name in layout.pickles if (root / name).exists()]
        alternative = "or train/<class>/ and test/<class>/"
        if pickles:
            alternative = (
                f"{pickles[0]} is a pickle of the python version, which can run any code when it is read; "
                f"get the binary version, {layout.archive}"
            )
        return [f"{layout.all_files[0]} ({alternative})"]

    def read(self, root: Path) -> Samples:
        layout = LAYOUTS[self.variant]
        folder = layout.binary_folder(root)
        if folder is None:
            splits = _class_folders(root)
            if not splits:
                raise DataError(f"{root}: has no {self.missing(root)[0]}")
            return FolderReader(splits={split: split for split in splits}).read(root)
        images: list[CifarImage] = []
        classes = self._classes(folder / layout.names, root)
        samples = Samples(modalities={"image": Column(images)}, classes=classes)
        for split in SPLITS:
            paths = [check_inside(folder / file, root) for file in layout.files[split]]
            self._add(samples, images, classes, split, paths)
        return samples

    def _classes(self, path: Path, root: Path) -> tuple[str, ...]:
        names = CLASSES[self.variant].split()
        if not path.is_file():
            return tuple(names)
        listed = [line.strip() for _, line in read_lines(check_inside(path, root))]
        if len(listed) != len(names) or len(set(listed)) != len(names):
            raise DataError(
                f"{path.name}: must name {len(names)} classes, one per line. Got {len(set(listed))} instead"
            )
        return tuple(listed)

    def _add(
        self, samples: Samples, images: list[CifarImage], classes: tuple[str, ...], split: str, paths: list[Path]
    ) -> None:
        sizes = LAYOUTS[self.variant].label_sizes
        number = 0
        for path in paths:
            for row, label in enumerate(_read_labels(path, sizes)):
                number += 1
                samples.ids.append(f"{split}-{number:05d}")
                samples.splits.append(split)
                samples.labels.append((classes[label],))
                images.append(CifarImage(path, row, row * (len(sizes) + PIXELS) + len(sizes)))


def _read_labels(path: Path, sizes: tuple[int, ...]) -> Iterator[int]:
    """Yield each row's last label. Raises DataError if the file does not consist of such rows."""
    row_bytes, n_bytes = len(sizes) + PIXELS, path.stat().st_size
    if not 0 < n_bytes <= MAX_BYTES or n_bytes % row_bytes:
        expected = f"rows of {row_bytes:,} bytes, at most {MAX_BYTES:,} in total"
        raise DataError(f"{path.name}: must have {expected}. Got {n_bytes:,} bytes instead")
    row = 0
    with path.open("rb") as file:
        while data := file.read(ROWS_AT_ONCE * row_bytes):
            labels = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)[:, : len(sizes)]
            for values in labels.tolist():
                for value, size in zip(values, sizes, strict=True):
                    if value >= size:
                        raise DataError(f"{path.name} row {row}: the label must be from 0 to {size - 1}. Got {value}")
                yield values[-1]
                row += 1


def _class_folders(root: Path) -> list[str]:
    return [split for split in SPLITS if (root / split).is_dir()]
