"""Splits: given by the data, or computed by a stable hash of each row's id."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cachefuse.data.readers.base import Samples
from cachefuse.errors import DataError
from cachefuse.printable import listed

if TYPE_CHECKING:
    from cachefuse.data.manifest import HashSplit


USUAL = ("train", "val", "test")


def ordered_splits(names: Iterable[str]) -> list[str]:
    """Return each split name once: train, val and test first, then others by name."""
    return sorted(set(names), key=lambda name: (USUAL.index(name) if name in USUAL else len(USUAL), name))


def hash_unit(key: str) -> float:
    """Map a string to a uniform number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()) / 2**64


def apply_hash_splits(rules: "Mapping[str, HashSplit]", samples: Samples) -> list[str]:
    """Return each row's split after moving a fraction of ``rule.source`` to each new split.

    A row's split depends only on its id (or group): new rows never move others.
    """
    splits = list(samples.splits)
    groups = samples.groups or samples.ids
    keys = [group or sample for group, sample in zip(groups, samples.ids, strict=True)]
    for name, rule in rules.items():
        rows = [i for i, split in enumerate(splits) if split == rule.source]
        if not rows:
            known = listed(sorted(set(samples.splits)))
            raise DataError(f"splits.{name}: there are no rows in {rule.source!r} to take; the splits are: {known}")
        for i in rows:
            if hash_unit(f"{name}/{keys[i]}") < rule.fraction:
                splits[i] = name
    return splits
