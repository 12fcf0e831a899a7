"""The process that commands are forks of, and the workspace that is attacked; each is made once."""

from pathlib import Path

import pytest

from adversarial import workspaces
from adversarial.forks import Forks


@pytest.fixture(scope="session")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def data_forks():
    """The same with what reads raw data alone, which starts sooner."""
    with Forks(["cachefuse.data.dataset", "cachefuse.data.images", "pyarrow.parquet", "h5py"]) as forks:
        yield forks


@pytest.fixture(scope="session")
def top(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("attack")


@pytest.fixture(scope="session")
def whole(top, forks) -> Path:
    """The folder of a whole workspace."""
    return workspaces.make(top / "whole", forks, states=top / "states")


@pytest.fixture(scope="session")
def states(top, whole) -> Path:
    """What was there before each step, in a folder of the step's name."""
    return top / "states"


@pytest.fixture(scope="session")
def older(top, forks) -> Path:
    """A workspace of the same names from other data."""
    return workspaces.make(top / "older", forks, seed=1)
