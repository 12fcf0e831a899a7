import pytest


@pytest.fixture
def move_out(tmp_path):
    """Move a file or folder out of the data folder, and leave a link to it in its place."""

    def move(path):
        path.symlink_to(path.rename(tmp_path / "outside"))

    return move
