import shutil
import threading

import pytest

from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore


@pytest.fixture
def same_when_interrupted(store_path, toy, tools):
    """Return a check that ``run(path)``, interrupted after some batches and run again, ends with the same bytes.

    The check returns how many batches an undisturbed run makes.
    """

    def check(run, n_batches):
        undisturbed = store_path.with_name("undisturbed.zarr")
        run(undisturbed)
        n_undisturbed = len(toy.batches)
        toy.batches.clear()
        toy.interrupt_after(n_batches)
        with pytest.raises(KeyboardInterrupt):
            run(store_path)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
        run(store_path)
        assert tools.files(store_path) == tools.files(undisturbed)
        return n_undisturbed

    return check


@pytest.fixture
def store(shapes, store_path, toy, made_once):
    """A small store with two views of each modality, of two blocks each; a test may damage it."""
    options = {"views": ("pooled", "tokens"), "device": "cpu", "batch_size": 8}
    made = made_once("small.zarr", lambda path: extract(shapes, ["toy"], path, **options))
    return FeatureStore(shutil.copytree(made, store_path))
