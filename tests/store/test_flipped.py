"""Any bit of any file of a store changes, and no reader takes something wrong for right."""

import os
import random
import shutil

import numpy as np
import pytest

from cachefuse.errors import CacheError, CachefuseError
from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore

pytestmark = pytest.mark.slow

VIEWS = [("image", "pooled"), ("image", "tokens"), ("text", "pooled"), ("text", "tokens"), ("text", "ids")]
FLIPS = int(os.environ.get("CACHEFUSE_FLIPS", "80"))


@pytest.fixture(params=["float16", "int8"])
def stored(request, shapes, store_path, toy):
    """A store, and a call that extracts it again."""

    def make():
        return extract(
            shapes,
            ["toy"],
            store_path,
            views=("pooled", "tokens", "ids"),
            device="cpu",
            dtype=request.param,
            batch_size=16,
        )

    make()
    return store_path, make


def read_all(store_path):
    """Whatever can be read of a store, in a form that can be compared."""
    store = FeatureStore(store_path)
    found = [len(store), store.ids.tolist(), store.splits.tolist(), store.targets.tobytes(), store.classes]
    found += [store.dataset, store.manifest, store.modalities]
    index = np.random.default_rng(0).integers(0, 80, 40)
    for modality in ("image", "text"):
        found.append(store.present(modality).tolist())
        found.append(store.items(modality))
    for modality, view in VIEWS:
        features = store.open_features("toy", modality)
        if features is None:
            raise CacheError("the features are gone")
        for rows in (features.read(view), features.read(view, index)):
            found += [row.tobytes() for row in rows]
    return found


def flip(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return at


def test_a_changed_bit_is_never_read_as_right(stored):
    store_path, _ = stored
    expected, data = read_all(store_path), store_path.with_name("copy")
    files = sorted(path.relative_to(store_path) for path in store_path.rglob("*") if path.is_file())
    shutil.copytree(store_path, data)
    detected = 0
    for seed in range(FLIPS):
        rng = random.Random(seed)
        file = files[seed % len(files)]
        at = flip(store_path / file, rng)
        try:
            assert read_all(store_path) == expected, f"{file}, byte {at}, seed {seed}"
        except CacheError:
            detected += 1
        except Exception as error:
            raise AssertionError(f"{file}, byte {at}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.copy2(data / file, store_path / file)
    assert detected > FLIPS // 4


def test_after_a_changed_bit_extract_mends_the_store_or_says_what_to_do(stored):
    store_path, make = stored
    expected, data = read_all(store_path), store_path.with_name("copy")
    files = sorted(path.relative_to(store_path) for path in store_path.rglob("*") if path.is_file())
    shutil.copytree(store_path, data)
    mended = 0
    for seed in range(FLIPS // 4):
        rng = random.Random(1000 + seed)
        file = files[(4 * seed + rng.randrange(4)) % len(files)]
        at = flip(store_path / file, rng)
        try:
            make()
            mended += read_all(store_path) == expected
        except CachefuseError as error:
            if not any(word in str(error) for word in ("delete", "verify --repair", "not a feature store of this")):
                raise AssertionError(f"{file}, byte {at}, seed {seed} leaves no way on: {error}") from error
        except Exception as error:
            raise AssertionError(f"{file}, byte {at}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(store_path)
        shutil.copytree(data, store_path)
    assert mended > FLIPS // 12
