"""From the token vectors of texts, padded at the end, to one vector a text."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# (hidden (B, T, D), counted (B, T) bool) -> (B, D). Tokens that do not count are padding, or an excluded prompt.
Pool = Callable[[Tensor, Tensor], Tensor]


def first(hidden: Tensor, counted: Tensor) -> Tensor:
    """Take the first token that counts."""
    return _take(hidden, counted.int().argmax(1))


def last(hidden: Tensor, counted: Tensor) -> Tensor:
    """Take the last token that counts."""
    return _take(hidden, counted.shape[1] - 1 - counted.int().flip(1).argmax(1))


def mean(hidden: Tensor, counted: Tensor) -> Tensor:
    """Average the tokens that count."""
    return _sum(hidden, counted) / _number(counted)


def mean_sqrt_len(hidden: Tensor, counted: Tensor) -> Tensor:
    """Divide the sum of the tokens that count by the square root of their number."""
    return _sum(hidden, counted) / _number(counted).sqrt()


def weighted_mean(hidden: Tensor, counted: Tensor) -> Tensor:
    """Average the tokens that count, weighted by their position in the text, from 1 (SGPT, equation 2)."""
    weights = counted * torch.arange(1, counted.shape[1] + 1, device=counted.device)  # (B, T)
    return _sum(hidden, weights) / weights.sum(1, keepdim=True).clamp(min=1)


def highest(hidden: Tensor, counted: Tensor) -> Tensor:
    """Take the highest value of each feature over the tokens that count."""
    return hidden.masked_fill(~counted.unsqueeze(-1), -torch.inf).amax(1)


# By sentence-transformers' names, in the order in which it concatenates them.
POOLINGS: Mapping[str, Pool] = {
    "cls": first,
    "max": highest,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


def _take(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]


def _sum(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden.float() * weights.unsqueeze(-1)).sum(1)


def _number(counted: Tensor) -> Tensor:
    return counted.sum(1, keepdim=True).clamp(min=1)
