"""Simple pipelines in scikit-learn, for `cachefuse bench quality`: each learns from a fold's training rows alone.

A pipeline is a function from a ``Fold`` to scores (n, C) of its held-out rows. ``PIPELINES`` names them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_union
from sklearn.svm import SVC

NEIGHBOURS = 20
MLP_SEEDS = 5


@dataclass(frozen=True)
class Inputs:
    """The inputs of n rows: texts, "" for none, and features (n, D) float32; None if the dataset has none."""

    texts: Sequence[str] | None
    features: np.ndarray | None

    def __len__(self) -> int:
        return next((len(x) for x in (self.texts, self.features) if x is not None), 0)

    def take(self, rows: np.ndarray) -> "Inputs":
        """Return the inputs of rows (m,)."""
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        return Inputs(texts, None if self.features is None else self.features[rows])


@dataclass(frozen=True)
class Fold:
    """The inputs of training rows, their ``targets`` (m, C) bool, and the inputs of the rows held out.

    ``one_label`` says whether each row has one label. In ``targets`` each class has rows with it and rows without it.
    """

    train: Inputs
    targets: np.ndarray
    held_out: Inputs
    one_label: bool = False
    seed: int = 0

    @cached_property
    def tfidf(self) -> tuple[Any, Any]:
        """TF-IDF of words, pairs of words, and 3 to 5 letters: matrices of the training rows and the rows held out."""
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
        union = make_union(words, letters).fit(self.train.texts)
        return union.transform(self.train.texts), union.transform(self.held_out.texts)

    @property
    def features(self) -> tuple[Any, Any]:
        """The features of the training rows and of the rows held out."""
        return self.train.features, self.held_out.features


def tfidf_lr(fold: Fold) -> np.ndarray:
    """Logistic regression of each class on TF-IDF, C=10."""
    return _logistic_regression(fold, *fold.tfidf, c=10)


def lr_features(fold: Fold) -> np.ndarray:
    """Logistic regression of each class on the features, C=3."""
    return _logistic_regression(fold, *fold.features, c=3)


def lr_both(fold: Fold) -> np.ndarray:
    """Logistic regression of each class on TF-IDF beside the features, C=3."""
    train, held_out = (
        sp.hstack([words, sp.csr_matrix(x)]).tocsr() for words, x in zip(fold.tfidf, fold.features, strict=True)
    )
    return _logistic_regression(fold, train, held_out, c=3)


def mean_of_three(fold: Fold) -> np.ndarray:
    """The mean of the three logistic regressions."""
    scores: np.ndarray = np.mean([tfidf_lr(fold), lr_features(fold), lr_both(fold)], axis=0)
    return scores


def mlps(fold: Fold) -> np.ndarray:
    """The mean of five MLPs with one hidden layer of 256 on the features, 20 epochs at a rate of 0.01."""
    x, held_out = fold.features
    alone = fold.targets.shape[1] == 1
    targets = fold.targets.argmax(axis=1) if fold.one_label else fold.targets[:, 0] if alone else fold.targets
    scores = []
    for i in range(MLP_SEEDS):
        mlp = MLPClassifier((256,), learning_rate_init=0.01, max_iter=20, random_state=(fold.seed + i) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is fixed on purpose
            scores.append(mlp.fit(x, targets).predict_proba(held_out))
    mean: np.ndarray = np.mean(scores, axis=0)
    return mean[:, 1:] if alone else mean


def knn(fold: Fold) -> np.ndarray:
    """The share of each class among the 20 nearest rows by the features' cosine, weighted by 1 / distance."""
    x, held_out = fold.features
    nearest = KNeighborsRegressor(min(NEIGHBOURS, len(x)), weights="distance", metric="cosine")
    scores: np.ndarray = nearest.fit(x, fold.targets.astype(float)).predict(held_out)
    return scores


def svc_rbf(fold: Fold) -> np.ndarray:
    """A support vector machine of each class on the features, RBF kernel, C=1; scores are its squashed margins."""
    x, held_out = fold.features
    margins = [SVC().fit(x, targets).decision_function(held_out) for targets in fold.targets.T]
    scores: np.ndarray = expit(np.stack(margins, axis=1))
    return scores


def _logistic_regression(fold: Fold, x: Any, held_out: Any, c: float) -> np.ndarray:
    """Fit a logistic regression to each class, and return the probabilities (n, C) of the rows held out."""
    models = (LogisticRegression(C=c, solver="liblinear").fit(x, targets) for targets in fold.targets.T)
    return np.stack([model.predict_proba(held_out)[:, 1] for model in models], axis=1)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's function, and whether it reads texts and features."""

    function: Callable[[Fold], np.ndarray]
    texts: bool
    features: bool

    def scores(self, fold: Fold) -> np.ndarray:
        """Return scores (n, C) of the rows held out; a class that all or no training rows have gets 1 or 0."""
        share = fold.targets.mean(axis=0)
        varied = (share > 0) & (share < 1)
        scores = np.tile(share, (len(fold.held_out), 1))
        if varied.any():
            scores[:, varied] = self.function(replace(fold, targets=fold.targets[:, varied]))
        return scores


PIPELINES = {
    "tfidf+lr": Pipeline(tfidf_lr, texts=True, features=False),
    "lr features": Pipeline(lr_features, texts=False, features=True),
    "lr both": Pipeline(lr_both, texts=True, features=True),
    "mean of three": Pipeline(mean_of_three, texts=True, features=True),
    "mlp x5": Pipeline(mlps, texts=False, features=True),
    "knn": Pipeline(knn, texts=False, features=True),
    "svc rbf": Pipeline(svc_rbf, texts=False, features=True),
}
