"""Folders of encoders that want to run code: objects that leave a marker, and cheap copies of models."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch


class Marker:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path_factory):
    """The path of the marker, and the bytes of a pickle and of a torch.save that write it."""
    path = tmp_path_factory.mktemp("marker") / "written"
    plain = pickle.dumps({"weight": Marker(path)})
    saved = path.with_name("saved")
    torch.save({"weight": Marker(path)}, saved)
    pickle.loads(plain)
    assert path.exists()  # the test is able to fail
    path.unlink()
    yield path, plain, saved.read_bytes()
    assert not path.exists()


@pytest.fixture(scope="session")
def makers(makers, tmp_path_factory):
    """The makers of encoders, each of which builds its model once and then copies it."""
    made: dict[str, tuple[Path, str]] = {}

    def copy(family: str, folder: Path) -> str:
        if family not in made:
            torch.manual_seed(0)
            first = tmp_path_factory.mktemp(family)
            made[family] = first, makers[family](first)
        first, spec = made[family]
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return spec.replace(str(first), str(folder))

    return {family: partial(copy, family) for family in makers}
