"""TF-IDF of n-grams against scikit-learn's."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from torch.nn.utils.rnn import pad_sequence

from cachefuse.nn.tfidf import TfIdf

VOCABULARY = 64  # words below 32, characters from there on


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return rng.poisson(0.3, size=(30, VOCABULARY))


def ngrams(counts):
    """The rows as n-grams (B, T, 2), with a mask (B, T)."""
    rows = [torch.from_numpy(np.stack([np.flatnonzero(row), row[row > 0]], axis=1)) for row in counts]
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def reference(train, rows):
    """Each block of scikit-learn's, with length 1 / sqrt(2); columns of fewer than two training rows are of one."""
    df = (train > 0).sum(0)
    idf = np.log((1 + len(train)) / (1 + np.maximum(df, 1))) + 1
    fitted = TfidfTransformer(sublinear_tf=True, norm=None).fit(csr_array(train))
    np.testing.assert_allclose(fitted.idf_[df >= 1], idf[df >= 1])
    x = np.where(rows > 0, 1 + np.log(np.maximum(rows, 1)), 0) * idf
    blocks = [normalize(block) / np.sqrt(2) for block in np.split(x, 2, axis=1)]
    return np.hstack(blocks)[:, df >= 2]


def test_weights_are_those_of_scikit_learn(counts):
    train, new = counts[:20], counts[20:]
    tfidf = TfIdf(VOCABULARY).fit([ngrams(train[:7]), ngrams(train[7:])])
    for rows in (train, new):
        x = tfidf.matrix([ngrams(rows[:4]), ngrams(rows[4:])])
        np.testing.assert_allclose(x.toarray(), reference(train, rows), atol=1e-6)
    assert tfidf.columns.tolist() == np.flatnonzero((train > 0).sum(0) >= 2).tolist()


def test_padding_and_rows_without_ngrams_weigh_nothing(counts):
    counts[3] = 0
    tfidf = TfIdf(VOCABULARY).fit([ngrams(counts)])
    x, mask = ngrams(counts[:5])
    place, weight = tfidf(torch.nn.functional.pad(x, (0, 0, 0, 4), value=1), torch.nn.functional.pad(mask, (0, 4)))
    assert not weight[3].any()
    assert not weight[:, x.shape[1] :].any()
    torch.testing.assert_close(weight[:, : x.shape[1]], tfidf(x, mask)[1])
    assert (place < len(tfidf.columns)).all()


def test_absent_rows_do_not_count(counts):
    x, mask = ngrams(counts)
    mask[:10] = False
    absent, fewer = TfIdf(VOCABULARY).fit([(x, mask)]), TfIdf(VOCABULARY).fit([ngrams(counts[10:])])
    assert torch.equal(absent.columns, fewer.columns)
    torch.testing.assert_close(absent.idf, fewer.idf)


def test_without_any_known_column(counts):
    tfidf = TfIdf(VOCABULARY)
    place, weight = tfidf(*ngrams(counts))
    assert not weight.any()
    assert not place.any()
