"""The classifier inside scikit-learn's own machinery: cross-validation, searches, pipelines."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from cachefuse import FusionClassifier
from fixtures.messages import naming

KINDS = np.array(["cat", "dog", "emu"])


QUICK = {"head": "linear", "optimizer": "lbfgs", "epochs": 2}  # trains in hundredths of a second


def test_cross_val_score_is_a_loop_over_views(view, arrays, labels):
    cv = KFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(FusionClassifier(**QUICK), view, labels, cv=cv, error_score="raise")
    expected = []
    for train, test in cv.split(labels):
        fitted = FusionClassifier(**QUICK).fit({m: x[train] for m, x in arrays.items()}, labels[train])
        expected.append(fitted.score({m: x[test] for m, x in arrays.items()}, labels[test]))
    assert scores.tolist() == expected
    assert scores.mean() > 0.6


@pytest.mark.slow
def test_in_other_processes(view, labels):
    settings = {"cv": 2, "error_score": "raise"}
    alone = cross_val_score(FusionClassifier(**QUICK), view, labels, **settings)
    assert cross_val_score(FusionClassifier(**QUICK), view, labels, n_jobs=2, **settings).tolist() == alone.tolist()


@pytest.mark.parametrize("scoring", ["f1_micro", "f1_macro", "average_precision", "roc_auc", "accuracy"])
@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.one_in(4)
def test_multi_label_scorers(view, indicator, scoring, n_labels):
    y = indicator[:, :n_labels]
    scores = cross_val_score(FusionClassifier(**QUICK), view, y, cv=3, scoring=scoring, error_score="raise")
    assert scores.min() > 0.5


@pytest.mark.parametrize("scoring", ["roc_auc_ovr", "neg_log_loss", "f1_macro", "top_k_accuracy"])
@pytest.mark.one_in(2)
def test_multi_class_scorers(view, labels, scoring):
    scores = cross_val_score(FusionClassifier(**QUICK), view, labels, cv=3, scoring=scoring, error_score="raise")
    assert np.isfinite(scores).all()


def test_a_binary_task(view, indicator):
    y = np.where(indicator[:, 0], "yes", "no")
    assert cross_val_score(FusionClassifier(**QUICK), view, y, scoring="roc_auc", error_score="raise").mean() > 0.8


def test_out_of_fold_scores(view, indicator, labels):
    settings = {"cv": 3, "method": "predict_proba"}
    scores = cross_val_predict(FusionClassifier(**QUICK), view, indicator, **settings)
    assert f1_score(indicator, scores > 0.5, average="micro") > 0.7
    scores = cross_val_predict(FusionClassifier(**QUICK), view, labels, **settings)
    assert (KINDS[scores.argmax(axis=1)] == labels).mean() > 0.6


def test_grid_search(view, indicator):
    grid = {"fusion": ["image", "sum"], "weight_decay": [0.0, 0.1]}
    search = GridSearchCV(FusionClassifier(**QUICK), grid, scoring="f1_micro", cv=2, error_score="raise")
    search.fit(view, indicator)
    assert search.best_params_["fusion"] == "sum"
    assert np.array_equal(search.predict(view[:7]), search.best_estimator_.predict(view[:7]))
    assert search.n_features_in_ == 11


def test_ends_a_pipeline(view, arrays, indicator):
    plain = FusionClassifier(**QUICK).fit(view, indicator).predict_proba(view)
    pipeline = make_pipeline(FunctionTransformer(), FusionClassifier(**QUICK))
    assert np.array_equal(pipeline.fit(view, indicator).predict_proba(view), plain)
    normed = make_pipeline(FunctionTransformer(without_text), FusionClassifier(**QUICK)).fit(view, indicator)
    alone = FusionClassifier(**QUICK).fit({"image": arrays["image"]}, indicator)
    assert np.array_equal(normed.predict(view), alone.predict({"image": arrays["image"]}))


def test_a_view_is_what_any_estimator_takes_for_the_concatenation(view, arrays, labels):
    x = np.concatenate(list(arrays.values()), axis=1)
    model = LogisticRegression()
    assert cross_val_score(model, view, labels).tolist() == cross_val_score(model, x, labels).tolist()


def test_a_plain_dictionary_can_not_be_cut_into_rows(arrays, labels):
    with pytest.raises(ValueError, match=naming("2 60")):
        cross_val_score(FusionClassifier(**QUICK), arrays, labels)


def without_text(x):
    return {"image": x["image"]}
