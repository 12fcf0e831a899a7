"""Modalities of any name: "user_ids" is no view of "user", and "values" is no method of torch."""

import numpy as np
import pytest

from cachefuse import FeatureView, FusionClassifier
from cachefuse.errors import ConfigError

QUICK = {"head": "linear", "epochs": 2, "thresholds": "none"}
names = pytest.mark.parametrize("name", ["user_ids", "report_tokens", "a_pooled", "_ids", "values", "training"])


@names
@pytest.mark.parametrize("fusion", ["sum", "mixed", "concat", "gated"])
@pytest.mark.one_in(3)
def test_a_modality_of_any_name_is_read_as_any_other(name, fusion, arrays, indicator):
    settings = {**QUICK, "fusion": fusion, "modality_dropout": 0.5}
    called = {"image": arrays["image"], name: arrays["text"]}
    plain = {"image": arrays["image"], "zzz" if name > "image" else "aaa": arrays["text"]}  # in the same order
    fitted = FusionClassifier(**settings).fit(called, indicator)
    assert sorted(fitted.models_[0].standardize) == sorted(called)
    expected = FusionClassifier(**settings).fit(plain, indicator).predict_proba(plain)
    np.testing.assert_array_equal(fitted.predict_proba(called), expected)


@names
def test_it_is_absent_by_itself(name, arrays, indicator):
    """Beside a modality that its name begins with."""
    called = {"user": arrays["image"], name: arrays["text"]}
    called[name][:] = np.nan
    with pytest.raises(ConfigError, match=f"no training row has a usable {name};"):
        FusionClassifier(**QUICK).fit(called, indicator)


@names
def test_it_is_left_out_and_shuffled_by_itself(name, arrays):
    table = FeatureView.from_arrays({"user": arrays["image"], name: arrays["text"]}).table
    less = table.without([name])
    assert less.present["user"].all()
    assert not less.present[name].any()
    mixed = table.shuffled({name: 1.0}, seed=0)
    assert list(mixed.sources) == [name]
