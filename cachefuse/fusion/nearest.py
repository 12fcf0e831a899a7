"""Fusions that learn without optimisation, from few rows: the nearest training rows, and the means of the classes.

Features have length 1, so that products are cosines. How alike a row is to others that are not of its group gives its
value for each class; a scale and a shift make values logits (``nn.kernel_ridge.fit_logits``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import HeadBuilder
from cachefuse.fusion.solved import LinearSolvedFusion, Read, SolvedFusion, fixed, fixed_to, some_rows, unit
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.kernel_ridge import fit_logits
from cachefuse.registry import Options

NEIGHBOURS = (5, 10, 20, 40, 80)
MEASURED = 4096  # rows, at most, whose values without their group choose the neighbours, and make values logits
NUMBERS = 1 << 24  # in memory at a time


class NeighboursFusion(SolvedFusion):
    """The share of each class among the k nearest training rows, by the sum of the features' cosines, to logits.

    A row weighs as much as it is alike; the share of the class in all rows counts as one more. N-grams are not read.
    """

    name = "neighbours"
    solver = "knn"

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        k: Annotated[int, "neighbours; 0: chosen on rows left out"] = 0,
        rows: Annotated[int, "the most training rows to compare a row with"] = 20_000,
        n_landmarks: int = 0,
        n_neighbours: int = 0,
    ):
        """``n_landmarks`` and ``n_neighbours`` are of a solved model."""
        super().__init__(specs, classes, head)
        if not self.dense:
            raise ConfigError("fusion 'neighbours' reads pooled features, and there are none")
        if k < 0 or rows < 1:
            raise ConfigError(f"k must be at least 0, and rows above 0. Got {k} and {rows} instead")
        self.k, self.most = n_neighbours or k, rows
        self.landmarks = fixed(n_landmarks, sum(spec.width for spec in self.dense.values()))
        self.labels, self.labelled = fixed(n_landmarks, classes), fixed(n_landmarks, classes)
        self.prior, self.scale, self.shift = fixed(classes), fixed(classes), fixed(classes)

    def sizes(self) -> Options:
        """Return the options that hold the sizes of the solved model."""
        return {"n_landmarks": len(self.landmarks), "n_neighbours": self.k}

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = torch.cat([unit(features[name], present[name]) for name in self.dense], dim=1)
        return self._shares(*_nearest(x @ self.landmarks.T, self.k)) * self.scale + self.shift

    def _shares(self, weight: Tensor, place: Tensor) -> Tensor:
        """Return the share (B, C) of each class among rows with weights and numbers (B, k)."""
        shares = []
        at_once = max(1, NUMBERS // max(1, place.shape[1] * self.labels.shape[1]))
        for some, at in zip(weight.split(at_once), place.split(at_once), strict=True):
            found, all_ = (torch.bmm(some[:, None, :], x[at])[:, 0] for x in (self.labels, self.labelled))
            shares.append((found + self.prior) / (all_ + 1))
        return torch.cat(shares)

    @torch.no_grad()
    def solve(
        self,
        read: Read,
        rows: Tensor,
        targets: Tensor,
        tasks: Sequence[TaskSlice],
        groups: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        used = some_rows(len(rows), self.most, groups, seed).to(rows.device)
        targets, groups = targets[used].float(), None if groups is None else groups[used]
        x = self.read_unit(read, rows[used])
        self.landmarks = fixed_to(x)
        self.labels, self.labelled = fixed_to(targets.clamp(min=0)), fixed_to((targets >= 0).float())
        self.prior = fixed_to(self.labels.sum(0) / self.labelled.sum(0).clamp(min=1))
        measured = some_rows(len(x), MEASURED, groups, seed).to(rows.device)
        tried = (self.k,) if self.k else NEIGHBOURS
        pieces = _without_group(lambda at: x[at] @ x.T, len(x), measured, groups, -torch.inf)
        nearest = [_nearest(piece, max(tried)) for piece in pieces]
        weight, place = (torch.cat(each) for each in zip(*nearest, strict=True))  # (k, the most neighbours) each
        fewest, values = torch.inf, x
        for k in tried:
            shares = self._shares(weight[:, :k], place[:, :k])
            error = float(((shares - self.labels[measured]) * self.labelled[measured]).square().sum())
            if error < fewest:
                fewest, values, self.k = error, shares, k
        self.scale, self.shift = map(fixed_to, _logits(values, targets[measured], tasks))


class PrototypeFusion(LinearSolvedFusion):
    """How much more a row is like the mean row with a class than like the mean row without it, to logits.

    A row is its features of length 1 side by side, and the TF-IDF of its n-grams: the model is linear.
    """

    name = "prototype"
    solver = "means"

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder, *, n_columns: int = 0):
        """``n_columns`` is the size of a solved model."""
        super().__init__(specs, classes, head, n_columns)

    @torch.no_grad()
    def solve(
        self,
        read: Read,
        rows: Tensor,
        targets: Tensor,
        tasks: Sequence[TaskSlice],
        groups: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        dense, sparse, targets = self.read_unit(read, rows), self.fit_tfidf(read, rows), targets.float()
        sides = (targets > 0).float(), (targets == 0).float()  # (n, C): rows with each class, and without it

        def alike(at: Tensor) -> Tensor:
            products = dense[at] @ dense.T
            if sparse is not None:
                products += torch.from_numpy((sparse[at.cpu().numpy()] @ sparse.T).toarray()).to(products)
            return products

        measured = some_rows(len(rows), MEASURED, groups, seed).to(rows.device)
        both = torch.cat(sides, dim=1)
        sums = torch.cat([piece @ both for piece in _without_group(alike, len(rows), measured, groups, 0.0)])
        means = (sums / _others(both, measured, groups).clamp(min=1)).chunk(2, dim=1)
        scale, shift = _logits(means[0] - means[1], targets[measured], tasks)
        apart = (sides[0] / sides[0].sum(0).clamp(min=1) - sides[1] / sides[1].sum(0).clamp(min=1)) * scale  # (n, C)
        self.weight, self.bias = fixed_to(dense.T @ apart), fixed_to(shift)
        if sparse is not None:
            self.lexical = fixed_to(torch.from_numpy(sparse.T @ apart.cpu().numpy()).to(rows.device))


def _nearest(alike: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the weights and the numbers (B, k) of the most alike rows; ``alike`` is (B, m)."""
    weight, place = alike.topk(min(k, alike.shape[1]), dim=1)
    return weight.clamp(min=0), place


def _without_group(
    alike: Callable[[Tensor], Tensor], n: int, rows: Tensor, groups: Tensor | None, value: float
) -> Iterator[Tensor]:
    """Yield how alike rows (k,) are to all n rows, in pieces (b, n), with a value for those of their own group."""
    numbers = torch.arange(n, device=rows.device) if groups is None else groups
    for at in rows.split(max(1, NUMBERS // n)):
        yield alike(at).masked_fill_(numbers[at][:, None] == numbers, value)


def _others(side: Tensor, rows: Tensor, groups: Tensor | None) -> Tensor:
    """Return the sums (k, C) of ``side`` (n, C) over the rows that are not of the group of each of the rows (k,)."""
    if groups is None:
        return side.sum(0) - side[rows]
    _, group = groups.unique(return_inverse=True)
    sums = side.new_zeros(int(group.max()) + 1, side.shape[1]).index_add_(0, group, side)
    return side.sum(0) - sums[group[rows]]


def _logits(values: Tensor, targets: Tensor, tasks: Sequence[TaskSlice]) -> tuple[Tensor, Tensor]:
    """Return the scale (C,) and the shift (C,) that make values (k, C) logits of targets (k, C), for each task."""
    scale, shift = (values.new_zeros(values.shape[1]) for _ in range(2))
    for task in tasks:
        labelled = torch.from_numpy(task.labelled(targets.cpu().numpy())).to(values.device)
        found = fit_logits(values[labelled, task.columns], targets[labelled, task.columns], task.one_label)
        scale[task.columns], shift[task.columns] = (x.float() for x in found)
    return scale, shift
