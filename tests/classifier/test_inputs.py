"""What the classifier makes of features and targets that are absent, wrong or few."""

import logging

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from cachefuse import FusionClassifier
from cachefuse.data.folds import stratified_folds
from cachefuse.errors import ConfigError, DataError, UnknownNameError
from fixtures.messages import naming

KINDS = np.array(["cat", "dog", "emu"])


QUICK = {"head": "linear", "optimizer": "lbfgs", "epochs": 2}  # trains in hundredths of a second


class TestAbsence:
    def test_rows_of_nan_are_absent(self, arrays, indicator):
        """A sum without the image is the text's head alone."""
        fitted = FusionClassifier(**QUICK).fit(arrays, indicator)
        blind = {**arrays, "image": np.full_like(arrays["image"], np.nan)}
        model = fitted.models_[0]
        x = (torch.tensor(arrays["text"]) - model.standardize["text"].mean) * model.standardize["text"].scale
        expected = model.fusion.meta(model.fusion.heads["text"](x.float())).sigmoid()
        np.testing.assert_allclose(fitted.predict_proba(blind), expected.detach().numpy(), atol=1e-6)

    def test_absence_in_training(self, arrays, indicator):
        gone = np.arange(60) % 4 == 0
        arrays["text"][gone] = np.nan
        fitted = FusionClassifier(**QUICK).fit(arrays, indicator)
        np.testing.assert_allclose(  # the tenth held out has no part in the statistics
            fitted.models_[0].standardize["text"].mean,
            arrays["text"][~gone & (stratified_folds(indicator, 10, 0) != 0)].mean(axis=0),
            atol=1e-6,
        )
        assert np.isfinite(fitted.predict_proba(arrays)).all()

    def test_a_modality_that_no_row_has(self, arrays, labels):
        arrays["text"][:] = np.nan
        with pytest.raises(ConfigError, match="text"):
            FusionClassifier(**QUICK).fit(arrays, labels)
        assert FusionClassifier(**QUICK, fusion="image").fit(arrays, labels).predict(arrays).shape == (60,)


class TestRefuses:
    @pytest.mark.parametrize("method", ["predict", "predict_proba"])
    def test_to_predict_before_fit(self, view, labels, method):
        with pytest.raises(NotFittedError, match="This FusionClassifier instance is not fitted yet"):
            getattr(FusionClassifier(), method)(view)
        failed = FusionClassifier(fusion="audio")
        with pytest.raises(UnknownNameError, match=naming("fusion audio")):
            failed.fit(view, labels)
        with pytest.raises(NotFittedError, match="is not fitted yet"):
            getattr(failed, method)(view)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_features_that_are_not_finite(self, arrays, labels, value):
        fitted = FusionClassifier(**QUICK).fit(arrays, labels)
        arrays["text"][4, 2] = value
        for call in (fitted.predict, lambda x: FusionClassifier(**QUICK).fit(x, labels)):
            with pytest.raises(DataError, match=naming("text NaN")) as caught:
                call(arrays)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (lambda a: {"image": a["image"]}, "image 6 text 5"),
            (lambda a: {**a, "text": a["text"][:, 1:]}, "image 6 text 4 NaN"),
            (lambda a: {"imgae": a["image"], "text": a["text"]}, "imgae 6 text 5"),
        ],
    )
    def test_other_features_than_those_of_fit(self, arrays, labels, x, message):
        with pytest.raises(DataError, match=naming(message)):
            FusionClassifier(**QUICK).fit(arrays, labels).predict(x(arrays))

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (np.tile([0, 2], (60, 1)), "y int64 60 2 0"),
            (np.tile([0, 1, -1], (60, 1)), "int64 60 3 -1 0 1"),
            ([("a", "b")] * 60, "0 1 MultiLabelBinarizer <U1 60 2 a"),
            (["a"] * 60, "y 1"),
        ],
    )
    def test_targets_that_no_head_can_learn(self, view, y, message):
        with pytest.raises(DataError, match=naming(message)):
            FusionClassifier(**QUICK).fit(view, y)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            ([("a", "b"), ("a",)] * 30, "sequences"),
            (np.linspace(0, 1, 60), "continuous"),
            ([0, 1] * 29, "60 58"),
            (None, "None"),
        ],
    )
    def test_what_scikit_learn_refuses_too(self, view, y, message):
        with pytest.raises(ValueError, match=naming(message)):
            FusionClassifier(**QUICK).fit(view, y)

    def test_no_rows(self, view, indicator):
        with pytest.raises(DataError, match=naming("y 0")):
            FusionClassifier(**QUICK).fit(view[:0], [])
        fitted = FusionClassifier(**QUICK).fit(view, indicator)
        assert fitted.predict(view[:0]).shape == fitted.predict_proba(view[:0]).shape == (0, 3)

    def test_settings_that_do_not_fit(self, view, indicator):
        for settings, message in (
            ({"loss": "ce"}, "loss ce"),
            ({"epochs": 0}, "epochs 1"),
            ({"random_state": -1}, "seed 0"),
            ({"device": "tpu"}, "device tpu"),
            ({"folds": 61}, "folds 2 60 61"),
            ({"layers": 8}, "layers 8"),
            ({"loss_options": "gamma"}, "loss-options gamma"),
        ):
            with pytest.raises(ConfigError, match=naming(message)):
                FusionClassifier(**settings).fit(view, indicator)
        with pytest.raises(ValueError, match=naming("seed FusionClassifier")):
            FusionClassifier().set_params(seed=1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_rows(view, indicator, n, caplog):
    with caplog.at_level(logging.ERROR):
        fitted = FusionClassifier(**QUICK).fit(view[:n], indicator[:n])
    assert np.isfinite(fitted.predict_proba(view)).all()
