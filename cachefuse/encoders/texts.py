"""The common code of text towers: texts that are longer than the limit are cut, or read in windows."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cachefuse.encoders.base import EncoderSpec, Features
from cachefuse.encoders.frozen import FrozenTower
from cachefuse.encoders.probe import LENGTHS, N_PROBES, texts
from cachefuse.errors import BadSampleError, EncoderError

Ids = list[int]
WINDOWS_PER_BATCH = 32
NO_LIMIT = 1_000_000_000  # tokens, more than any text has
FAILED = (RuntimeError, ValueError, IndexError)  # what models raise for texts that are too short or too long for them


class Text(NamedTuple):
    """A prepared text: its windows, each of at most the tower's limit of tokens, and the tokens of the whole text.

    If long texts are cut, the first window is the only one. Special tokens count.
    """

    windows: tuple[Ids, ...]
    n_tokens: int


class TextTower(FrozenTower):
    """A tower of texts. ``max_tokens`` is its limit; of longer texts, the spec's option ``long_texts`` decides.

    ``cut``: the features are those of the first window. ``windows``: the pooled features are the mean over the windows
    of the whole text, weighted by their tokens; there are no tokens and ids.
    """

    tokenizer: Any
    ragged = True
    by_length = True
    options: tuple[str, ...] = ("max_tokens", "long_texts")

    def __init__(
        self,
        spec: EncoderSpec,
        model: nn.Module,
        device: str,
        provenance: Mapping[str, str],
        limits: tuple[int, int],
    ):
        """``limits`` are the model's usual and greatest number of tokens.

        Raises EncoderError if the spec's ``max_tokens`` is above the greatest.
        """
        usual, greatest = limits
        self.max_tokens = int(spec.option("max_tokens") or usual)
        if not self.n_special() < self.max_tokens <= greatest:
            raise EncoderError(
                f"cannot open {spec}: max_tokens counts special tokens, and must be between {self.n_special() + 1} and "
                f"{greatest:,}"
            )
        self._tried = NO_LIMIT  # the longest text that was tried alone and beside others; the probe sets it
        self._repeated = 0  # the longest text that was encoded twice
        self.windows = spec.option("long_texts") == "windows"
        facts = {**provenance, "max_length": str(self.max_tokens)}
        if self.windows:
            facts["long_texts"] = "windows"
            self.views = ("pooled",)
        super().__init__("text", model, device, facts)

    @abstractmethod
    def split(self, text: str) -> tuple[list[Ids], int]:
        """Return the windows of a text, each with special tokens, and the tokens of the whole text.

        The windows after the first may be left out if ``windows`` is False.
        """

    @abstractmethod
    def n_special(self) -> int:
        """Return the number of special tokens in a window."""

    def prepare(self, sample: str) -> Text:
        windows, n_tokens = self.split(sample)
        if not windows or not windows[0]:
            raise BadSampleError("has no tokens")
        return Text(tuple(windows) if self.windows else (windows[0],), n_tokens)

    def probe_samples(self) -> list[str]:
        """Return texts that differ: of common words, else, where the tokenizer has none, of its own."""
        samples: dict[tuple[int, ...], str] = {}
        for text in texts(self.tokenizer):
            try:
                samples.setdefault(tuple(self.prepare(text).windows[0]), text)
            except BadSampleError:
                continue
            if len(samples) == N_PROBES:
                return list(samples.values())
        raise EncoderError(f"{type(self.tokenizer).__name__} gives the same tokens for different texts; is it whole?")

    def length(self, prepared: Text) -> int:
        return max(map(len, prepared.windows))

    def n_tokens(self, prepared: Text) -> int:
        return prepared.n_tokens

    def _find_together(self, samples: Sequence[Text]) -> None:
        """Try texts alone and beside longer ones, then beside others of their length."""
        words = [*self.probe_samples()] * 5
        mixed = [self.prepare(" ".join(words[:n])) for n in LENGTHS]
        equal = [sample for sample in samples if self.length(sample) == self.length(samples[0])]
        self._narrow(mixed, equal[:3])
        self._tried = self.length(mixed[-1])

    def _try(self, n_tokens: int) -> None:
        """Try texts of a length that no batch has had so far, as opening tried shorter ones.

        Models may have chunks, windows or thresholds of any length: Reformer hashes texts longer than its chunk.
        Raises EncoderError if features of such texts are random.
        """
        tried, self._tried = self._tried, NO_LIMIT
        words = self.probe_samples()
        power = 1 << (n_tokens - 1).bit_length()  # so that few lengths are tried
        for n in (min(power, self.max_tokens or power), n_tokens):
            try:
                mixed = [self.prepare(words[0]), self._sample(words, 2 * n // 3), self._sample(words, n)]
                self._narrow(mixed, [self._sample(words, n, first) for first in range(3)])
                break
            except EncoderError as error:
                self._tried = tried
                raise EncoderError(f"{error}, if it is long; texts of up to {tried} tokens are not random") from error
            except FAILED:  # some configurations do not say how many tokens the model reads
                continue
        else:
            self.together, n = "one", n_tokens
        self._tried = self._repeated = n

    def _sample(self, words: Sequence[str], n_tokens: int, first: int = 0) -> Text:
        """Return a text of so many tokens at most, of the words from the first on."""
        ids = self.prepare(" ".join(islice(cycle(words), first, first + n_tokens))).windows[0]
        ids = ids if len(ids) <= n_tokens else [*ids[: n_tokens - 1], ids[-1]]
        return Text((ids,), len(ids))

    def encode(self, batch: Sequence[Text], views: Collection[str]) -> Features:
        longest = max(map(self.length, batch))
        if len(batch) > 1 and longest > self._tried:
            self._try(longest)
        elif longest > max(self._tried, self._repeated):  # a query costs no more than that
            self._check_repeats(*(self._encode(batch, ("pooled",))["pooled"] for _ in range(2)))
            self._repeated = longest
        if all(len(text.windows) == 1 for text in batch):
            return super().encode(batch, views)
        pieces = [(row, Text((window,), len(window))) for row, text in enumerate(batch) for window in text.windows]
        pieces.sort(key=lambda piece: piece[1].n_tokens)
        sums: list[np.ndarray | float] = [0.0] * len(batch)
        for start in range(0, len(pieces), WINDOWS_PER_BATCH):
            rows, windows = zip(*pieces[start : start + WINDOWS_PER_BATCH], strict=True)
            pooled = super().encode(windows, ("pooled",))["pooled"].astype(np.float64)
            for row, window, vector in zip(rows, windows, pooled, strict=True):
                sums[row] += window.n_tokens * vector
        means = [total / sum(map(len, text.windows)) for total, text in zip(sums, batch, strict=True)]
        return {"pooled": np.stack(means).astype(np.float32)}
