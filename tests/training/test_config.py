import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.training import OPTIMIZERS
from cachefuse.training.config import TrainConfig
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
        TrainConfig(loss="ce").resolve_loss("multilabel")


def test_refuses_a_task_without_labels():
    with pytest.raises(ConfigError, match="head"):
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
    assert TrainConfig(**settings).resolve("multilabel", 10**9).differences("multilabel") == differences
