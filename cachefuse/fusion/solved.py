"""The base of fusions that are solved without gradients: pooled features and n-grams in, logits out, no head."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefuse.feature_spec import NGRAMS, POOLED, FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.tfidf import TfIdf
from cachefuse.registry import Options

if TYPE_CHECKING:
    from scipy.sparse import csr_array

READ = 1 << 22  # numbers of n-grams, with padding, to read at a time
READ_ROWS = 8192  # of features

Read = Callable[[str, Tensor], tuple[Tensor, Tensor]]  # (a feature's name, rows (B,)) -> its input and presence


class SolvedFusion(Fusion):
    """A fusion whose ``solve`` computes all weights. ``dense`` are its pooled features, ``ngrams`` its n-grams or None.

    ``solve(read, rows, targets, tasks, groups, seed)`` learns from rows (n,), which ``read`` reads, with targets (n, C)
    and groups (n,) of rows. Each of the ``tasks`` is solved on the rows that have its label. ``sizes`` returns the
    options that hold the sizes of the solved model.
    """

    solved = True
    optional_views = (POOLED, NGRAMS)

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder, n_columns: int = 0):
        super().__init__(specs, classes, head)
        self.dense = {name: spec for name, spec in self.specs.items() if spec.view == POOLED}
        self.ngrams = next((name for name, spec in self.specs.items() if spec.view == NGRAMS), None)
        self.tfidf = TfIdf(self.specs[self.ngrams].vocabulary if self.ngrams else 0, n_columns)

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        return (POOLED, NGRAMS)

    def fit_tfidf(self, read: Read, rows: Tensor) -> "csr_array | None":
        """Fit the TF-IDF to rows (n,), and return theirs (n, V); None without n-grams."""
        if not self.ngrams:
            return None
        self.tfidf.fit(self._pieces(read, rows))
        return self.tfidf.matrix(self._pieces(read, rows))

    def _pieces(self, read: Read, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.ngrams is not None
        for some in rows.split(max(1, READ // max(1, self.specs[self.ngrams].n_tokens))):
            yield read(self.ngrams, some)

    def read_unit(self, read: Read, rows: Tensor) -> Tensor:
        """Return the dense features of rows (n,) side by side, (n, D): see ``unit``."""
        pieces = rows.split(READ_ROWS)
        columns = [torch.cat([unit(*read(name, some)) for some in pieces]) for name in self.dense]
        return torch.cat(columns, dim=1) if columns else torch.zeros(len(rows), 0, device=rows.device)

    def add_lexical(
        self, logits: Tensor, lexical: Tensor, features: dict[str, Tensor], present: dict[str, Tensor]
    ) -> Tensor:
        """Return logits (B, C) plus the product of the rows' TF-IDF and weights ``lexical`` (V, C)."""
        if not self.ngrams or not len(lexical):
            return logits
        place, weight = self.tfidf(features[self.ngrams], present[self.ngrams])
        return logits + F.embedding_bag(place, lexical, per_sample_weights=weight, mode="sum")


class LinearSolvedFusion(SolvedFusion):
    """[x_1 / |x_1|; ...; x_M / |x_M|] weight + n-grams lexical + bias -> logits (B, C), however these are solved."""

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder, n_columns: int = 0):
        super().__init__(specs, classes, head, n_columns)
        self.weight = fixed(sum(spec.width for spec in self.dense.values()), classes)
        self.lexical, self.bias = fixed(n_columns, classes), fixed(classes)

    def sizes(self) -> Options:
        """Return the options that hold the sizes of the solved model."""
        return {"n_columns": len(self.lexical)}

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        logits = self.bias.expand(len(next(iter(features.values()))), -1)
        if self.dense:
            logits = logits + torch.cat([unit(features[name], present[name]) for name in self.dense], 1) @ self.weight
        return self.add_lexical(logits, self.lexical, features, present)


def unit(x: Tensor, present: Tensor) -> Tensor:
    """Return features (B, D) with length 1, and 0 where the row lacks them."""
    return F.normalize(zero_absent(x, present).float(), dim=1)


def some_rows(n: int, most: int, groups: Tensor | None, seed: int) -> Tensor:
    """Return at most ``most`` of n rows, (m,) in order: all, or a random choice, in which groups are whole."""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        order = torch.randperm(n, generator=generator)
    else:
        _, group = groups.cpu().unique(return_inverse=True)
        order = torch.randperm(int(group.max()) + 1, generator=generator)[group].argsort(stable=True)
    return order[:most].sort().values


def fixed(*shape: int) -> nn.Parameter:
    """Return weights of zeros that no gradient changes."""
    return fixed_to(torch.zeros(shape))


def fixed_to(x: Tensor) -> nn.Parameter:
    """Return weights that no gradient changes."""
    return nn.Parameter(x.float(), requires_grad=False)
