"""Samples that show at opening whether a tower is whole: a dozen words, and a dozen pictures."""

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, product

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

N_PROBES = 12
WORDS = ("water", "music", "house", "green", "table", "horse", "seven", "night", "bread", "river", "white", "smile")
LENGTHS = (1, 17, 60)  # of texts, in words, that are encoded alone and together


@cache
def pictures() -> tuple[Image.Image, ...]:
    """Return pictures of noise around different colours, of one size that no model has."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-60, 60, (N_PROBES, 48, 64, 3))
    colours = rng.integers(60, 196, (N_PROBES, 1, 1, 3))
    return tuple(Image.fromarray(pixels) for pixels in (colours + noise).astype(np.uint8))


def texts(tokenizer: object) -> Iterator[str]:
    """Yield common words, then texts of a tokenizer's own words if it is, or wraps, one of transformers."""
    wrapped = getattr(tokenizer, "tokenizer", None)  # of open_clip's wrapper
    own = next((one for one in (tokenizer, wrapped) if isinstance(one, PreTrainedTokenizerBase)), None)
    return chain(WORDS, islice(_own_texts(own), 1000) if own is not None else ())


def _own_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield texts of the tokenizer's own words: each word, then two, then three. CANINE's million cost seconds."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    words = [word for i in ids[:: max(1, len(ids) // 100)] if (word := str(tokenizer.decode([i])).strip())]
    for n in (1, 2, 3, 4):
        yield from map(" ".join, product(words, repeat=n))
