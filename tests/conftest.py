"""Workers that test side by side take one thread each, and the slowest tests first, so that they end together.

xdist gives each worker a run of tests to begin with, so the slow ones are dealt out to the beginnings of those.
"""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("real", "slow")])
    n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    items[:] = [item for worker in range(n_workers) for item in items[worker::n_workers]]


@pytest.fixture(scope="session", autouse=True)
def heed_interrupts():
    """A process started while SIGINT is ignored, as in a background job, would ignore it as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
