"""Words and n-grams of characters, hashed and counted: a sparse encoder of texts without weights or a dictionary."""

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from cachefuse.encoders.base import EncoderSpec, Features, Tower
from cachefuse.encoders.pieces import pieces
from cachefuse.errors import EncoderError
from cachefuse.feature_spec import NGRAMS

BLOCK_BITS = 20  # a block has 2**20 columns
BLOCKS = 2  # of words, then of characters
COLUMN_BITS = BLOCK_BITS + BLOCKS.bit_length() - 1
SIZES = (3, 4, 5)  # characters of an n-gram within a word; at least 3, as the space before and after a word counts
TOGETHER = 1 << 18  # characters of texts whose n-grams are in memory at a time
HASHING = "1"  # the version: another one gives an n-gram another column

SEPARATOR, SPACE, IN_WORD, ALONE, UNKNOWN = range(5)  # kinds of code points
PRESENTATION = ("\ufe0e", "\ufe0f")  # they choose between the text and the emoji form of one symbol
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash; odd


class LexicalTextTower(Tower):
    """Counts of hashed n-grams: words and pairs of neighbouring words, and 3 to 5 characters within words.

    Texts are normalised to NFKC and lower case, so that full-width letters are like others. A word is a run of letters,
    digits, marks and "_". A wide letter (Han, kana, Hangul) is a word of its own, and so is each symbol, such as an
    emoji. N-grams of characters are those of words between white space with a space on both sides, punctuation
    included, as scikit-learn's ``char_wb``. Words and their pairs have the columns below 2**20, characters those from
    there to 2**21.
    """

    modality = "text"
    views = (NGRAMS,)
    width = 0
    vocabulary = BLOCKS << BLOCK_BITS
    by_length = True

    def __init__(self) -> None:
        self._kinds = np.full(0x110000, UNKNOWN, np.uint8)  # of each code point, once it was met

    @property
    def provenance(self) -> Mapping[str, str]:
        return {
            "family": "lexical",
            "architecture": f"word 1-2 and char_wb {SIZES[0]}-{SIZES[-1]} n-grams, 2**{BLOCK_BITS} columns each",
            "hashing": HASHING,
            "unicode": unicodedata.unidata_version,
        }

    def prepare(self, sample: str) -> str:
        """Return a text in its normal form."""
        if not sample.isascii():
            for selector in PRESENTATION:
                sample = sample.replace(selector, "")
            sample = unicodedata.normalize("NFKC", sample)
        return sample.lower()

    def length(self, prepared: str) -> int:
        return len(prepared)

    def encode(self, batch: Sequence[str], views: Collection[str]) -> Features:
        """Return ``ngrams``: of each text (T_i, 2) int32, columns in ascending order and their counts."""
        return {NGRAMS: [row for texts in pieces(batch, TOGETHER) for row in self._count(texts)]}

    def _count(self, texts: Sequence[str]) -> list[np.ndarray]:
        codes = np.frombuffer(f" {' '.join(texts)} ".encode("utf-32-le", "surrogatepass"), "<u4")
        lengths = np.array([len(text) + 1 for text in texts])  # with the space behind it
        rows = np.repeat(np.arange(len(texts) + 1), [1, *lengths]) - 1  # (n,): the text of each character
        kinds = self._kinds_of(codes)
        keys = np.concatenate([_words(codes, kinds, rows), *_characters(codes, kinds, rows)])
        keys, counts = np.unique(keys, return_counts=True)
        ngrams = np.stack([keys & ((1 << COLUMN_BITS) - 1), counts], axis=1).astype(np.int32)  # (sum T_i, 2)
        return np.split(ngrams, np.searchsorted(keys, np.arange(1, len(texts)) << COLUMN_BITS))

    def _kinds_of(self, codes: np.ndarray) -> np.ndarray:
        new = codes[self._kinds[codes] == UNKNOWN]
        for code in np.unique(new).tolist():
            self._kinds[code] = _kind(chr(code))
        kinds: np.ndarray = self._kinds[codes]
        return kinds


def _kind(character: str) -> int:
    category = unicodedata.category(character)[0]
    if character.isspace():
        return SPACE
    is_wide = category in "LN" and unicodedata.east_asian_width(character) == "W"
    if is_wide or category == "S":
        return ALONE
    return IN_WORD if category in "LNM" or character == "_" else SEPARATOR


def _words(codes: np.ndarray, kinds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the keys of all words and all pairs of neighbouring words of a text."""
    in_word = kinds == IN_WORD
    starts = kinds == ALONE
    starts[1:] |= in_word[1:] & ~in_word[:-1]  # the first character is a space
    inside = np.flatnonzero(starts | in_word)
    if not len(inside):
        return np.empty(0, np.int64)
    first = np.flatnonzero(starts[inside])  # (W,): where each word begins in ``inside``
    sizes = np.diff(first, append=len(inside))
    place = np.arange(len(inside)) - np.repeat(first, sizes)
    letters = _mix(codes[inside].astype(np.uint64)) * _powers(int(sizes.max()))[place]
    words = _mix(np.add.reduceat(letters, first))  # (W,)
    rows = rows[inside[first]]
    pairs, same = _mix(words[:-1] * BASE + words[1:]), rows[1:] == rows[:-1]
    return np.concatenate([_keys(rows, words, 0), _keys(rows[1:][same], pairs[same], 0)])


def _characters(codes: np.ndarray, kinds: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the keys of the n-grams of characters of each size."""
    spaces = kinds == SPACE
    kept = np.flatnonzero(~spaces | ~np.concatenate([[False], spaces[:-1]]))  # of several spaces the first
    spaces, rows = spaces[kept], rows[kept]
    values = _mix(np.where(spaces, ord(" "), codes[kept]).astype(np.uint64))
    hashes = values[:-1] + values[1:] * BASE  # of pairs; each longer n-gram adds a character
    valid = np.ones(len(hashes), bool)
    for size, power in zip(SIZES, _powers(SIZES[-1])[1:], strict=False):
        hashes = hashes[:-1] + values[size - 1 :] * power
        valid = valid[:-1] & ~spaces[size - 2 : -1]  # a space is only the first or the last
        places = np.flatnonzero(valid)
        yield _keys(rows[places + 1], _mix(hashes[places] + np.uint64(size)), 1)


def _keys(rows: np.ndarray, hashes: np.ndarray, block: int) -> np.ndarray:
    """Return row and column as one number, int64."""
    columns = (hashes >> np.uint64(64 - BLOCK_BITS)).astype(np.int64) + (block << BLOCK_BITS)
    return (rows << COLUMN_BITS) + columns


def _powers(n: int) -> np.ndarray:
    """Return the powers 1 to n of the base."""
    return np.cumprod(np.full(n, BASE))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return well-mixed 64-bit hashes of numbers: SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + BASE
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def open_lexical(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``lexical``, which runs on the CPU. Raises EncoderError for a model name."""
    if spec.model or spec.weights:
        raise EncoderError(f"lexical has no models or weights; write 'lexical', not {str(spec)!r}")
    return {"text": LexicalTextTower()}
