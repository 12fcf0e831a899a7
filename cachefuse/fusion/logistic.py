"""Logistic regression on the features side by side, beside the TF-IDF of n-grams: the strongest linear model.

Each modality's pooled features have length 1, as the TF-IDF has. The penalty is chosen on rows left out
(``nn/logistic.py``). With n-grams the problem is solved in its dual: weights of training rows instead of columns, of
which there are many more (Schölkopf et al., "A generalized representer theorem", 2001).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import HeadBuilder
from cachefuse.fusion.solved import LinearSolvedFusion, Read, fixed_to, some_rows
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.kernel_ridge import JITTER
from cachefuse.nn.logistic import PENALTIES, logistic


class LogisticFusion(LinearSolvedFusion):
    """The linear model with the least log loss of training rows and a penalty on its squared weights."""

    name = "logistic"
    solver = "linear"

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        penalty: Annotated[float, "on the squared weights; 0: chosen on rows left out"] = 0.0,
        rows: Annotated[int, "the most training rows to learn from"] = 40_000,
        landmarks: Annotated[int, "the most training rows to compare a row with, where there are n-grams"] = 4096,
        n_columns: int = 0,
    ):
        """``n_columns`` is the size of a solved model."""
        super().__init__(specs, classes, head, n_columns)
        if not 0 <= penalty < math.inf or rows < 1 or landmarks < 1:
            raise ConfigError(
                f"penalty must be at least 0, rows and landmarks above 0. Got {penalty}, {rows} and {landmarks} instead"
            )
        self.penalties = (penalty,) if penalty else PENALTIES
        self.most, self.landmarks = rows, landmarks

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
        rows, targets, groups = rows[used], targets[used], None if groups is None else groups[used]
        dense, sparse = self.read_unit(read, rows), self.fit_tfidf(read, rows)
        x, places, root = dense, torch.arange(0), torch.empty(0)
        if sparse is not None:
            places = some_rows(len(rows), self.landmarks, groups, seed)
            products = torch.from_numpy((sparse @ sparse[places.numpy()].T).toarray()).to(dense)
            products += dense @ dense[places].T  # (n, m)
            own = products[places].double()
            own.diagonal().add_(JITTER)
            root = torch.linalg.cholesky(own)
            x = torch.linalg.solve_triangular(root, products.double().T, upper=False).T.float()  # x x' = products
        weights = torch.zeros(x.shape[1], targets.shape[1], dtype=torch.float64, device=rows.device)
        bias = weights.new_zeros(targets.shape[1])
        for task in tasks:
            labelled = torch.from_numpy(np.flatnonzero(task.labelled(targets.cpu().numpy()))).to(rows.device)
            found = logistic(
                x[labelled],
                targets[labelled, task.columns],
                one_label=task.one_label,
                groups=None if groups is None else groups[labelled],
                seed=seed,
                penalties=self.penalties,
            )
            weights[:, task.columns], bias[task.columns] = found.weights.double(), found.bias.double()
        self.bias = fixed_to(bias)
        if sparse is None:
            self.weight = fixed_to(weights)
            return
        of_rows = torch.linalg.solve_triangular(root.T, weights, upper=True)  # (m, C)
        self.weight = fixed_to(dense[places].double().T @ of_rows)
        lexical = sparse[places.numpy()].T.tocsr() @ of_rows.cpu().numpy()
        self.lexical = fixed_to(torch.from_numpy(lexical).to(rows.device))
