import re

import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.training import OPTIMIZERS
from cachefuse.training.config import TrainConfig


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", 0.0, r"lr must be above 0\. Got 0 instead"),
        ("lr", -1.0, r"lr must be between 0 and 1e\+06\. Got -1\.0 instead"),
        ("lr", 1e39, r"lr must be between 0 and 1e\+06\. Got 1e\+39 instead"),
        ("lr", float("nan"), r"lr must be between 0 and 1e\+06\. Got nan instead"),
        ("dropout", 1.0, r"dropout must be at least 0 and below 1\. Got 1\.0 instead"),
        ("dropout", -0.1, r"dropout must be at least 0 and below 1\. Got -0\.1 instead"),
        ("dropout", float("nan"), r"dropout must be at least 0 and below 1\. Got nan instead"),
        ("weight_decay", -1.0, r"weight-decay must be between 0 and 1e\+06\. Got -1\.0 instead"),
        ("weight_decay", float("inf"), r"weight-decay must be between 0 and 1e\+06\. Got inf instead"),
        ("epochs", 0, r"epochs must be between 1 and 1e\+09\. Got 0 instead"),
        ("batch_size", -1, r"batch-size must be between 0 and 1e\+12\. Got -1 instead"),
        ("patience", -1, r"patience must be between 0 and 1e\+09\. Got -1 instead"),
        ("seed", -1, r"seed must be between 0 and 2\^63 - 1\. Got -1 instead"),
        ("seed", 2**63, r"seed must be between 0 and 2\^63 - 1\. Got 9223372036854775808 instead"),
        ("folds", 1, r"folds must be 0 for none, or at least 2\. Got 1 instead"),
        ("folds", -1, r"folds must be between 0 and 1000\. Got -1 instead"),
        ("members", 0, r"members must be between 1 and 1000\. Got 0 instead"),
        ("ema", 1.0, r"ema must be at least 0 and below 1\. Got 1\.0 instead"),
        ("modality_dropout", 1.0, r"modality-dropout must be at least 0 and below 1\. Got 1\.0 instead"),
        ("clip_norm", -1.0, r"clip-norm must be between 0 and 1e\+06\. Got -1\.0 instead"),
        ("scheme", "both", r"scheme must be one of joint, staged\. Got 'both'"),
        ("class_weights", "equal", r"class-weights must be one of none, balanced, effective\. Got 'equal'"),
        ("sampler", "random", r"sampler must be one of shuffle, balanced\. Got 'random'"),
        ("thresholds", "some", r"thresholds must be one of none, global, class, auto\. Got 'some'"),
        ("monitor", "calibration_error", r"monitor must be a metric that is higher for a better model"),
    ],
)
def test_refuses_settings_out_of_range(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["fusion", "head", "loss", "activation", "optimizer", "schedule"])
def test_refuses_unknown_names(setting):
    with pytest.raises(UnknownNameError, match=f"unknown {setting} 'smu'.*; choose from: "):
        TrainConfig(**{setting: "smu"})


@pytest.mark.parametrize("setting", ["monitor", "threshold_metric"])
def test_refuses_metrics_that_do_not_exist(setting):
    with pytest.raises(UnknownNameError, match=r"metric 'micro_f2' \(did you mean 'micro_f1'\?\); choose from: "):
        TrainConfig(**{setting: "micro_f2"})


@pytest.mark.parametrize("setting", [{"schedule": "cosine"}, {"sampler": "balanced"}])
def test_lbfgs_takes_all_rows_and_a_linear_head(setting):
    with pytest.raises(ConfigError, match=r"optimizer 'lbfgs' is for --head linear\. Got head 'mlp'"):
        TrainConfig(optimizer="lbfgs")
    with pytest.raises(ConfigError, match="optimizer 'lbfgs' takes all rows in each step, at a constant rate; leave"):
        TrainConfig(optimizer="lbfgs", head="linear", **setting)
    assert TrainConfig(optimizer="lbfgs", head="linear").effective_batch_size == 0


def test_each_optimizer_has_a_rate_of_its_own():
    rates = {name: TrainConfig(optimizer=name, head="linear").learning_rate for name in OPTIMIZERS}
    assert rates == {"adam": 1e-3, "adamw": 1e-3, "lbfgs": 1.0, "sgd": 0.05}
    assert TrainConfig(lr=0.3).learning_rate == 0.3


def test_takes_the_tasks_loss_unless_told():
    assert TrainConfig().resolve_loss("multilabel") == "asl"
    assert TrainConfig().resolve_loss("multiclass") == "ce"
    assert TrainConfig(loss="asl").resolve_loss("multiclass") == "asl"


def test_resolves_what_is_left_open():
    config = TrainConfig().resolve("multilabel", 2425)
    assert (config.loss, config.lr, config.schedule, config.epochs) == ("asl", 1e-3, "cosine", 50)
    assert config.loss_options == {"gamma_negative": 3.0, "gamma_positive": 0.0, "clip": 0.0}
    assert config.resolve("multilabel", 10) == config  # nothing is left open any more
    assert TrainConfig().resolve("multiclass", 10**6).loss == "ce"
    lbfgs = TrainConfig(head="linear", optimizer="lbfgs").resolve("multilabel", 100)
    assert (lbfgs.lr, lbfgs.weight_decay, lbfgs.schedule, lbfgs.epochs) == (1.0, 0.003, "constant", 20)


@pytest.mark.parametrize(
    ("settings", "n_rows", "epochs"),
    [({}, 54, 500), ({}, 1000, 125), ({}, 10**6, 50), ({"batch_size": 0}, 10**6, 500), ({"epochs": 3}, 54, 3)],
)
def test_few_rows_take_more_epochs_to_make_as_many_steps(settings, n_rows, epochs):
    assert TrainConfig(**settings).resolve("multilabel", n_rows).n_epochs == epochs


def test_options_of_a_loss_stand_beside_its_defaults():
    few = TrainConfig(loss_options={"gamma_negative": 4.0}).resolve("multilabel", 10)
    assert few.loss_options == {"gamma_negative": 4.0, "gamma_positive": 0.0, "clip": 0.0}
    focal = TrainConfig(loss="focal", loss_options={"gamma": 2.0}).resolve("multilabel", 10)
    assert focal.loss_options == {"gamma": 2.0}


def test_to_name_the_default_loss_changes_nothing():
    assert TrainConfig(loss="asl").resolve("multilabel", 10) == TrainConfig().resolve("multilabel", 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "loss option reduction must be mean or sum to train by. Got 'none' instead"),
        ({"gamma": "high"}, "loss option gamma must be a number. Got 'high' instead"),
        ({"gamma": float("nan")}, "loss option gamma must be a number. Got nan instead"),
        ({"gamma": True}, "loss option gamma must be a number. Got True instead"),
    ],
)
def test_refuses_loss_options_that_nothing_can_be_trained_by(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(loss="focal", loss_options=options)


def test_refuses_a_softmax_for_several_labels_a_row():
    with pytest.raises(
        ConfigError, match="loss 'ce' is for one label a row; a multi-label task takes asl, bce or focal"
    ):
        TrainConfig(loss="ce").resolve_loss("multilabel")


def test_refuses_a_task_without_labels():
    with pytest.raises(ConfigError, match="a retrieval dataset has no labels, so there is no head to train on it"):
        TrainConfig().resolve_loss("retrieval")


def test_a_linear_head_has_no_hidden_layers_by_default():
    assert TrainConfig(head="linear").head_options()["layers"] == ()
    assert TrainConfig(head="mlp").head_options()["layers"] == (512,)
    assert TrainConfig(head="mlp", layers=()).head_options()["layers"] == ()


def test_comes_back_from_a_dictionary():
    config = TrainConfig(fusion="mixed", layers=(8, 4), loss="asl", seed=3)
    assert TrainConfig.from_dict({**config.to_dict(), "layers": [8, 4]}) == config
    assert TrainConfig.from_dict({"layers": None}) == TrainConfig()


def test_refuses_keys_that_are_no_settings():
    with pytest.raises(ConfigError, match="unknown settings: fuse, rate"):
        TrainConfig.from_dict({"rate": 1, "fuse": 2, "lr": 0.1})


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({}, {}),
        ({"loss": "asl"}, {}),
        ({"loss": "bce"}, {"loss": "bce"}),
        (
            {"loss_options": {"clip": 0.1}},
            {"loss_options": {"gamma_negative": 3.0, "gamma_positive": 0.0, "clip": 0.1}},
        ),
        ({"head": "linear", "optimizer": "lbfgs"}, {"head": "linear", "optimizer": "lbfgs"}),
        ({"optimizer": "sgd", "lr": 0.1, "folds": 5}, {"optimizer": "sgd", "lr": 0.1, "folds": 5}),
        ({"batch_size": 0, "epochs": 7}, {"batch_size": 0, "epochs": 7}),
    ],
)
def test_what_differs_from_the_defaults(settings, differences):
    assert TrainConfig(**settings).resolve("multilabel", 10**9).differences("multilabel") == differences
