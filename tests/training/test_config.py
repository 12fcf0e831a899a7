import json
from dataclasses import replace

import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.settings import settings_of
from cachefuse.training import OPTIMIZERS
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import ResolvedConfig, resolve, resolve_loss
from fixtures.messages import naming


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", 0.0, "lr 0"),
        ("lr", -1.0, "lr 0 1e+06 -1.0"),
        ("lr", 1e39, "lr 0 1e+06 1e+39"),
        ("lr", float("nan"), "lr 0 1e+06 nan"),
        ("dropout", 1.0, "dropout 0 1 1.0"),
        ("dropout", -0.1, "dropout 0 1 -0.1"),
        ("dropout", float("nan"), "dropout 0 1 nan"),
        ("weight_decay", -1.0, "weight-decay 0 1e+06 -1.0"),
        ("weight_decay", float("inf"), "weight-decay 0 1e+06 inf"),
        ("epochs", 0, "epochs 1 1e+09 0"),
        ("batch_size", -1, "batch-size 0 1e+12 -1"),
        ("patience", -1, "patience 0 1e+09 -1"),
        ("seed", -1, "seed 0 2^63 1 -1"),
        ("seed", 2**63, "seed 0 2^63 1 9223372036854775808"),
        ("folds", 1, "folds 0 2 1"),
        ("folds", -1, "folds 0 1000 -1"),
        ("members", 0, "members 1 1000 0"),
        ("ema", 1.0, "ema 0 1 1.0"),
        ("modality_dropout", 1.0, "modality-dropout 0 1 1.0"),
        ("clip_norm", -1.0, "clip-norm 0 1e+06 -1.0"),
        ("scheme", "both", "scheme both"),
        ("class_weights", "equal", "class-weights equal"),
        ("sampler", "random", "sampler random"),
        ("thresholds", "some", "thresholds some"),
        ("monitor", "calibration_error", "monitor"),
    ],
)
def test_refuses_settings_out_of_range(setting, value, message):
    with pytest.raises(ConfigError, match=naming(message)):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["fusion", "head", "loss", "activation", "optimizer", "schedule"])
def test_refuses_unknown_names(setting):
    with pytest.raises(UnknownNameError, match=naming(f"{setting} smu")):
        TrainConfig(**{setting: "smu"})


@pytest.mark.parametrize("setting", ["monitor", "threshold_metric"])
def test_refuses_metrics_that_do_not_exist(setting):
    with pytest.raises(UnknownNameError, match=naming("micro_f2 micro_f1")):
        TrainConfig(**{setting: "micro_f2"})


@pytest.mark.parametrize("setting", [{"schedule": "cosine"}, {"sampler": "balanced"}])
def test_lbfgs_takes_all_rows_and_a_linear_head(setting):
    with pytest.raises(ConfigError, match=naming("optimizer lbfgs --head head mlp")):
        TrainConfig(optimizer="lbfgs")
    with pytest.raises(ConfigError, match=naming("optimizer lbfgs")):
        TrainConfig(optimizer="lbfgs", head="linear", **setting)
    assert resolve(TrainConfig(optimizer="lbfgs", head="linear"), "multilabel", 100).effective_batch_size == 0


def test_each_optimizer_has_a_rate_of_its_own():
    rates = {name: resolve(TrainConfig(optimizer=name, head="linear"), "multilabel", 100).lr for name in OPTIMIZERS}
    assert rates == {"adam": 1e-3, "adamw": 1e-3, "lbfgs": 1.0, "sgd": 0.05}
    assert resolve(TrainConfig(lr=0.3), "multilabel", 100).lr == 0.3


def test_takes_the_tasks_loss_unless_told():
    assert resolve_loss(TrainConfig(), "multilabel") == "asl"
    assert resolve_loss(TrainConfig(), "multiclass") == "ce"
    assert resolve_loss(TrainConfig(loss="asl"), "multiclass") == "asl"


def test_resolves_what_is_left_open():
    config = resolve(TrainConfig(), "multilabel", 2425)
    assert (config.loss, config.lr, config.schedule, config.epochs) == ("asl", 1e-3, "cosine", 50)
    assert config.loss_options == {"gamma_negative": 3.0, "gamma_positive": 0.0, "clip": 0.0}
    assert resolve(config, "multilabel", 10) == config  # nothing is left open any more
    assert resolve(TrainConfig(), "multiclass", 10**6).loss == "ce"
    lbfgs = resolve(TrainConfig(head="linear", optimizer="lbfgs"), "multilabel", 100)
    assert (lbfgs.lr, lbfgs.weight_decay, lbfgs.schedule, lbfgs.epochs) == (1.0, 0.003, "constant", 20)


@pytest.mark.parametrize(
    ("settings", "n_rows", "epochs"),
    [({}, 54, 500), ({}, 1000, 125), ({}, 10**6, 50), ({"batch_size": 0}, 10**6, 500), ({"epochs": 3}, 54, 3)],
)
def test_few_rows_take_more_epochs_to_make_as_many_steps(settings, n_rows, epochs):
    assert resolve(TrainConfig(**settings), "multilabel", n_rows).epochs == epochs


def test_options_of_a_loss_stand_beside_its_defaults():
    few = resolve(TrainConfig(loss_options={"gamma_negative": 4.0}), "multilabel", 10)
    assert few.loss_options == {"gamma_negative": 4.0, "gamma_positive": 0.0, "clip": 0.0}
    focal = resolve(TrainConfig(loss="focal", loss_options={"gamma": 2.0}), "multilabel", 10)
    assert focal.loss_options == {"gamma": 2.0}


def test_to_name_the_default_loss_changes_nothing():
    assert resolve(TrainConfig(loss="asl"), "multilabel", 10) == resolve(TrainConfig(), "multilabel", 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "loss reduction none"),
        ({"gamma": "high"}, "loss gamma high"),
        ({"gamma": float("nan")}, "loss gamma nan"),
        ({"gamma": True}, "loss gamma True"),
    ],
)
def test_refuses_loss_options_that_nothing_can_be_trained_by(options, message):
    with pytest.raises(ConfigError, match=naming(message)):
        TrainConfig(loss="focal", loss_options=options)


def test_refuses_a_softmax_for_several_labels_a_row():
    with pytest.raises(ConfigError, match=naming("loss ce")):
        resolve_loss(TrainConfig(loss="ce"), "multilabel")


def test_refuses_a_task_without_labels():
    with pytest.raises(ConfigError, match="head"):
        resolve_loss(TrainConfig(), "retrieval")


def test_a_linear_head_has_no_hidden_layers_by_default():
    assert resolve(TrainConfig(head="linear"), "multilabel", 100).head_options()["layers"] == ()
    assert resolve(TrainConfig(head="mlp"), "multilabel", 100).head_options()["layers"] == (512,)
    assert resolve(TrainConfig(head="mlp", layers=()), "multilabel", 100).head_options()["layers"] == ()


def test_a_run_that_is_older_than_a_setting_has_what_was_done_then():
    older = {name: x for name, x in TrainConfig().to_dict().items() if name != "decay"}
    assert ResolvedConfig.from_run({**older, "weight_decay": 0.1}, "multilabel").decay == "all"
    assert ResolvedConfig.from_run(older, "multilabel").decay == "weights"  # nothing decays


def test_comes_back_from_a_dictionary():
    config = TrainConfig(fusion="mixed", layers=(8, 4), loss="asl", seed=3)
    assert TrainConfig.from_dict({**config.to_dict(), "layers": [8, 4]}) == config
    assert TrainConfig.from_dict({"layers": None}) == TrainConfig()


def test_refuses_keys_that_are_no_settings():
    with pytest.raises(ConfigError, match=naming("fuse rate")):
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
    assert resolve(TrainConfig(**settings), "multilabel", 10**9).differences("multilabel") == differences


OPEN = {"dropout", "loss", "lr", "schedule", "weight_decay", "epochs", "batch_size"}


def test_what_is_resolved_is_another_type():
    config = TrainConfig(fusion="cma", epochs=3)
    resolved = resolve(config, "multilabel", 100)
    assert (type(config), type(resolved)) == (TrainConfig, ResolvedConfig)
    assert {one.name for one in settings_of(TrainConfig).values() if one.optional} > OPEN
    assert not any(settings_of(ResolvedConfig)[name].optional for name in OPEN)
    assert [(one.name, one.about) for one in settings_of(ResolvedConfig).values()] == [
        (one.name, one.about) for one in settings_of(TrainConfig).values()
    ]
    with pytest.raises(ConfigError, match=naming("lr")):
        replace(resolved, lr=None)
    with pytest.raises(TypeError, match="dropout"):
        ResolvedConfig()


def test_a_runs_settings_are_read_as_they_are():
    resolved = resolve(TrainConfig(fusion="cma", ablate=("modality-attention",), views="tokens"), "multilabel", 100)
    stored = resolved.to_dict()
    assert (stored["without"], stored["view"]) == (
        ("modality-attention",),
        "tokens",
    )  # which earlier versions read, too
    assert ResolvedConfig.from_run(json.loads(json.dumps(stored)), "multilabel") == resolved
    older = {name: value for name, value in stored.items() if name not in OPEN}  # what they lack is the default
    assert ResolvedConfig.from_run(older, "multilabel").lr == resolved.lr
    with pytest.raises(ConfigError, match=naming("rate")):
        ResolvedConfig.from_run({"rate": 1}, "multilabel")


def test_the_lowest_loss_needs_patience_to_choose_an_epoch():
    with pytest.raises(ConfigError, match=naming("monitor loss patience")):
        TrainConfig(monitor="loss")
