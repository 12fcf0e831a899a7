"""Cached features as pairs: two sides, the samples with both, and the items (captions) of each sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cachefuse.alignment.model import Aligner, Side
from cachefuse.data.manifest import PAIRS
from cachefuse.errors import ConfigError, DataError
from cachefuse.nn.scaling import Standardize
from cachefuse.printable import listed
from cachefuse.store.features import Features
from cachefuse.store.rows import RaggedRows, Rows
from cachefuse.store.store import FeatureStore
from cachefuse.store.tokens import padded
from cachefuse.threads import idle_threads
from cachefuse.training.selection import one_view, select_features

FIT_ROWS, FIT_TOKENS = 1 << 15, 1 << 17  # approximate maximum to fit a side's mean and deviation
PIECE_FLOATS = 1 << 24  # maximum number of feature values embedded at a time
PIECE_ROWS = 4096


@dataclass(frozen=True)
class SideRows:
    """One side's stored rows; the items of sample i are rows offsets[i] to offsets[i + 1], excluded."""

    modality: str
    rows: Rows
    offsets: np.ndarray

    @property
    def width(self) -> int:
        return self.rows.shape[-1]

    @property
    def n_tokens(self) -> float:
        """The mean number of tokens of a row; 1 for pooled features."""
        if isinstance(self.rows, RaggedRows):
            return max(1.0, float(self.rows.lengths.mean()))
        return float(self.rows.shape[1] if len(self.rows.shape) == 3 else 1)

    @property
    def piece(self) -> int:
        """How many rows to read at a time, so that they take little memory."""
        most = self.rows.lengths.max(initial=1) if isinstance(self.rows, RaggedRows) else self.n_tokens
        return max(1, min(PIECE_ROWS, PIECE_FLOATS // int(most * self.width)))

    def read(self, index: Tensor, device: torch.device | str = "cpu") -> Side:
        """Return rows (B,) as tokens (B, T, D) and their mask (B, T); pooled features are one token."""
        x, mask = as_tokens(self.rows, index)
        return x.to(device), mask.to(device)

    def items(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all item rows (n,) of some samples, in order, and each one's index in ``samples`` (n,)."""
        first, counts = self.offsets[samples], self.offsets[samples + 1] - self.offsets[samples]
        owners = np.repeat(np.arange(len(samples)), counts)
        return first[owners] + np.arange(len(owners)) - (counts.cumsum() - counts)[owners], owners


def as_tokens(rows: Rows | Tensor | Sequence[Tensor], index: Tensor) -> Side:
    """Return rows (B,), stored or in memory, as tokens (B, T, D) with their mask (B, T); pooled rows are one token.

    A row without tokens gets one token of zeros, so that attention has a token to attend to.
    """
    if isinstance(rows, Rows | Tensor) and len(rows.shape) == 2 and not isinstance(rows, RaggedRows):
        return rows.index_select(0, index).unsqueeze(1), torch.ones(len(index), 1, dtype=torch.bool)
    return with_a_token(*padded(rows, index))


def with_a_token(x: Tensor, mask: Tensor) -> Side:
    """Return tokens (B, T, D) and their mask (B, T), with a token of zeros for each row without tokens."""
    if not x.shape[1]:
        x, mask = x.new_zeros(len(x), 1, x.shape[2]), mask.new_zeros(len(x), 1)
    mask[:, 0] = True
    return x, mask


@dataclass(frozen=True)
class PairData:
    """Two sides over the same N samples: ``samples`` (n,) have both sides, ``splits`` (N,) are of all samples."""

    name: str
    sides: tuple[SideRows, SideRows]
    samples: np.ndarray
    splits: np.ndarray

    @property
    def same_texts(self) -> bool:
        """Whether both sides encode the same texts."""
        return self.sides[0].modality == self.sides[1].modality

    def of(self, split: str) -> np.ndarray:
        """Return the usable samples of a split, (n,)."""
        inside: np.ndarray = self.samples[self.splits[self.samples] == split]
        return inside

    def draw(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw one item row of each sample (B,) at random for each side.

        If both sides encode the same texts, a sample with several texts gives the sides different ones: training then
        teaches that the two mean the same.
        """
        drawn = []
        for side in self.sides:
            offsets = torch.from_numpy(side.offsets)
            count = offsets[samples + 1] - offsets[samples]
            place = (torch.rand(len(samples), generator=generator, dtype=torch.float64) * count).long()
            drawn.append((offsets[samples], count, place))
        (first, count, a), (_, _, b) = drawn
        if self.same_texts:
            step = (torch.rand(len(samples), generator=generator, dtype=torch.float64) * (count - 1)).long() + 1
            b = torch.where(count > 1, (a + step) % count.clamp(min=1), a)
        return first + a, drawn[1][0] + b


def open_pairs(
    store: FeatureStore, encoders: Sequence[str] = (), view: str = "pooled"
) -> tuple[PairData, tuple[Features, Features]]:
    """Open the two sides to align: the features of ``encoders``, or the store's if it has exactly two.

    Raises ConfigError if there are not two, CacheError if rows are missing, DataError if no sample has both.
    """
    if store.manifest.task in PAIRS:
        raise ConfigError(
            f"the pairs of {store.dataset} cannot be aligned: some differ in meaning; use them to evaluate encoders: "
            f"cachefuse similarity --dataset {store.dataset}"
        )
    chosen = [features for group in select_features(store, encoders, one_view(view)).values() for features in group]
    if len(chosen) > 2 and len(encoders) == 2:  # an encoder of both, such as CLIP, and one of images or of texts
        across = [pair for pair in combinations(chosen, 2) if pair[0].encoder != pair[1].encoder]
        across = [pair for pair in across if pair[0].modality != pair[1].modality]
        chosen = list(across[0]) if len(across) == 1 else chosen
    if len(chosen) != 2 or [features.modality for features in chosen] == ["image", "image"]:
        names = listed(f"{features.encoder} ({features.modality})" for features in chosen)
        raise ConfigError(
            f"align needs two encoders. Got {len(chosen)} instead: {names}; name two with --encoder: one of images "
            f"and one of texts, or two of the same texts"
        )
    pair = cast(tuple[Features, Features], tuple(chosen))
    return pair_data(store, pair, view), pair


def pair_data(store: FeatureStore, pair: tuple[Features, Features], view: str) -> PairData:
    """Return the pairs of two sides' features. Raises CacheError for missing rows, DataError if no sample has both."""
    sides, present = [], np.ones(len(store), bool)
    for features in pair:
        offsets = store.items(features.modality)
        offsets = np.arange(len(store) + 1) if offsets is None else offsets
        sides.append(SideRows(features.modality, features.rows(view), offsets))
        present &= store.present(features.modality) & (np.diff(offsets) > 0)
    if not present.any():
        raise DataError(f"no sample of {store.dataset} has both {' and '.join(side.modality for side in sides)}")
    return PairData(store.dataset, (sides[0], sides[1]), np.flatnonzero(present), store.splits)


def fit_statistics(model: Aligner, data: PairData, samples: np.ndarray) -> None:
    """Fit each side's mean and deviation to the real tokens of some samples' items, or of an even subset of them."""
    for standardize, side in zip(model.standardize, data.sides, strict=True):
        items, _ = side.items(samples)
        most = min(FIT_ROWS, max(1, int(FIT_TOKENS / side.n_tokens)))
        spread = items[np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(np.int64)]
        blocks = []
        for index in torch.from_numpy(spread).split(side.piece):
            x, mask = side.read(index)
            blocks.append(x[mask])  # (n, D)
        cast(Standardize, standardize.cpu()).fit(torch.cat(blocks))


@torch.inference_mode()
@idle_threads()
def embed(model: Aligner, side: int, rows: SideRows, index: np.ndarray) -> Tensor:
    """Return the embeddings (n, W) of stored rows (n,), float32, on the CPU."""
    model.eval()
    device = model.log_temperature.device
    blocks = torch.from_numpy(index).split(rows.piece)
    return torch.cat([model(side, rows.read(block, device)).cpu() for block in blocks])


def n_batches(n_samples: int, size: int) -> int:
    """Return how many batches ``in_batches`` yields."""
    return n_samples // size + (n_samples % size > 1)


def in_batches(samples: np.ndarray, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the samples (n,) in a random order, ``size`` at a time.

    A last batch of one sample is left out, since it has no negatives.
    """
    order = torch.from_numpy(samples)[torch.randperm(len(samples), generator=generator)]
    yield from (batch for batch in order.split(size) if len(batch) > 1)
