import os
from dataclasses import replace

import pytest

from cachefuse.limits import limited, limits

DESCRIPTORS = "/proc/self/fd"


@pytest.fixture
def move_out(tmp_path):
    """Move a file or folder out of the data folder, and leave a link to it in its place."""

    def move(path):
        path.symlink_to(path.rename(tmp_path / "outside"))

    return move


@pytest.fixture
def no_links_out():
    """Refuse links that lead out of the data folder, as --untrusted does."""
    with limited(replace(limits(), outside_links=False)):
        yield


@pytest.fixture
def n_open():
    """Return how many times this process has a file open, what it was before it was replaced included."""
    if not os.path.isdir(DESCRIPTORS):
        pytest.skip("no /proc here")

    def count(path):
        links = (f"{DESCRIPTORS}/{number}" for number in os.listdir(DESCRIPTORS))
        return sum(os.readlink(link).startswith(str(path)) for link in links if os.path.lexists(link))

    return count
