import numpy as np
import pytest

from cachefuse import FeatureView

KINDS = np.array(["cat", "dog", "emu"])


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(60, 6)).astype(np.float16), "text": rng.normal(size=(60, 5))}


@pytest.fixture
def view(arrays):
    return FeatureView.from_arrays(arrays)


@pytest.fixture
def labels(arrays):
    return KINDS[arrays["image"][:, :3].argmax(axis=1)]


@pytest.fixture
def indicator(arrays):
    return (arrays["image"][:, :3] + arrays["text"][:, :3] > 0).astype(int)
