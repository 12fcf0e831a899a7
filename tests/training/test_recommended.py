"""What is trained if no settings are given, and what the given ones mean."""

import numpy as np
import pytest

from cachefuse.training.config import TrainConfig
from cachefuse.training.recommended import MOST_ROWS, recommended


class Store:
    """What ``recommended`` reads of a store."""

    def __init__(self, n=100, task="multilabel", groups=None, n_test=0):
        self.targets = np.zeros((n + n_test, 3), np.int8)
        self.splits = np.array(["train"] * n + ["test"] * n_test)
        self.manifest = type("Manifest", (), {"task": task})
        self.groups, self.modalities = groups, ()

    def __len__(self):
        return len(self.targets)


def kinds(configs):
    return [config.fusion for config in configs]


def test_few_rows_get_a_blend_that_is_measured_on_all_of_them():
    configs = recommended(Store())
    assert kinds(configs) == ["kernel", "sum"]
    assert all(config.folds == 5 and config.refit for config in configs)
    assert configs[1].loss == "bce"
    assert recommended(Store(task="multiclass"))[1].loss == "ce"


def test_settings_that_go_with_any_model_change_the_blend():
    configs = recommended(Store(), {"folds": 3, "thresholds": "class", "seed": 7, "calibrate": "temperature"})
    assert kinds(configs) == ["kernel", "sum"]
    for config in configs:
        assert (config.folds, config.thresholds, config.seed, config.calibrate) == (3, "class", 7, "temperature")


@pytest.mark.parametrize("given", [{"fusion": "sum", "loss": "asl"}, {"fusion": "sum"}, {"epochs": 3}, {"members": 2}])
def test_settings_of_a_model_mean_what_they_say(given):
    assert recommended(Store(), given) == (TrainConfig(**given),)


@pytest.mark.parametrize("store", [Store(MOST_ROWS + 1), Store(4, n_test=90), Store(task="vqa")])
def test_other_data_gets_the_plain_defaults(store):
    assert recommended(store) == (TrainConfig(),)


def test_groups_are_counted_not_rows():
    assert kinds(recommended(Store(100, groups=np.array(["a", "b", "c", "d"] * 25)))) == ["sum"]
    assert kinds(recommended(Store(100, groups=np.array(["a", "b", "c", "d", "e"] * 20)))) == ["kernel", "sum"]
