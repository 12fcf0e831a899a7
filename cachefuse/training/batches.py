"""The batches of an epoch: index tensors, slices of a copy, or rows drawn by weight."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cachefuse.feature_spec import FeatureSpec
from cachefuse.training.feature_table import LOAD_ROWS, FeatureTable

Batch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]  # features (B, D_m) and presence (B,), targets (B, C)


class Batches:
    """The batches of an epoch over rows (n,), in a new random order in each iteration; ``batch_size`` 0 means all rows.

    With ``sample_weights`` (n,), n rows are drawn with replacement, by weight. With ``modality_dropout`` each modality
    of a row is removed with that probability, as ``drop_modalities`` does.

    Features in CPU memory are copied once, in a random order. An epoch cuts the copy into slices, from a random row
    on, in a random order: gathering rows one by one takes as long as a linear head's GEMMs.
    """

    def __init__(
        self,
        table: FeatureTable,
        rows: Tensor,
        batch_size: int,
        generator: torch.Generator,
        sample_weights: Tensor | None = None,
        modality_dropout: float = 0.0,
    ) -> None:
        self.table, self.rows, self.generator, self.sample_weights = table, rows, generator, sample_weights
        self.modality_dropout = modality_dropout
        self.size = min(batch_size or len(rows), len(rows))
        self.copy: Batch | None = None
        if sample_weights is None and all(
            isinstance(x, Tensor) and x.device.type == "cpu" for x in table.features.values()
        ):
            order = rows[torch.randperm(len(rows), generator=generator)]
            if self.size < len(rows):
                order = torch.cat([order, order[: self.size]])  # for the slice that crosses the end
            self.copy = (*table.batch(order), table.targets[order].float())

    def __iter__(self) -> Iterator[Batch]:
        for features, present, targets in self._drawn() if self.copy is None else self._slices(*self.copy):
            if self.modality_dropout:
                present = drop_modalities(present, self.table.specs, self.modality_dropout, self.generator)
            yield features, present, targets

    def _drawn(self) -> Iterator[Batch]:
        for rows in self.table.batches(self._order(), self.size, self.generator):
            yield *self.table.batch(rows), self.table.targets[rows]

    def _order(self) -> Tensor:
        if self.sample_weights is not None:
            shares = self.sample_weights.cumsum(0)
            points = torch.rand(len(self.rows), generator=self.generator, dtype=shares.dtype) * shares[-1]
            drawn = torch.searchsorted(shares, points, right=True)
            return self.rows[drawn.clamp(max=len(shares) - 1).to(self.rows.device)]  # rounding may pass the end
        return self.table.order(self.rows, self.generator) if self.size < len(self.rows) else self.rows

    def _slices(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor) -> Iterator[Batch]:
        n = len(self.rows)
        begin = int(torch.randint(n, (), generator=self.generator)) if self.size < n else 0
        for i in torch.randperm(-(-n // self.size), generator=self.generator).tolist():
            start = (begin + i * self.size) % n
            rows = slice(start, start + min(self.size, n - i * self.size))
            yield {m: x[rows] for m, x in features.items()}, {m: x[rows] for m, x in present.items()}, targets[rows]


def balanced_sample_weights(targets: Tensor) -> Tensor:
    """Return each row's sampling weight (n,), float64 on the CPU: 1 / the number of rows with its rarest label.

    Rows without labels are one more class. In multi-class, all classes are then drawn equally often.
    """
    hot = targets.cpu().bool()
    counts = hot.sum(0).double()
    rarest = torch.cat([torch.where(piece, counts, torch.inf).amin(1) for piece in hot.split(LOAD_ROWS)])
    unlabelled = rarest.isinf()
    return 1 / torch.where(unlabelled, unlabelled.sum().double(), rarest)


def drop_modalities(
    present: dict[str, Tensor], specs: Mapping[str, FeatureSpec], p: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Drop each modality of a row with probability ``p``, but never all: (B,) bool, or (B, T), by name."""
    modality_of = {name: specs[name].modality for name in present}
    modalities = sorted(set(modality_of.values()))
    by_row = {name: x if x.ndim == 1 else x.any(1) for name, x in present.items()}
    available = torch.stack(
        [torch.stack([x for name, x in by_row.items() if modality_of[name] == m]).any(0) for m in modalities]
    )  # (M, B)
    device = available.device
    kept = available & (torch.rand(available.shape, generator=generator) >= p).to(device)
    draws = torch.rand(available.shape, generator=generator).to(device).masked_fill(~available, -1)
    one_kept = available & (torch.arange(len(available), device=device)[:, None] == draws.argmax(0))
    kept = torch.where(kept.any(0), kept, one_kept)
    kept_of = dict(zip(modalities, kept, strict=True))  # modality -> (B,)
    masks = {name: kept_of[modality_of[name]] for name in present}
    return {name: x & (masks[name] if x.ndim == 1 else masks[name][:, None]) for name, x in present.items()}
