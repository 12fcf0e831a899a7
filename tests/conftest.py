"""Workers that test side by side take one thread each, and the slowest tests first, so that they end together."""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("real", "slow")])


@pytest.fixture(scope="session", autouse=True)
def heed_interrupts():
    """A process started while SIGINT is ignored, as in a background job, would ignore it as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
