from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cachefuse.alignment import METHODS, search
from cachefuse.alignment.data import PairData, SideRows
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.open_store import open_store
from cachefuse.registry import lookup
from cachefuse.store.writer import ViewWriter
from fixtures.columns import columns


@pytest.fixture
def one_thread():
    """Models this small take longer with several threads, many times so where the machine is busy."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class InMemory:
    """Rows (N, W) as a store gives them, in order a block at a time."""

    def __init__(self, x, block=100):
        self.x, self.shape, self.block_rows = torch.as_tensor(x), tuple(np.shape(x)), block
        self.dtype = self.x.dtype

    def __len__(self):
        return len(self.x)

    def in_order(self, size):
        for start in range(0, len(self.x), self.block_rows):
            stop = min(start + self.block_rows, len(self.x))
            for first in range(start, stop, size):
                yield first, self.x[first : min(first + size, stop)]

    def index_select(self, dim, index):
        return self.x.index_select(dim, index)


@pytest.fixture(scope="session")
def in_memory():
    return InMemory


@pytest.fixture(scope="session")
def some():
    """Return ``some(n, width)``: rows (n, width) of length 3 or so."""

    def some(n, width=8, seed=0, dtype=np.float16):
        return (np.random.default_rng(seed).normal(size=(n, width)) * 3).astype(dtype)

    return some


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows are multiplied 8 at a time, and looked through 24 at a time."""
    monkeypatch.setattr(search, "PIECE", 8)
    monkeypatch.setattr(search, "SPAN", 24)


def write_features(store, encoder, modality, rows, *, view="pooled", dtype="float16"):
    """Write rows (D,), or tokens (T_i, D), one an item, None for one that is absent, under a made-up encoder."""
    features = store.require_features(
        encoder, modality, {"dtype": dtype, "family": f"made up {encoder}"}, encoder, {view: dtype}
    )
    with ViewWriter(features, view, ragged=view == "tokens", dtype=dtype) as writer:
        writer.add(np.arange(len(rows)), list(rows))
    return features


@pytest.fixture
def make_store(tmp_path):
    """Return ``make(splits, images=..., texts=...)``, which makes a store with features for images and texts.

    ``images`` and ``texts`` are {encoder: rows}: N images (D,) or None, and for texts N arrays (n_i, D) of n_i texts
    each. ``words`` are the texts themselves, made up where they are not given.
    """

    def make(
        splits, *, images=None, texts=None, words=None, targets=None, about='task = "retrieval"', name="made", **options
    ):
        n = len(splits)
        sources = None
        if images:
            rows = next(iter(images.values()))
            sources = [None if row is None else FileImage(Path(f"{i}.png")) for i, row in enumerate(rows)]
        if texts and words is None:
            counts = [len(rows) for rows in next(iter(texts.values()))]
            words = [tuple(f"text {i} of {row}" for i in range(count)) for row, count in enumerate(counts)]
        dataset = Dataset(
            manifest=parse_manifest(f'name = "{name}"\n{about}\nreader = {{ kind = "shapes" }}', "made.toml"),
            classes=(),
            ids=[f"row{row}" for row in range(n)],
            splits=np.array(splits),
            targets=np.full(n, -1, np.int32) if targets is None else targets,
            modalities=columns(sources, words),
            name=name,
        )
        store = open_store(tmp_path / f"{name}.zarr", dataset)
        for encoder, rows in (images or {}).items():
            write_features(store, encoder, "image", rows, **options)
        for encoder, rows in (texts or {}).items():
            if store.items("text") is None:
                rows = [own[0] if len(own) else None for own in rows]
            else:
                rows = [row for own in rows for row in own]
            write_features(store, encoder, "text", rows, **options)
        vars(store)["raw"] = dataset  # what it was made of, for those that take the raw dataset as well
        return store

    return make


@pytest.fixture
def correlated():
    """Return ``make(n)``: pairs that share a hidden vector, seen through two unrelated maps; two texts an image."""

    def make(n_train=256, n_val=64, *, hidden=6, noise=0.1, seed=0):
        rng = np.random.default_rng(seed)
        n = n_train + n_val
        z = rng.normal(size=(n, hidden))
        image = np.tanh(z @ rng.normal(size=(hidden, 12))) + noise * rng.normal(size=(n, 12))
        text = 5 + np.repeat(z, 2, 0) @ rng.normal(size=(hidden, 10)) + noise * rng.normal(size=(2 * n, 10))
        sides = (
            SideRows("image", torch.from_numpy(image).half(), np.arange(n + 1)),
            SideRows("text", torch.from_numpy(text).half(), 2 * np.arange(n + 1)),
        )
        return PairData("made", sides, np.arange(n), np.repeat(["train", "val"], [n_train, n_val]))

    return make


# The Deep Fusion Encoder: how it is built, and what it is given

SIDES = (6, 5)


def build_dfe(method, op, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return lookup(METHODS, method, "method")(SIDES, 8, operation=op, dropout=dropout)


def tokens(side, n_tokens=7, seed=0, lengths=True):
    """Return four samples' tokens (B, T, D) and a mask; with ``lengths`` they have T, T - 1, ..., at least one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, n_tokens, SIDES[side], generator=generator)
    n = torch.arange(n_tokens, n_tokens - 4, -1).clamp(min=1) if lengths else torch.full((4,), n_tokens)
    return x, torch.arange(n_tokens) < n[:, None]


def padded(x, mask, n, value):
    """Return tokens and mask with n more tokens, and ``value`` wherever a token is none."""
    x = torch.cat([x, x.new_zeros(len(x), n, x.shape[2])], 1)
    mask = torch.cat([mask, mask.new_zeros(len(x), n)], 1)
    return torch.where(mask[..., None], x, x.new_tensor(value)), mask


@pytest.fixture(scope="session")
def dfe():
    return SimpleNamespace(build=build_dfe, tokens=tokens, padded=padded)
