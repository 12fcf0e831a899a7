import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError, TrainingError
from cachefuse.feature_spec import pooled_specs
from cachefuse.fusion import FUSIONS
from cachefuse.nn import ACTIVATIONS
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.resolved import resolve
from cachefuse.training.split import Split
from cachefuse.training.stack import max_together, shared_settings, stack, train_together, unstack
from cachefuse.training.train import train_model
from fixtures.messages import naming

N, C = 60, 3
LINEAR = [name for name in FUSIONS if FUSIONS[name].linear]
WIDTHS = {"image": 6, "text": 5}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make_problem(task="multilabel", absent=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features = {m: torch.randn(N, width, generator=generator).to(dtype) for m, width in WIDTHS.items()}
    present = {m: torch.ones(N, dtype=torch.bool) for m in WIDTHS}
    if absent:
        present["text"][::7] = False
        features["text"][::7] = math.nan
    signal = features["image"].float() @ torch.randn(6, C, generator=generator)
    targets = (signal > 0.5) if task == "multilabel" else nn.functional.one_hot(signal.argmax(1), C)
    table = FeatureTable(
        features, pooled_specs(WIDTHS), present, targets.to(torch.uint8), np.ones(N, bool), np.array(["train"] * N)
    )
    return TrainingData.of_one_task("made", table, ("a", "b", "c"), task, ("micro_f1",))


EVERYTHING = Split(torch.arange(N), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def resolved(**settings):
    return resolve(TrainConfig(**settings), "multilabel", N)


BASE = resolved(
    head="linear", epochs=4, patience=0, batch_size=16, lr=0.02, loss="bce", schedule="constant", activation="gelu"
)
MIXED = [
    {"lr": 0.05},
    {"loss": "asl", "weight_decay": 0.1},
    {"lr": 0.001, "class_weights": "balanced"},
    {"loss": "focal", "loss_options": {"gamma": 1.0}},
    {},
    {"loss": "asl", "loss_options": {"reduction": "sum"}, "lr": 0.001},
    {"lr": 0.05, "class_weights": "effective", "loss": "focal"},
    {"lr": 0.05, "weight_decay": 0.01},
]


def mixed(**settings):
    return [replace(BASE, **{**settings, **own}) for own in MIXED]


def built(config, n=3):
    models = []
    for seed in range(n):
        torch.manual_seed(seed)
        models.append(build_model(config, pooled_specs(WIDTHS), C).fusion)
        for parameter in models[-1].parameters():
            nn.init.normal_(parameter, std=0.3)
    return models


def assert_same_weights(together, alone):
    assert together.state_dict().keys() == alone.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def assert_same_as_alone(data, configs):
    together = train_together(data, configs, EVERYTHING)
    assert len(together) == len(configs)
    for model, config in zip(together, configs, strict=True):
        assert_same_weights(model, train_model(data, config, EVERYTHING)[0])
    return together


@pytest.mark.parametrize("head", ["linear", "mlp", "gmlp"])
@pytest.mark.parametrize("fusion", LINEAR)
def test_a_stack_says_what_its_models_say(fusion, head):
    config = resolved(fusion=fusion, head=head, layers=None if head == "linear" else (8, 4), dropout=0.0)
    models = built(config)
    table = make_problem().table
    stacked = stack(models)
    logits = stacked(*table.batch(torch.arange(N)))
    expected = torch.stack([model(*table.batch(torch.arange(N))) for model in models])
    assert logits.shape == (3, N, C)
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in stacked.named_parameters():
        gradients = [model.get_parameter(name).grad for model in models]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients), atol=1e-4, rtol=1e-4)


def test_heads_that_share_their_input_are_one_matrix_product():
    models = built(resolved(fusion="image", head="linear"), n=20)
    stacked = stack(models)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stacked({"image": torch.ones(4, 6)}, {"image": torch.ones(4, dtype=torch.bool)})
    products = [event for event in profile.events() if event.name in ("aten::addmm", "aten::mm", "aten::bmm")]
    assert [event.name for event in products] == ["aten::addmm"]


def test_unstacking_gives_the_same_bytes_back():
    config = resolved(fusion="mixed", head="gmlp", layers=(8,))
    models, empty = built(config), built(config)
    for model in empty:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    unstack(stack(models), empty)
    for model, other in zip(models, empty, strict=True):
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stack_leaves_its_models_alone():
    models = built(BASE)
    before = [model.state_dict()["meta.weight"].clone() for model in models]
    with torch.no_grad():
        stack(models).meta.weight.zero_()
    assert all(torch.equal(model.meta.weight, weight) for model, weight in zip(models, before, strict=True))


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (resolved(layers=(8,)), resolved(layers=(9,))),
        (resolved(layers=(8,)), resolved(layers=(8, 8))),
        (resolved(layers=(8,), activation="gelu"), resolved(layers=(8,), activation="relu")),
        (resolved(layers=(8,)), resolved(layers=(8,), dropout=0.1)),
        (resolved(head="linear"), resolved(head="linear", fusion="mixed")),
    ],
)
def test_models_of_other_layers_do_not_stack(first, other):
    with pytest.raises(ConfigError, match="layers"):
        stack([*built(first, 1), *built(other, 1)])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.PReLU()), nn.Embedding(3, 4)])
def test_layers_that_do_not_stack(layer):
    with pytest.raises(ConfigError, match=naming("Linear LayerNorm")):
        stack([layer, layer])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_with_and_without_bias(bias):
    layers = [nn.Linear(5, 4, bias=bias) for _ in range(3)]
    stacked = stack(layers)
    shared, own = torch.randn(7, 5), torch.randn(3, 7, 5)
    torch.testing.assert_close(stacked(shared), torch.stack([layer(shared) for layer in layers]))
    torch.testing.assert_close(stacked(own), torch.stack([layer(x) for layer, x in zip(layers, own, strict=True)]))


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("adamw", marks=pytest.mark.slow), "sgd"])
@pytest.mark.parametrize("fusion", LINEAR)
@pytest.mark.one_in(3)
def test_linear_heads_trained_together_are_those_trained_alone(fusion, optimizer):
    assert_same_as_alone(make_problem(), mixed(fusion=fusion, optimizer=optimizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine"},
        {"schedule": "onecycle", "optimizer": "sgd"},
        {"sampler": "balanced"},
        {"modality_dropout": 0.4},
        {"ema": 0.9},
        {"batch_size": 0, "seed": 3},
        {"scheme": "staged"},
        {"scheme": "staged", "fusion": "mixed", "ema": 0.9, "optimizer": "adamw"},
    ],
)
@pytest.mark.one_in(2)
def test_every_other_setting_holds_for_each(settings):
    assert_same_as_alone(make_problem(), mixed(**settings))


@pytest.mark.parametrize("scheme", ["joint", pytest.param("staged", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("head", "activation"), [("mlp", name) for name in ACTIVATIONS] + [("gmlp", "gelu")])
@pytest.mark.one_in(2)
def test_heads_with_hidden_layers_too(head, activation, scheme):
    settings = {"layers": (8, 4), "activation": activation, "dropout": 0.0, "scheme": scheme, "lr": 0.005}
    assert_same_as_alone(make_problem(), [replace(c, lr=c.lr / 5) for c in mixed(head=head, **settings)])


@pytest.mark.parametrize("head", ["mlp", "gmlp"])
def test_dropout_drops_what_it_drops_in_each_alone(head):
    base = replace(BASE, head=head, layers=(32, 8), dropout=0.5, fusion="mixed", seed=3)
    assert_same_as_alone(make_problem(), [replace(base, lr=lr) for lr in (0.002, 0.005)])


def test_equal_rates_and_losses():
    assert_same_as_alone(make_problem(), [BASE, BASE, BASE])
    assert_same_as_alone(make_problem(), [BASE])


def test_multi_class_losses():
    configs = [
        replace(BASE, **own)
        for own in (
            {"loss": "ce", "loss_options": {"smoothing": 0.1}},
            {"loss": "bce"},
            {"class_weights": "balanced"},
            {"loss": "ce", "loss_options": {"reduction": "sum"}, "lr": 0.001},
        )
    ]
    assert_same_as_alone(make_problem("multiclass"), configs)


def test_features_that_do_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr("cachefuse.training.feature_table.COPY_SHARE", 0)
    assert_same_as_alone(make_problem(dtype=torch.float16), mixed(scheme="staged"))


def test_more_rows_than_are_evaluated_at_a_time(monkeypatch):
    monkeypatch.setattr("cachefuse.training.feature_table.PIECE_ROWS", 7)
    assert_same_as_alone(make_problem(), mixed())


@pytest.mark.parametrize("n_floats", [1, 100])
def test_losses_that_take_some_rows_at_a_time(n_floats, monkeypatch):
    monkeypatch.setattr("cachefuse.training.stack.LOSS_FLOATS", n_floats)
    assert_same_as_alone(make_problem("multiclass"), mixed(loss="ce", loss_options={"smoothing": 0.1})[:1] + mixed())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head", ["linear", "mlp", "gmlp"])
def test_on_cuda(head):
    layers = None if head == "linear" else (8, 4)
    data = make_problem()
    data = replace(data, table=data.table.to("cuda"))
    assert_same_as_alone(data, mixed(head=head, layers=layers, dropout=0.0))


def test_same_seed_same_bytes():
    first, again = (train_together(make_problem(), mixed(), EVERYTHING) for _ in range(2))
    for model, other in zip(first, again, strict=True):
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    train_together(make_problem(), mixed(), EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scheme", ["joint", pytest.param("staged", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lr", [1e4, 1e6])
def test_one_that_diverges_does_not_take_the_others_along(lr, scheme):
    data = make_problem()
    sgd = replace(BASE, optimizer="sgd", lr=0.01, epochs=30, scheme=scheme)
    wild = [replace(sgd, lr=lr), replace(sgd, loss="focal", lr=lr)]
    for config in wild:
        with pytest.raises(TrainingError, match="lr"):
            train_model(data, config, EVERYTHING)
    tame = [sgd, replace(sgd, loss="focal"), replace(sgd, lr=0.02)]
    trained = train_together(data, [wild[0], tame[0], wild[1], *tame[1:]], EVERYTHING)
    for error in (trained.pop(0), trained.pop(1)):
        assert isinstance(error, TrainingError)
        assert str(error).startswith("training diverged: the loss is ")
    for model, config in zip(trained, tame, strict=True):
        assert_same_weights(model, train_model(data, config, EVERYTHING)[0])


@pytest.mark.parametrize("lr", [0.01, 1e4])
@pytest.mark.parametrize("scheme", ["joint", "staged"])
@pytest.mark.one_in(2)
def test_an_interrupt_is_one_even_while_some_diverge(scheme, lr):
    configs = [replace(BASE, optimizer="sgd", scheme=scheme, epochs=10**6, lr=x) for x in (0.01, lr)]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_together(make_problem(), configs, EVERYTHING)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("settings", "device", "free"),
    [
        ({}, CPU, True),
        ({"scheme": "staged", "ema": 0.9, "modality_dropout": 0.1, "sampler": "balanced"}, CPU, True),
        ({"head": "mlp"}, CPU, False),
        ({"head": "mlp"}, CUDA, True),
        ({"patience": 1}, CPU, False),
        ({"clip_norm": 1.0}, CPU, False),
        ({"optimizer": "lbfgs"}, CPU, False),
        ({"members": 2}, CPU, False),
        ({"views": "tokens", "head": "gmlp"}, CUDA, False),
    ],
)
def test_what_is_trained_together(settings, device, free):
    assert (shared_settings(replace(BASE, **settings), device) is not None) == free


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"lr": 1.0, "weight_decay": 0.1}, True),
        ({"loss": "asl", "loss_options": {"clip": 0.1}, "class_weights": "balanced"}, True),
        ({"thresholds": "class", "threshold_metric": "macro_f1", "monitor": "macro_ap"}, True),
        ({"dropout": 0.9, "activation": "relu", "layers": ()}, True),
        *(({name: value}, False) for name, value in {
            "seed": 1, "fusion": "mixed", "scheme": "staged", "epochs": 5, "batch_size": 17, "optimizer": "sgd",
            "schedule": "cosine", "sampler": "balanced", "ema": 0.5, "modality_dropout": 0.5, "folds": 3,
        }.items()),
    ],
)  # fmt: skip
def test_what_may_differ_between_linear_heads(changes, same):
    assert (shared_settings(BASE, CPU) == shared_settings(replace(BASE, **changes), CPU)) == same


@pytest.mark.parametrize("changes", [{"dropout": 0.9}, {"activation": "relu"}, {"layers": (8,)}])
def test_what_may_not_differ_between_heads_with_hidden_layers(changes):
    mlp = replace(BASE, head="mlp")
    assert shared_settings(mlp, CUDA) != shared_settings(replace(mlp, **changes), CUDA)


def test_how_many_fit():
    data = make_problem()
    assert max_together(data, BASE, 25_000) == 2**25 // (25_000 * C)
    assert max_together(data, BASE, 10**9) == max_together(data, BASE, 10**5) == 111
    assert max_together(data, replace(BASE, batch_size=0), 10**9) == 1
    assert max_together(data, replace(BASE, head="mlp", layers=(512,), batch_size=4096), 4096) == 15
