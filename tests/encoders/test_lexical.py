"""The columns and counts of n-grams, against scikit-learn's n-grams hashed one by one."""

import random
import re
import tracemalloc
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.messages import naming

TEXTS = {
    "ascii": "The quick brown fox jumps over the lazy dog. The dog_s 2 bones: the quick ones!",
    "german": "Überschwemmung in Köln -- STRASSE gesperrt, straße frei; Maß",
    "japanese": "東京で地震がありました。ｶﾞｿﾘﾝ ガソリン 二〇二四年",
    "korean": "서울 지진",
    "arabic": "فيضان في القاهرة، الآن مُحَمَّد",
    "hindi": "भूकंप दिल्ली में",
    "emoji": "help 👍🏽👩‍👩‍👧 ❤️❤ now 🇩🇪 1️⃣ 😀😀😀",
    "tags": "#quake #Erdbeben @user https://t.co/aB3?x=1&y=2 c++ $5 a=b",
    "short": "a bb ccc dddd e f . ! _ é",
    "full width": "\uff28\uff25\uff2c\uff30\u3000\uff4d\uff45\u3000\uff11\uff12\uff13",
    "spaces": " \t\n\u3000 ",
    "punctuation": "... --- !!!",
    "one letter": "x",
    "ends in spaces": "  two  words\n\n",
    "surrogates": "half \ud83d a pair \udc4d",
    "many of one": "ha " * 300,
}
MASK = 2**64 - 1
BASE = 0x9E3779B97F4A7C15


def mix(x):
    x = (x + BASE) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift)) * factor & MASK
    return x


def polynomial(text):
    return sum(mix(ord(character)) * BASE**i for i, character in enumerate(text)) & MASK


def column(ngram):
    """The column of an n-gram: characters, or one word or two in a tuple."""
    kind, value = ngram
    if kind == "chars":
        return (1 << 20) + (mix((polynomial(value) + len(value)) & MASK) >> 44)
    words = [mix(polynomial(word) * BASE & MASK) for word in value]
    return (words[0] if len(words) == 1 else mix((words[0] * BASE + words[1]) & MASK)) >> 44


def is_alone(character):
    category = unicodedata.category(character)
    wide = unicodedata.east_asian_width(character) == "W"
    return category[0] == "S" or (wide and category[0] in "LN")


def words_of(text):
    """The words of a text: runs of letters, digits, marks and "_"; each wide letter and each symbol alone."""
    marked = "".join(
        f"\0{c}\0" if is_alone(c) else c if c == "_" or unicodedata.category(c)[0] in "LNM" else "\0" for c in text
    )
    return re.findall(r"[^\0]+", marked)


def ngrams_of(text):
    """The n-grams of a text by scikit-learn, each with its count."""
    text = unicodedata.normalize("NFKC", re.sub("[\ufe0e\ufe0f]", "", text)).lower()
    characters = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), lowercase=False).build_analyzer()(text)
    words = words_of(text)
    return Counter(
        [("chars", ngram) for ngram in characters]
        + [("words", (word,)) for word in words]
        + [("words", pair) for pair in pairwise(words)]
    )


def expected(text):
    counts = Counter()
    for ngram, n in ngrams_of(text).items():
        counts[column(ngram)] += n
    return np.array(sorted(counts.items()), np.int32).reshape(-1, 2)


@pytest.fixture
def peak_memory():
    """A function that calls another one and returns the peak of its memory in bytes."""

    def measure(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


@pytest.fixture(scope="module")
def tower():
    return open_encoder("lexical")["text"]


def encode(tower, texts):
    return tower.encode([tower.prepare(text) for text in texts], tower.views)["ngrams"]


@pytest.mark.parametrize("name", TEXTS)
def test_ngrams_are_those_of_scikit_learn(tower, name):
    (row,) = encode(tower, [TEXTS[name]])
    assert (row.dtype, row.shape[1]) == (np.int32, 2)
    np.testing.assert_array_equal(row, expected(TEXTS[name]))


def test_a_text_has_the_same_ngrams_in_any_batch(tower, monkeypatch):
    together = encode(tower, TEXTS.values())
    monkeypatch.setattr("cachefuse.encoders.lexical.TOGETHER", 50)
    for one, text, other in zip(together, TEXTS.values(), encode(tower, TEXTS.values()), strict=True):
        np.testing.assert_array_equal(one, encode(tower, [text])[0])
        np.testing.assert_array_equal(one, other)
    assert encode(tower, []) == []


def test_columns_are_fixed(tower):
    """A store is read on other machines and by later versions: these numbers may only change with the provenance."""
    (row,) = encode(tower, ["ab é"])
    assert row.T.tolist() == [[11207, 554307, 822303, 1061551, 1349324, 1534586, 1654667], [1] * 7]


def test_texts_without_words_have_few_or_no_ngrams(tower):
    spaces, punctuation = encode(tower, [TEXTS["spaces"], TEXTS["punctuation"]])
    assert spaces.shape == (0, 2)
    assert (punctuation[:, 0] >= 2**20).all()
    assert len(punctuation) > 0


def test_other_forms_of_the_same_letters_are_alike(tower):
    pairs = (
        ("\uff28\uff25\uff2c\uff30", "help"),
        ("cafe\u0301", "CAFÉ"),
        ("❤️ you", "❤ you"),
        ("ﬁre", "fire"),
        ("ｶﾞ", "ガ"),
    )
    for one, other in pairs:
        np.testing.assert_array_equal(*encode(tower, [one, other]))


def test_words_in_other_orders_share_words_but_not_pairs(tower):
    one, other = (
        {n for n in row[:, 0].tolist() if n < 2**20} for row in encode(tower, ["fire near us", "us near fire"])
    )
    assert len(one) == len(other) == 5
    assert len(one & other) == 3


def test_collisions_are_as_many_as_by_chance(tower):
    """n different n-grams in m columns fill m(1 - exp(-n/m)) of them, with a deviation below sqrt(n)."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzäöüßあいう火災"
    texts = [" ".join("".join(generator.choices(letters, k=6)) for _ in range(40)) for _ in range(500)]
    different = set().union(*(ngrams_of(text) for text in texts))
    columns = np.unique(np.concatenate(encode(tower, texts))[:, 0])
    m = 2**20
    for kind, filled in (("words", columns < m), ("chars", columns >= m)):
        n = sum(ngram[0] == kind for ngram in different)
        assert n > 50_000
        assert abs(filled.sum() - m * (1 - np.exp(-n / m))) < 4 * np.sqrt(n * n / (2 * m))


def test_columns_are_spread_evenly(tower):
    texts = [f"{i} {i:b}" for i in range(20_000)]
    columns = np.unique(np.concatenate(encode(tower, texts))[:, 0])
    for block in (columns[columns < 2**20], columns[columns >= 2**20] - 2**20):
        counts = np.bincount(block >> 16, minlength=16)
        assert counts.min() > 0.9 * counts.mean()
        assert counts.max() < 1.1 * counts.mean()


def test_a_text_of_a_mebibyte_takes_little_memory(tower, peak_memory):
    text = " ".join(f"word{i}" for i in range(110_000))
    assert len(text) > 2**20 - 2**16
    assert peak_memory(lambda: encode(tower, [text])) < 256 << 20


def test_many_long_texts_take_no_more_memory_than_one(tower, peak_memory):
    texts = ["flood " * 20_000] * 20
    assert peak_memory(lambda: encode(tower, texts)) < 128 << 20


def test_the_provenance_names_the_hashing_and_unicode(tower):
    assert tower.provenance["family"] == "lexical"
    assert tower.provenance["hashing"] == "1"
    assert tower.provenance["unicode"] == unicodedata.unidata_version


def test_lexical_has_no_models():
    with pytest.raises(EncoderError, match=naming("lexical:large")):
        open_encoder("lexical:large")
