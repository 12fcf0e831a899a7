"""Kernel ridge regression on the sum of a kernel per feature: strong with few rows, and solved in seconds.

Each modality's pooled features have a radial kernel, n-grams of texts a linear one over their TF-IDF. Two rows are
compared by the sum of these kernels, and the product of the radial ones ("multiple kernel learning" with equal weights:
Gönen and Alpaydın, "Multiple kernel learning algorithms", 2011). The least squares have a solution in closed form, with
the values of rows left out, which choose the penalty and make the values probabilities.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import HeadBuilder
from cachefuse.fusion.solved import Read, SolvedFusion, fixed, fixed_to, some_rows, unit
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.kernel_ridge import fit_logits, kernel_ridge
from cachefuse.nn.named import NamedModules
from cachefuse.registry import Options


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
        mean = 2 - 2 * there.double().mean(0).square().sum()  # of all pairs, with a row and itself
        self.rate = (self.bandwidth / mean.clamp(min=1e-6)).float()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """From (B, D) and presence (B,) to (B, m)."""
        x = unit(x, present)
        squared = (2 - 2 * x @ self.landmarks.T).clamp_(min=0)
        return squared.mul_(-self.rate).exp_() * (present[:, None] * self.present)


class KernelFusion(SolvedFusion):
    """(k_1(x) + ... + k_M(x)) coefficients + n-grams lexical + bias -> logits, without a head."""

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
    ):
        """``n_landmarks`` and ``n_columns`` are the sizes of a solved model."""
        super().__init__(specs, classes, head, n_columns)
        if landmarks < 1 or not bandwidth > 0:
            raise ConfigError(f"landmarks and bandwidth must be above 0. Got {landmarks} and {bandwidth} instead")
        self.most = landmarks
        self.kernels = NamedModules({n: RadialKernel(s.width, n_landmarks, bandwidth) for n, s in self.dense.items()})
        self.coefficients = fixed(n_landmarks if self.dense else 0, classes)
        self.lexical = fixed(n_columns, classes)
        self.bias = fixed(classes)

    def sizes(self) -> Options:
        """Return the options that hold the sizes of the solved model."""
        return {"n_landmarks": len(self.coefficients), "n_columns": len(self.lexical)}

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        logits = self.bias.expand(len(next(iter(features.values()))), -1)
        if self.kernels:
            kernels = [kernel(features[m], present[m]) for m, kernel in self.kernels.items()]
            logits = logits + joined(kernels) @ self.coefficients
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
        for name, kernel in self.kernels.items():
            kernel.fit(*read(name, rows[places]))
        sparse = self.fit_tfidf(read, rows)
        landmarks = None if sparse is None else sparse[places.cpu().numpy()].T.tocsr()

        def kernel_of(at: Tensor, among: Tensor | None = None) -> Tensor:
            at = at if among is None else among[at]
            kernels = [kernel(*read(name, rows[at])) for name, kernel in self.kernels.items()]
            total = joined(kernels) if kernels else torch.zeros(len(at), len(places), device=rows.device)
            if sparse is not None:
                total += torch.from_numpy((sparse[at.cpu().numpy()] @ landmarks).toarray()).to(total)
            return total

        own = kernel_of(places)
        weights = torch.zeros(len(places), targets.shape[1], dtype=torch.float64, device=rows.device)
        bias = weights.new_zeros(targets.shape[1])
        for task in tasks:
            labelled = torch.from_numpy(task.labelled(targets.cpu().numpy())).to(rows.device).nonzero().flatten()
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
        if landmarks is not None:
            lexical = torch.from_numpy(landmarks @ weights.cpu().numpy()).to(rows.device)
            self.lexical = fixed_to(lexical)


def joined(kernels: Sequence[Tensor]) -> Tensor:
    """Return the sum of kernels (B, m) and, of several, of their product: rows that are alike in all of them."""
    total = kernels[0].clone()
    for kernel in kernels[1:]:
        total += kernel
    if len(kernels) > 1:
        product = kernels[0].clone()
        for kernel in kernels[1:]:
            product *= kernel
        total += product
    return total
