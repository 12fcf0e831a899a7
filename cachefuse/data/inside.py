"""Links in a data folder: whether they may lead out of it. This is the one rule for all files of raw data.

A user's own links are followed. With ``Limits.outside_links`` off, for data of strangers, they are not.
"""

import os
from pathlib import Path

from cachefuse.errors import DataError
from cachefuse.limits import limits


def is_allowed(path: Path | str, root: Path | str) -> bool:
    """Whether a path may be read: it lies below the root after following all links, or links may lead out of it."""
    return limits().outside_links or is_inside(path, root)


def is_inside(path: Path | str, root: Path | str) -> bool:
    """Whether a path lies below the root after following all links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def check_inside(path: Path, root: Path) -> Path:
    """Return the path. Raises DataError if it leaves the root through a link, and may not."""
    if not is_allowed(path, root):
        raise DataError(f"{path}: a link leads out of the data folder {root}, which --untrusted refuses")
    return path
