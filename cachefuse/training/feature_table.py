"""A table of stored features; index tensors select its batches, without a per-sample Dataset."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachefuse.data.answers import ACCURACY, ENOUGH, NO_ANSWER, UNLIKE
from cachefuse.device import total_memory
from cachefuse.feature_spec import FeatureSpec, modalities_of
from cachefuse.registry import lookup
from cachefuse.store.rows import SHUFFLE_BYTES, FeatureRows, block_shuffle
from cachefuse.store.tokens import Tokens, length_grouped
from cachefuse.threads import idle_threads

SHARE_OF_MEMORY = 0.5  # features above this share of memory stay in files
COPY_SHARE = 1 / 16  # maximum share of memory for a standardised copy; a shuffled copy takes the same again

LOAD_ROWS = 4096  # rows to load at a time
PIECE_ROWS, PIECE_FLOATS = 8192, 2**25  # maximum to predict at a time


class AnswerTargets:
    """How right each class is as an answer to N questions, (N, C) float32, computed on demand.

    ``answers`` (N, 10) are the class numbers of people's answers; a number below 0 is an answer that is no class.
    Indexing by rows returns the targets to learn, min(people who gave the answer / 3, 1). ``accuracies`` are those of
    the VQA evaluation, for figures: it does not take a person's own answer as right.
    """

    def __init__(self, answers: Tensor, n_classes: int) -> None:
        self.answers = answers
        self.shape = (len(answers), n_classes)
        self.device = answers.device

    def __getitem__(self, rows: Tensor) -> Tensor:
        answers = self.answers[rows].long()  # (B, 10)
        enough = (answers != NO_ANSWER).sum(1, keepdim=True).clamp(1, ENOUGH)  # (B, 1)
        answers = torch.where(answers <= UNLIKE, UNLIKE - answers, answers)  # the spelling does not matter here
        people = torch.zeros(len(answers), self.shape[1], device=self.device)
        people.scatter_add_(1, answers.clamp(min=0), (answers >= 0).float())
        return people.div_(enough).clamp_(max=1)

    def accuracies(self, rows: Tensor) -> Tensor:
        """Return the ``vqa_accuracy`` of each class for rows (B,), (B, C) float32."""
        answers = self.answers[rows].long()  # (B, 10)
        hits = (answers[:, :, None] == answers[:, None, :]).sum(2)  # (B, 10), the people who gave each answer
        people = (answers != NO_ANSWER).sum(1, keepdim=True)  # (B, 1)
        table = torch.from_numpy(ACCURACY).float().to(self.device)
        right = torch.where(answers >= 0, table[hits, people], 0)  # (B, 10)
        accuracies = torch.zeros(len(answers), self.shape[1], device=self.device)
        return accuracies.scatter_reduce_(1, answers.clamp(min=0), right, "amax")

    def to(self, device: str) -> "AnswerTargets":
        """Return the same targets with their answers on a device."""
        return AnswerTargets(self.answers.to(device), self.shape[1])


@dataclass(frozen=True)
class FeatureTable:
    """N rows of features and presence (N,) bool, both by name ("image_tokens"), with targets (N, C).

    Targets are 0 and 1. With several tasks, -1 marks all columns of a task whose label the row lacks. For answers to
    questions they are in [0, 1]: how right each answer is. ``labelled`` is (N,) bool.

    Features keep the store's dtype, and stay in its files until a batch reads them. ``specs`` are by name. If several
    rows share features, ``sources`` (N,) by name maps a table row to its row of the features.
    """

    features: Mapping[str, FeatureRows | Tokens]
    specs: Mapping[str, FeatureSpec]
    present: dict[str, Tensor]
    targets: Tensor | AnswerTargets
    labelled: np.ndarray
    splits: np.ndarray
    sources: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, split: str) -> Tensor:
        """Return the labelled rows of a split, (n,) int64."""
        return torch.from_numpy(np.flatnonzero(self.labelled & (self.splits == split)))

    def measured_targets(self, rows: Tensor) -> Tensor:
        """Return the targets (B, C) of rows (B,) by which figures measure; training may learn from others."""
        targets = self.targets
        return targets.accuracies(rows) if isinstance(targets, AnswerTargets) else targets[rows]

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the features and presence of rows (B,): (B, D) and (B,), or tokens (B, T, D) and a mask (B, T)."""
        features, present = {}, {}
        for name, x in self.features.items():
            mask = self.present[name].index_select(0, rows)  # (B,)
            source_rows = self.feature_rows(name, rows)
            if isinstance(x, Tokens):
                values, token_mask = x.read(source_rows.cpu())
                features[name], mask = values.to(rows.device), token_mask.to(rows.device) & mask[:, None]
            else:
                features[name] = x.index_select(0, source_rows.to(x.device)).to(rows.device)
            present[name] = mask
        return features, present

    def feature_rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of the named features that belong to table rows (n,)."""
        return self.sources[name][rows.cpu()] if name in self.sources else rows

    @property
    def lengths(self) -> np.ndarray | None:
        """The total number of tokens of each row, (N,); None if all rows have the same."""
        ragged = {name: x.lengths for name, x in self.features.items() if isinstance(x, Tokens) and x.ragged}
        of_row = [n[self.sources[name].numpy()] if name in self.sources else n for name, n in ragged.items()]
        return np.sum(of_row, axis=0) if of_row else None

    def batches(self, order: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Cut rows (n,) in a random order into batches (B,); ragged tokens are grouped by length."""
        if self.lengths is None:
            yield from order.split(size)
        else:
            yield from length_grouped(order, self.lengths, size, generator)

    def order(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return rows in a new random order. If memory cannot hold the features, shuffle a few blocks at a time.

        Block shuffling reads the disk in large pieces, once per epoch, instead of a page for every row. The choice
        depends on the machine's total memory, not on its free memory: the same seed must give the same order.
        """
        mapped = [x for x in self.features.values() if not isinstance(x, Tensor)]
        n_bytes = sum(x.nbytes for x in mapped)
        if n_bytes <= SHARE_OF_MEMORY * total_memory():
            return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        size = max(x.block_rows for x in mapped)
        n_blocks = max(1, SHUFFLE_BYTES * len(self.labelled) // (n_bytes * size))
        return block_shuffle(rows.cpu(), size, n_blocks, generator).to(rows.device)

    def any_present(self, rows: Tensor) -> Tensor:
        """Return which rows (n,) have at least one modality, (n,) bool."""
        return torch.stack([x[rows] for x in self.present.values()]).any(0)

    def only(self, names: Iterable[str]) -> "FeatureTable":
        """Return the same rows with only the named features."""
        names = list(names)
        return replace(
            self,
            features={name: self.features[name] for name in names},
            specs={name: self.specs[name] for name in names},
            present={name: self.present[name] for name in names},
            sources={name: self.sources[name] for name in names if name in self.sources},
        )

    def without(self, modalities: Collection[str]) -> "FeatureTable":
        """Return the same rows with these modalities absent. Raises UnknownNameError for an unknown modality."""
        absent = {name: torch.zeros_like(self.present[name]) for m in modalities for name in self.names_of(m)}
        return replace(self, present={**self.present, **absent})

    def names_of(self, modality: str) -> list[str]:
        """Return the names of a modality's features. Raises UnknownNameError for an unknown modality."""
        lookup(dict.fromkeys(modalities_of(self.specs.values())), modality, "modality")
        return [name for name, spec in self.specs.items() if spec.modality == modality]

    def shuffled(self, shares: Mapping[str, float], seed: int) -> "FeatureTable":
        """Return the same rows, where a share of the rows, by modality, has the modality of other rows.

        Raises UnknownNameError for an unknown modality.
        """
        sources, present = dict(self.sources), dict(self.present)
        for modality, share in shares.items():
            names = self.names_of(modality)
            generator = torch.Generator().manual_seed(seed)
            n = len(self.labelled)
            moved = torch.randperm(n, generator=generator)[: round(share * n)]
            source = torch.arange(n).index_copy_(0, moved, moved.roll(1))
            for name in names:
                sources[name] = self.feature_rows(name, source)
                present[name] = present[name][source.to(present[name].device)]
        return replace(self, sources=sources, present=present)

    def in_memory(self, standardize: nn.ModuleDict) -> "FeatureTable | None":
        """Return the same rows standardised, float32, in memory; None for tokens or if too large."""
        if any(isinstance(x, Tokens) for x in self.features.values()):
            return None
        device = self.targets.device
        copied = self.features.values() if device.type == "cuda" else (self.targets, *self.features.values())
        n_bytes = 4 * sum(x.shape[0] * x.shape[1] for x in copied)
        memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_memory()
        if n_bytes > COPY_SHARE * memory:
            return None
        features = {}
        for modality, apply in standardize.items():
            x: Any = self.features[modality]
            features[modality] = torch.empty(x.shape, device=device)
            for rows in torch.arange(x.shape[0], device=x.device).split(LOAD_ROWS):
                features[modality][rows[0] : rows[-1] + 1] = apply(x.index_select(0, rows).to(device))
        return replace(self, features=features)

    @torch.inference_mode()
    @idle_threads()
    def map(self, function: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor], rows: Tensor) -> Tensor:
        """Return ``function(features, presence)`` of rows (n,), as (n, ...) on the CPU, without gradients.

        It runs batch by batch to save memory; ragged tokens are grouped by length.
        """
        width = sum(x.shape[1] for x in self.features.values() if not isinstance(x, Tokens))
        # A transformer's hidden layer is four times as wide as its tokens.
        width += sum(4 * x.n_tokens * math.prod(x.shape[1:]) for x in self._tokens())
        size = max(1, min(PIECE_ROWS, PIECE_FLOATS // max(1, width)))
        if self.lengths is None or len(rows) <= size:
            order = torch.arange(len(rows))
        else:
            order = torch.from_numpy(self.lengths)[rows.cpu()].argsort(stable=True)
        output = torch.empty(0)
        for i, places in enumerate(order.split(size)):
            values = function(*self.batch(rows[places.to(rows.device)])).cpu()
            if i == 0:
                output = values.new_empty(len(rows), *values.shape[1:])  # may be large: fill it batch by batch
            output.index_copy_(0, places, values)
        return output

    def _tokens(self) -> list[Tokens]:
        return [x for x in self.features.values() if isinstance(x, Tokens)]

    def to(self, device: str) -> "FeatureTable":
        """Return the same rows on a device; features that are too large for its memory are not moved."""
        features = dict(self.features)
        for modality, x in features.items():
            on_cuda = torch.device(device).type == "cuda"
            if not on_cuda or x.nbytes <= SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
                features[modality] = x.to(device)
        return replace(
            self,
            features=features,
            present={modality: x.to(device) for modality, x in self.present.items()},
            targets=self.targets.to(device),
        )


def multi_hot(targets: np.ndarray, n_classes: int) -> np.ndarray:
    """Return (N, C) uint8 targets; unlabelled rows are all 0."""
    if targets.ndim == 2:
        positive: np.ndarray = targets > 0
    else:
        positive = targets[:, None] == np.arange(n_classes)
    return positive.astype(np.uint8)
