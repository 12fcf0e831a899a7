"""Batches of texts in pieces, so that what is computed from them stays small."""

from collections.abc import Iterator, Sequence


def pieces(batch: Sequence[str], characters: int) -> Iterator[Sequence[str]]:
    """Yield texts of at most so many ``characters`` at a time, or a longer one alone: each has many n-grams."""
    start, n = 0, 0
    for i, text in enumerate(batch):
        if i > start and n + len(text) > characters:
            yield batch[start:i]
            start, n = i, 0
        n += len(text)
    if len(batch):
        yield batch[start:]
