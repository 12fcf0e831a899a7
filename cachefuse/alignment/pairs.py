"""Pairs of texts that mean the same, mined from a dataset's captions by the cosine of their cached embeddings."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cachefuse.alignment.retrieve import item_places
from cachefuse.data.dataset import Dataset
from cachefuse.data.splits import ordered_splits
from cachefuse.device import resolve_device
from cachefuse.errors import ConfigError, DataError
from cachefuse.files import make_folder, slug, write_atomically
from cachefuse.nn.losses import TINY_NORM
from cachefuse.store.features import Features
from cachefuse.threads import idle_threads

BLOCK = 2048  # texts per block; two blocks are compared at a time
CANDIDATES = 16  # nearest texts of each text that may become its partner

OnRows = Callable[[int, int], None]


@dataclass(frozen=True)
class Pairs:
    """By split: feature rows of a text modality, two per pair (P, 2), and their cosines (P,)."""

    rows: dict[str, np.ndarray]
    cosines: dict[str, np.ndarray]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())


@idle_threads()
def mine_pairs(
    features: Features,
    texts: Sequence[tuple[str, ...]],
    threshold: float,
    *,
    within_samples: bool = False,
    device: str = "auto",
    on_rows: OnRows = lambda done, total: None,
) -> Pairs:
    """Pair texts whose cosine is ``threshold`` or more; ``texts`` has the texts of each of the N samples.

    Every text is compared with every other text of its split, and has its 16 nearest texts as candidates. The nearest
    pair is taken first, then the nearest of the remaining pairs; a sample is in one pair at most. So no negative of a
    pair is the text itself or another caption of its image. CBMF, section IV-B, says which pairs are similar, but not
    which of them to take. Texts with the same words are not a pair.

    ``within_samples`` pairs every two texts of a sample instead, as the authors' later code (LightCRL) does. A text is
    then in several pairs, and other captions of its image are among their negatives. The authors also pair each text
    with itself; such pairs are left out.

    Raises ConfigError for a threshold outside of (0, 1], or for ``within_samples`` if samples have one text each,
    DataError if the numbers of texts and feature rows differ.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be above 0 and at most 1. Got {threshold:g} instead")
    samples = features.samples
    owners, _ = item_places(samples, features.modality)
    several = samples.items(features.modality) is not None
    flat = [text for group in texts for text in (group if several else (group[0] if group else "",))]
    if len(flat) != len(owners):
        raise DataError(
            f"{samples.dataset} has {len(flat):,} texts, but its features have {len(owners):,} rows; extract again"
        )
    words: dict[str, int] = {}
    same = np.array([words.setdefault(" ".join(text.lower().split()), len(words)) for text in flat])
    if within_samples and not (owners[:-1] == owners[1:]).any():
        raise ConfigError(f"samples of {samples.dataset} have one text each; leave out --within-samples")
    usable = samples.present(features.modality)[owners]
    pairs = Pairs({}, {})
    total = int(usable.sum())
    done = 0
    for split in ordered_splits(samples.splits):
        rows = np.flatnonzero(usable & (samples.splits[owners] == split))
        x = torch.from_numpy(features.rows()[rows]).to(resolve_device(device))
        report = partial(_report, on_rows, done, total)
        if within_samples:
            chosen, cosines = _of_one_sample(x, owners[rows], threshold, report)
        else:
            ends, near = _candidates(x, torch.from_numpy(same[rows]), threshold, report)
            chosen, cosines = _match(ends, near, owners[rows])
        done += len(rows)
        if len(chosen):
            pairs.rows[split], pairs.cosines[split] = rows[chosen], cosines
    return pairs


def _report(on_rows: OnRows, before: int, total: int, done: int) -> None:
    on_rows(before + done, total)


@torch.inference_mode()
def _candidates(
    x: torch.Tensor, same: torch.Tensor, threshold: float, on_rows: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs (P, 2) of rows i < j of x (n, D), and their cosines (P,), by exact search of each row's nearest."""
    same = same.to(x.device)
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(x), BLOCK):
        queries = F.normalize(x[start : start + BLOCK].float(), dim=1, eps=TINY_NORM)
        values = torch.full((len(queries), 0), -torch.inf, device=x.device)
        places = torch.empty((len(queries), 0), dtype=torch.int64, device=x.device)
        for other in range(0, len(x), BLOCK):
            keys = F.normalize(x[other : other + BLOCK].float(), dim=1, eps=TINY_NORM)
            scores = queries @ keys.T  # (b, b')
            scores.masked_fill_(same[start : start + BLOCK, None] == same[other : other + BLOCK], -torch.inf)
            top = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
            values, places = torch.cat([values, top.values], 1), torch.cat([places, top.indices + other], 1)
            values, order = values.topk(min(CANDIDATES, values.shape[1]), dim=1)
            places = places.gather(1, order)
        near = values >= threshold
        first = (torch.arange(len(queries), device=x.device) + start)[:, None].expand_as(places)
        both = torch.stack([first[near], places[near]], dim=1).sort(dim=1).values  # (p, 2)
        blocks.append((both.cpu().numpy(), values[near].cpu().numpy()))
        on_rows(min(start + BLOCK, len(x)))
    if not blocks:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    ends, cosines = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    kept = np.unique(ends, axis=0, return_index=True)[1]
    return ends[kept], cosines[kept]


@torch.inference_mode()
def _of_one_sample(
    x: torch.Tensor, owners: np.ndarray, threshold: float, on_rows: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return every two rows of x (n, D) with the same owner, nearest first: pairs (P, 2) and cosines (P,).

    The rows of an owner follow one another.
    """
    unit = F.normalize(x.float(), dim=1, eps=TINY_NORM)
    blocks = [(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))]
    for step in range(1, np.unique(owners, return_counts=True)[1].max(initial=1)):
        first = np.flatnonzero(owners[:-step] == owners[step:])
        for start in range(0, len(first), BLOCK):
            i = first[start : start + BLOCK]
            cosines = (unit[i] * unit[i + step]).sum(1).cpu().numpy()
            near = cosines >= threshold
            blocks.append((np.stack([i, i + step], axis=1)[near], cosines[near]))
    on_rows(len(x))
    ends, cosines = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    order = np.lexsort((ends[:, 1], ends[:, 0], -cosines))
    return ends[order], cosines[order]


def _match(ends: np.ndarray, cosines: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs, nearest first, without those that repeat a sample; ``owners`` (n,) are the rows' samples."""
    owners = np.unique(owners, return_inverse=True)[1]
    free = np.ones(owners.max(initial=-1) + 1, bool)
    chosen = []
    for place in np.lexsort((ends[:, 1], ends[:, 0], -cosines)).tolist():
        i, j = owners[ends[place]]
        if free[i] and free[j]:
            free[i] = free[j] = False
            chosen.append(place)
    return ends[chosen], cosines[chosen]


def write_pairs(pairs: Pairs, dataset: Dataset, folder: Path, source: str) -> Path:
    """Write pairs as a new dataset, one manifest and one file per split, and return the manifest's path.

    Each pair is a sample with two texts. Raises DataError if there are no pairs.
    """
    if not len(pairs):
        raise DataError("no two texts are near enough; use a lower --threshold")
    texts = dataset.modalities["text"]
    flat = [(dataset.ids[owner], text) for owner, text in zip(texts.owners(), texts.feature_sources(), strict=True)]
    make_folder(folder)
    name = re.sub(r"^[^a-z0-9]+", "", slug(folder.name).lower())[:64] or "pairs"
    files = {split: f"{slug(split)}.jsonl" for split in pairs.rows}
    if len(set(files.values())) < len(files):
        files = {split: f"{i}-{file}" for i, (split, file) in enumerate(files.items())}
    for split, rows in pairs.rows.items():
        lines = []
        for (i, j), cosine in zip(rows.tolist(), pairs.cosines[split].tolist(), strict=True):
            (a, first), (b, second) = flat[i], flat[j]
            about = {"id": f"{i}-{j}", "texts": [first, second], "from": [a, b], "cosine": round(cosine, 4)}
            lines.append(json.dumps(about, ensure_ascii=False))
        write_atomically(folder / files[split], ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    listed = ", ".join(f"{_toml(split)} = {_toml(file)}" for split, file in files.items())
    manifest = (
        f"name = {_toml(name)}\n"
        f"title = {_toml(f'{len(pairs):,} pairs of texts of {dataset.name}, by {source}')}\n"
        f'task = "retrieval"\n\n[reader]\nkind = "table"\nfiles = {{ {listed} }}\nid = "id"\ntext = "texts"\n'
    )
    path = folder / f"{name}.toml"
    write_atomically(path, manifest.encode("utf-8", "replace"))
    return path


def _toml(text: str) -> str:
    """Return a TOML string: a JSON string, with DEL escaped, which TOML does not allow."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
