import pytest


@pytest.fixture
def folder(tmp_path):
    """Where a sweep keeps its trials."""
    return tmp_path / "sweeps" / "one"
