"""Kernel ridge regression on a weighted sum of kernels of features: strong with few rows, and solved in seconds.

Each encoder's pooled features have a radial kernel, n-grams of texts a linear one over their TF-IDF. Two rows are
compared by a weighted sum of these kernels, and the product of the radial ones ("multiple kernel learning": Gönen and
Alpaydın, "Multiple kernel learning algorithms", 2011), so that a weak encoder counts little. The least squares have a
solution in closed form, with the values of rows left out, which choose the weights of kernels and the penalty, and make
the values probabilities.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import HeadBuilder
from cachefuse.fusion.solved import Read, SolvedFusion, fixed, fixed_to, some_rows, unit
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.kernel_ridge import fit_logits, kernel_ridge, kernel_weights
from cachefuse.nn.named import NamedModules
from cachefuse.registry import Options

WEIGHED = 1024  # rows that choose the weights of kernels


class RadialKernel(nn.Module):
    """exp(-bandwidth * d^2 / mean d^2) of rows and landmarks of length 1, with the mean of the landmarks' distances.

    It is 0 where one of them lacks the modality.
    """

    landmarks: Tensor
    present: Tensor
    rate: Tensor

    def __init__(self, width: int, n_landmarks: int, bandwidth: float):
        super().__init__()
        self.bandwidth = bandwidth
        self.register_buffer("landmarks", torch.zeros(n_landmarks, width))
        self.register_buffer("present", torch.zeros(n_landmarks))
        self.register_buffer("rate", torch.ones(()))

    def fit(self, x: Tensor, present: Tensor) -> None:
        """Take features (m, D) and their presence (m,) as landmarks."""
        self.landmarks, self.present = unit(x, present), present.float()
        there = self.landmarks[present]
        centre = there.double().sum(0) / max(1, len(there))
        mean = 2 - 2 * centre.square().sum()  # of all pairs, with a row and itself
        self.rate = (self.bandwidth / mean.clamp(min=1e-6)).float()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """From (B, D) and presence (B,) to (B, m)."""
        x = unit(x, present)
        squared = (2 - 2 * x @ self.landmarks.T).clamp_(min=0)
        return squared.mul_(-self.rate).exp_() * (present[:, None] * self.present)


class KernelFusion(SolvedFusion):
    """(w_1 k_1(x) + ... + w_M k_M(x)) coefficients + n-grams lexical + bias -> logits, without a head."""

    name = "kernel"
    solver = "ridge"

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        landmarks: Annotated[int, "the most training rows to compare a row with"] = 4096,
        bandwidth: Annotated[float, "of the kernels: the rate at which likeness falls with distance"] = 1.0,
        n_landmarks: int = 0,
        n_columns: int = 0,
        n_weights: int = 0,
    ):
        """``n_landmarks``, ``n_columns`` and ``n_weights`` are the sizes of a solved model.

        A solved model without weights has a kernel per modality, with equal weights.
        """
        super().__init__(specs, classes, head, n_columns)
        if landmarks < 1 or not bandwidth > 0:
            raise ConfigError(f"landmarks and bandwidth must be above 0. Got {landmarks} and {bandwidth} instead")
        self.most = landmarks
        self.columns: dict[str, tuple[str, slice]] = {}  # a kernel's feature, and the columns of its encoder
        for name, spec in self.dense.items():
            parts = spec.parts if n_weights or not n_landmarks else ()
            ends = list(accumulate(parts or (spec.width,)))
            for i, (start, end) in enumerate(pairwise([0, *ends])):
                self.columns[f"{name}:{i}" if parts else name] = name, slice(start, end)
        self.kernels = NamedModules(
            {k: RadialKernel(at.stop - at.start, n_landmarks, bandwidth) for k, (_, at) in self.columns.items()}
        )
        self.kernel_weights = fixed_to(torch.ones(n_weights))
        self.coefficients = fixed(n_landmarks if self.dense else 0, classes)
        self.lexical = fixed(n_columns, classes)
        self.bias = fixed(classes)

    def sizes(self) -> Options:
        """Return the options that hold the sizes of the solved model."""
        sizes = {"n_landmarks": len(self.coefficients), "n_columns": len(self.lexical)}
        return {**sizes, "n_weights": len(self.kernel_weights)}

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        logits = self.bias.expand(len(next(iter(features.values()))), -1)
        if self.kernels:
            kernels = self._radial(lambda name: (features[name], present[name]))
            logits = logits + weighted(with_product(kernels), self.kernel_weights) @ self.coefficients
        return self.add_lexical(logits, self.lexical, features, present)

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
        places = some_rows(len(rows), self.most, groups, seed).to(rows.device)
        kernel: Any
        for key, kernel in self.kernels.items():
            name, columns = self.columns[key]
            x, present = read(name, rows[places])
            kernel.fit(x[:, columns], present)
        sparse = self.fit_tfidf(read, rows)
        landmarks = None if sparse is None else sparse[places.cpu().numpy()].T.tocsr()

        def kernels_of(at: Tensor) -> list[Tensor]:  # (B, m) each
            kernels = with_product(self._radial(lambda name: read(name, rows[at])))
            if sparse is not None:
                lexical = torch.from_numpy((sparse[at.cpu().numpy()] @ landmarks).toarray())
                kernels.append(lexical.to(rows.device, torch.float32))
            return kernels

        tasked = [
            (torch.from_numpy(task.labelled(targets.cpu().numpy())).to(rows.device).nonzero().flatten(), task)
            for task in tasks
        ]
        few = some_rows(len(rows), min(self.most, WEIGHED), groups, seed).to(rows.device)  # among the landmarks
        among = torch.isin(places, few)
        weight = kernel_weights(
            torch.stack([kernel[:, among] for kernel in kernels_of(few)]),
            [
                (torch.isin(few, labelled).nonzero().flatten(), targets[few[torch.isin(few, labelled)], task.columns])
                for labelled, task in tasked
            ],
            None if groups is None else groups[few],
        ).float()
        weight *= len(weight) / weight.sum()  # how strong all are together is for the penalty

        def kernel_of(at: Tensor, among: Tensor | None = None) -> Tensor:
            return weighted(kernels_of(at if among is None else among[at]), weight)

        own = kernel_of(places)
        weights = torch.zeros(len(places), targets.shape[1], dtype=torch.float64, device=rows.device)
        bias = weights.new_zeros(targets.shape[1])
        for labelled, task in tasked:
            measured = torch.isin(labelled, places).nonzero().flatten()
            solution = kernel_ridge(
                partial(kernel_of, among=labelled),
                own,
                targets[labelled, task.columns],
                measured=measured,
                groups=None if groups is None else groups[labelled],
            )
            left_out, truth = solution.left_out, targets[labelled[measured], task.columns]
            scale, shift = fit_logits(left_out, truth, task.one_label)
            weights[:, task.columns] = solution.weights * scale
            bias[task.columns] = solution.bias * scale + shift
        self.coefficients, self.bias = fixed_to(weights if self.kernels else weights[:0]), fixed_to(bias)
        self.kernel_weights = fixed_to(weight[: len(weight) - (sparse is not None)])
        if landmarks is not None:
            lexical = torch.from_numpy(landmarks @ weights.cpu().numpy()).to(rows.device)
            self.lexical = fixed_to(weight[-1] * lexical)

    def _radial(self, of: Callable[[str], tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return the radial kernels (B, m) of features, which ``of`` returns by name, with their presence."""
        read = {name: of(name) for name in dict.fromkeys(name for name, _ in self.columns.values())}
        kernels = []
        for key, kernel in self.kernels.items():
            name, columns = self.columns[key]
            x, present = read[name]
            kernels.append(kernel(x[:, columns], present))
        return kernels


def with_product(kernels: list[Tensor]) -> list[Tensor]:
    """Return kernels (B, m) and, of several, their product: rows that are alike in all of them."""
    if len(kernels) < 2:
        return kernels
    product = kernels[0].clone()
    for kernel in kernels[1:]:
        product *= kernel
    return [*kernels, product]


def weighted(kernels: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """Return the sum of kernels (B, m), each times its weight (1 if there are no weights)."""
    total = torch.zeros_like(kernels[0])
    for kernel, weight in zip(kernels, weights if len(weights) else [1.0] * len(kernels), strict=True):
        total += weight * kernel
    return total
