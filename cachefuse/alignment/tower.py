"""An alignment as an encoder: ``aligned:<run>`` encodes with the run's encoders, then maps to the common space."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.alignment.data import as_tokens
from cachefuse.alignment.run import Alignment
from cachefuse.data.dataset import dataset_options
from cachefuse.device import resolve_device
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import ALIGNED, DerivedTower, EncoderSpec, Tower
from cachefuse.encoders.base import Features as Encoded
from cachefuse.encoders.frozen import to_numpy, weights_digest
from cachefuse.errors import EncoderError, RunError
from cachefuse.extraction.derive import base_rows, derive
from cachefuse.store.features import Features
from cachefuse.store.format import DTYPES, provenance_key
from cachefuse.store.lock import only_writer
from cachefuse.store.store import FeatureStore

SIDES = ("", "1", "2")  # valid values after the @ of a spec
_under_way: ContextVar[tuple[str, ...]] = ContextVar("alignments that are being opened", default=())


class AlignedTower(DerivedTower):
    """One side of an alignment: unit vectors (B, W). ``base`` encodes raw samples; without it only features work.

    The base's output is rounded to the store's dtype, so that raw samples and stored features give the same vectors.
    Tokens stored as int8 are the exception: their vectors are only close.
    """

    def __init__(self, run: Alignment, side: int, device: str = "cpu", base: Tower | None = None):
        about = run.sides[side]
        self.modality, self.width = about.modality, run.config.width
        self.base_encoder, self.base_key, self.base_view = about.encoder, about.key, run.config.views
        self._run, self._side, self._about, self.base = run, side, about, base
        self.by_length = base is not None and base.by_length
        self._model = run.model.eval().to(device)
        self._device = torch.device(device)

    @property
    def provenance(self) -> Mapping[str, str]:
        return {
            "family": ALIGNED,
            "base": self.base_key,
            "view": self.base_view,
            "side": str(self._side),
            "method": self._run.config.label,
            "weights": weights_digest(self._model),
        }

    def prepare(self, sample: Any) -> Any:
        return self._encoder.prepare(sample)

    def length(self, prepared: Any) -> int:
        return self._encoder.length(prepared)

    def encode(self, batch: Sequence[Any], views: Collection[str]) -> Encoded:
        rows = self._encoder.encode(batch, (self.base_view,))[self.base_view]
        dtype = DTYPES[self._about.dtype]
        rounded = [row.astype(dtype) for row in rows] if isinstance(rows, list) else rows.astype(dtype)
        return {"pooled": self.transform(rounded)}

    @torch.inference_mode()
    def transform(self, rows: np.ndarray | list[np.ndarray]) -> np.ndarray:
        x, mask = _as_tokens(rows)
        return to_numpy(self._model(self._side, (x.to(self._device), mask.to(self._device))))

    @property
    def _encoder(self) -> Tower:
        if self.base is None:
            raise RuntimeError("this tower was opened for stored features only")
        return self.base


def _as_tokens(rows: np.ndarray | list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return rows (B, D), (B, T, D), or a list of (T_i, D), as tokens (B, T, D) with a mask (B, T)."""
    in_memory: Any = (
        [torch.from_numpy(np.ascontiguousarray(row)) for row in rows]
        if isinstance(rows, list)
        else torch.from_numpy(np.ascontiguousarray(rows))
    )
    return as_tokens(in_memory, torch.arange(len(rows)))


def open_aligned(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``aligned:./workspace/runs/NAME`` with the encoders that it reads.

    ``@1`` and ``@2`` select the side of an alignment of two text encoders; the default is the first. Raises
    EncoderError if there is no such run, or if an encoder differs from the one that the run was made with.
    """
    run, sides = open_spec(spec)
    towers: dict[str, Tower] = {}
    for side in sides:
        about = run.sides[side]
        with _within(spec):
            base = open_encoder(about.source, device, whole=True).get(about.modality)
        if base is None or provenance_key({**base.provenance, "dtype": about.dtype}) != about.key:
            raise EncoderError(
                f"cannot open {spec}: {about.source} has other weights or preprocessing than when {run.name} was made; "
                f"restore them, or align again"
            )
        towers[about.modality] = AlignedTower(run, side, device, base)
    return towers


@contextmanager
def _within(spec: EncoderSpec) -> Iterator[None]:
    """Raise EncoderError for an alignment that reads itself, which only happens if its file was edited."""
    outer, folder = _under_way.get(), str(Path(spec.model).expanduser().resolve())
    if folder in outer:
        raise EncoderError(f"cannot open {spec}: it reads itself; its run.json was edited")
    token = _under_way.set((*outer, folder))
    try:
        yield
    finally:
        _under_way.reset(token)


def open_spec(spec: EncoderSpec) -> tuple[Alignment, tuple[int, ...]]:
    """Return the alignment of a spec, and its selected sides. Raises EncoderError if there is none."""
    folder = Path(spec.model).expanduser()
    if not spec.model or not (folder / "run.json").is_file():
        raise EncoderError(
            f"cannot open {spec}: there is no run in {folder}; give its folder: aligned:./workspace/runs/NAME"
        )
    try:
        run = Alignment.load(folder)
    except RunError as error:
        raise EncoderError(f"cannot open {spec}: {error}") from error
    if spec.weights not in SIDES or (spec.weights and not run.same_texts):
        raise EncoderError(f"cannot open {spec}: after @ use 1 or 2, and only if both encoders are of the same texts")
    if run.same_texts:
        return run, (int(spec.weights or 1) - 1,)
    return run, (0, 1)


def side_spec(run: Alignment, side: int) -> EncoderSpec:
    """Return the spec of one side of a saved alignment. Raises RunError if it is not saved."""
    if run.path is None:
        raise RunError(f"alignment {run.name} is not saved; save it first: its features are named by its folder")
    return EncoderSpec(ALIGNED, str(run.path), str(side + 1) if run.same_texts and side else "").absolute()


def aligned_features(
    run: Alignment,
    side: int,
    store: FeatureStore,
    *,
    device: str = "auto",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Return one side's aligned features of a store; missing rows are computed from the stored base features.

    Raises RunError if the store lacks the base features.
    """
    spec, about = side_spec(run, side), run.sides[side]
    tower = AlignedTower(run, side, resolve_device(device))
    features = store.open_features(spec.short, about.modality)
    dtype = "float16" if features is None else features.provenance["dtype"]
    dtypes, provenance = {"pooled": dtype}, {**tower.provenance, "dtype": dtype}
    if features is not None and not len(features.missing_rows("pooled")):
        store.check_same(features, provenance, dtypes)
        return features
    rows = base_rows(store, tower)
    if rows is None:
        raise RunError(
            f"run {run.name} reads {about.encoder} ({about.modality}, {run.config.views}), which {store.path} lacks; "
            f"run cachefuse extract {dataset_options(store.dataset)} --encoder {about.source} "
            f"--views {run.config.views}"
        )
    with only_writer(store.path):
        features = store.require_features(spec.short, about.modality, provenance, str(spec), dtypes)
        derive(features, tower, rows, dtypes, on_rows)
    return features
