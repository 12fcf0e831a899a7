"""Kernel ridge regression on the sum of a kernel per feature: strong with few rows, and solved in seconds.

Each modality's pooled features have a radial kernel, n-grams of texts a linear one over their TF-IDF. Two rows are
compared by the sum of these kernels, and the product of the radial ones ("multiple kernel learning" with equal weights:
Gönen and Alpaydın, "Multiple kernel learning algorithms", 2011). The least squares have a solution in closed form, with
the values of rows left out, which choose the penalty and make the values probabilities.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import NGRAMS, POOLED, FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.kernel_ridge import fit_logits, kernel_ridge
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules
from cachefuse.nn.tfidf import TfIdf
from cachefuse.registry import Options

READ = 1 << 22  # numbers of n-grams, with padding, to read at a time

Read = Callable[[str, Tensor], tuple[Tensor, Tensor]]  # (a feature's name, rows (B,)) -> its input and presence


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
        self.landmarks, self.present = F.normalize(zero_absent(x, present), dim=1), present.float()
        there = self.landmarks[present]
        mean = 2 - 2 * there.double().mean(0).square().sum()  # of all pairs, with a row and itself
        self.rate = (self.bandwidth / mean.clamp(min=1e-6)).float()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """From (B, D) and presence (B,) to (B, m)."""
        x = F.normalize(zero_absent(x, present), dim=1)
        squared = (2 - 2 * x @ self.landmarks.T).clamp_(min=0)
        return squared.mul_(-self.rate).exp_() * (present[:, None] * self.present)


class KernelFusion(Fusion):
    """(k_1(x) + ... + k_M(x)) coefficients + n-grams lexical + bias -> logits, without a head."""

    name = "kernel"
    closed_form = True
    optional_views = (POOLED, NGRAMS)

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
        super().__init__(specs, classes, head)
        if landmarks < 1 or not bandwidth > 0:
            raise ConfigError(f"landmarks and bandwidth must be above 0. Got {landmarks} and {bandwidth} instead")
        self.most = landmarks
        dense = {name: spec for name, spec in self.specs.items() if spec.view == POOLED}
        self.kernels = NamedModules({n: RadialKernel(s.width, n_landmarks, bandwidth) for n, s in dense.items()})
        self.ngrams = next((name for name, spec in self.specs.items() if spec.view == NGRAMS), None)
        vocabulary = self.specs[self.ngrams].vocabulary if self.ngrams else 0
        self.tfidf = TfIdf(vocabulary, n_columns)
        self.coefficients = _fixed(n_landmarks if dense else 0, classes)
        self.lexical = _fixed(n_columns, classes)
        self.bias = _fixed(classes)

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        return (POOLED, NGRAMS)

    def sizes(self) -> Options:
        """Return the options that hold the sizes of the solved model."""
        return {"n_landmarks": len(self.coefficients), "n_columns": len(self.lexical)}

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        logits = self.bias.expand(len(next(iter(features.values()))), -1)
        if self.kernels:
            kernels = [kernel(features[m], present[m]) for m, kernel in self.kernels.items()]
            logits = logits + joined(kernels) @ self.coefficients
        if self.ngrams and len(self.lexical):
            place, weight = self.tfidf(features[self.ngrams], present[self.ngrams])
            logits = logits + F.embedding_bag(place, self.lexical, per_sample_weights=weight, mode="sum")
        return logits

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
        """Compute all weights from rows (n,), which ``read`` reads, with targets (n, C) and groups (n,) of rows.

        Each of the ``tasks`` is solved on the rows that have its label.
        """
        places = self._landmarks(len(rows), groups, seed)
        kernel: Any
        for name, kernel in self.kernels.items():
            kernel.fit(*read(name, rows[places]))
        sparse = landmarks = None
        if self.ngrams:
            self.tfidf.fit(self._pieces(read, rows))
            sparse = self.tfidf.matrix(self._pieces(read, rows))
            landmarks = sparse[places.cpu().numpy()].T.tocsr()

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
        self.coefficients, self.bias = _fixed_to(weights if self.kernels else weights[:0]), _fixed_to(bias)
        if landmarks is not None:
            lexical = torch.from_numpy(landmarks @ weights.cpu().numpy()).to(rows.device)
            self.lexical = _fixed_to(lexical)

    def _landmarks(self, n: int, groups: Tensor | None, seed: int) -> Tensor:
        """Return the rows to compare with, (m,) in order: all, or a random choice, in which groups are whole."""
        generator = torch.Generator().manual_seed(seed)
        if groups is None:
            order = torch.randperm(n, generator=generator)
        else:
            _, group = groups.cpu().unique(return_inverse=True)
            order = torch.randperm(int(group.max()) + 1, generator=generator)[group].argsort(stable=True)
        return order[: self.most].sort().values.to(self.bias.device)

    def _pieces(self, read: Read, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.ngrams is not None
        for some in rows.split(max(1, READ // max(1, self.specs[self.ngrams].n_tokens))):
            yield read(self.ngrams, some)


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


def _fixed(*shape: int) -> nn.Parameter:
    return _fixed_to(torch.zeros(shape))


def _fixed_to(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.float(), requires_grad=False)
