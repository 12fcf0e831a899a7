"""Options of fusions, parts that are left out, and settings of their own: checked once, and filled in."""

import math

import pytest
import torch

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.cma import CMAFusion
from cachefuse.fusion.options import typed_options
from cachefuse.runs.train import train_head
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import resolve as resolve_settings
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming

SMALL = {"depth": 1, "width": 8, "heads": 2}
N = 10**6  # rows, of which an epoch makes enough steps


def resolve(n_rows=N, task="multilabel", **settings):
    return resolve_settings(TrainConfig(**settings), task, n_rows)


# Checked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fusion": "cma", "fusion_options": {"dept": 1}},
            "fusion cma dept depth width heads dropout",
        ),
        ({"fusion": "tirg", "fusion_options": {"depth": 1}}, "tirg depth query"),
        ({"fusion": "sum", "fusion_options": {"depth": 1}}, "fusion sum depth"),
        ({"fusion": "cma", "fusion_options": {"ablate": ()}}, "fusion cma ablate"),
        ({"fusion": "cma", "fusion_options": {"head": 1}}, "fusion cma head"),
        (
            {"fusion": "cma", "fusion_options": {"depth": "two"}},
            "fusion depth two",
        ),
        ({"fusion": "cma", "fusion_options": {"depth": "1.5"}}, "depth 1.5"),
        ({"fusion": "cma", "fusion_options": {"depth": ""}}, "depth"),
        (
            {"fusion": "cma", "fusion_options": {"dropout": "some"}},
            "fusion dropout some",
        ),
        ({"fusion": "tirg", "fusion_options": {"width": "wide"}}, "width wide"),
        (
            {"fusion": "cma", "ablate": ("attention",)},
            "fusion cma attention modality-attention sequence-attention",
        ),
        (
            {"fusion": "cma", "ablate": ("modality-attention", "image")},
            "fusion cma image modality-attention sequence-attention",
        ),
        ({"fusion": "tirg", "ablate": ("gate",)}, "tirg gate"),
        ({"fusion": "sum", "ablate": ("meta",)}, "fusion sum meta"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_what_the_fusion_does_not_have(settings, message):
    with pytest.raises(ConfigError, match=naming(message)):
        resolve(**settings)


def test_a_training_refuses_them_too(toy_store):
    store = toy_store()
    for settings, message in (
        ({"fusion_options": {"dept": 1}}, "has no option 'dept'"),
        ({"ablate": ("attention",)}, "cma attention modality-attention"),
        ({"fusion_options": {"depth": 0}}, "depth 1 0"),
        ({"fusion_options": {"heads": 5}}, "width heads 5"),
        ({"fusion_options": {"dropout": 2}}, "dropout 0 1 2.0"),
        ({"fusion_options": {"dropout": math.nan}}, "dropout number nan"),
    ):
        with pytest.raises(ConfigError, match=naming(message)):
            train_head(store, TrainConfig(fusion="cma", **settings))
    with pytest.raises(ConfigError, match=naming("audio image text")):
        train_head(store, TrainConfig(fusion="tirg", fusion_options={"query": "audio"}))


@pytest.mark.parametrize(
    ("fusion", "option"), [("lit", "architecture"), ("midfusion", "architecture"), ("midfusion", "answer_tokens")]
)
def test_options_that_are_found_in_files_are_not_given(fusion, option):
    with pytest.raises(ConfigError, match=naming(f"{fusion} no option {option} its options")) as refused:
        typed_options(FUSIONS[fusion], {option: "x"})
    assert option not in str(refused.value).partition("its options")[2]


@pytest.mark.parametrize("fusion", ["cma", "tirg"])
def test_lbfgs_is_for_linear_models(fusion):
    with pytest.raises(ConfigError, match=naming(f"optimizer lbfgs fusion {fusion}")):
        TrainConfig(fusion=fusion, head="linear", optimizer="lbfgs")
    assert not TrainConfig(fusion=fusion, head="linear").is_linear
    assert TrainConfig(fusion="sum", head="linear", optimizer="lbfgs").is_linear


# Filled in


CMA = CMAFusion.options()


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"depth": "3"}, {"depth": 3}),
        ({"depth": 1, "dropout": "0.25"}, {"depth": 1, "dropout": 0.25}),
        ({"dropout": 0}, {"dropout": 0.0}),
        ({"dropout": "1e-1", "width": "64"}, {"dropout": 0.1, "width": 64}),
    ],
    ids=str,
)
def test_options_come_with_their_defaults_as_numbers(given, changed):
    options = resolve(fusion="cma", fusion_options=given).fusion_options
    assert options == {**CMA, **changed}
    assert [type(x) for x in options.values()] == [type(x) for x in CMA.values()]


def test_options_of_other_fusions():
    assert resolve(fusion="tirg", fusion_options={"query": "text"}).fusion_options == {"query": "text", "width": 512}
    assert resolve(fusion="sum").fusion_options == {}
    assert resolve(fusion="sum").own_options() == {}


def test_own_options_are_the_arguments_of_the_fusion():
    config = TrainConfig(fusion="cma", fusion_options={"depth": 1}, ablate=("modality-attention",))
    assert config.own_options() == {"depth": 1, "ablate": ("modality-attention",)}
    assert resolve(fusion="cma").own_options().keys() >= {"depth", "width", "heads", "dropout"}
    assert "ablate" not in resolve(fusion="cma").own_options()


def test_a_fusion_has_settings_of_its_own():
    config = resolve(fusion="cma")
    assert (config.dropout, config.lr, config.weight_decay, config.epochs, config.batch_size) == (
        0.2, 3e-4, 1e-4, 15, 64,
    )  # fmt: skip
    for plain in (resolve(fusion="sum"), resolve(fusion="tirg")):
        assert (plain.dropout, plain.lr, plain.weight_decay, plain.epochs, plain.batch_size) == (
            0.8, 1e-3, 0.0, 50, 256,
        )  # fmt: skip
    assert config.schedule == "cosine"
    assert config.head_options()["dropout"] == 0.2
    assert resolve().head_options()["dropout"] == 0.8


def test_what_is_given_wins():
    given = {"dropout": 0.5, "lr": 1e-2, "weight_decay": 0.3, "epochs": 7, "batch_size": 32}
    config = resolve(fusion="cma", **given)
    assert {name: getattr(config, name) for name in given} == given
    zeros = resolve(fusion="cma", dropout=0.0, weight_decay=0.0, batch_size=0)  # 0 is given, too; batches of all rows
    assert (zeros.dropout, zeros.weight_decay, zeros.batch_size, zeros.effective_batch_size) == (0.0, 0.0, 0, 0)
    assert zeros.lr == 3e-4


def test_resolving_twice_changes_nothing():
    for settings in ({"fusion": "cma", "fusion_options": {"depth": "1"}}, {"fusion": "tirg"}, {"fusion": "sum"}):
        once = resolve(n_rows=100, **settings)
        assert resolve_settings(once, "multilabel", 100) == once
        assert resolve_settings(once, "multilabel", N) == once  # none is left open


def test_the_rate_of_another_optimizer_is_its_own():
    assert resolve(fusion="cma", optimizer="adamw").lr == 3e-4
    assert resolve(fusion="cma", optimizer="sgd").lr == 0.05
    assert resolve(fusion="cma", optimizer="sgd", lr=0.1).lr == 0.1


def test_views_are_those_that_the_fusion_reads():
    assert TrainConfig(fusion="cma").reads("text") == ("pooled", "tokens")
    assert TrainConfig(fusion="cma", ablate=("sequence-attention",)).reads("text") == ("pooled",)
    assert TrainConfig(fusion="tirg").reads("image") == ("pooled",)
    assert TrainConfig(fusion="sum").reads("image") == ("pooled",)
    assert TrainConfig(fusion="sum", views="tokens").reads("image") == ("flat",)
    assert TrainConfig(fusion="cma", views="tokens").reads("text") == ("pooled", "tokens")


@pytest.mark.parametrize("ablate", [(), ("modality-attention",), ("sequence-attention",)], ids=str)
def test_the_model_is_the_one_that_the_settings_describe(ablate, toy_store):
    store, config = toy_store(), resolve(fusion="cma", fusion_options={**SMALL, "depth": "3"}, ablate=ablate)
    table = load_table(store, select_features(store, views=config.reads), config.reads)
    model = build_model(config, table.specs, 3)
    fusion = model.fusion
    assert len(fusion.blocks) == (0 if "sequence-attention" in ablate else 3)
    assert (fusion.relevance is None) == ("modality-attention" in ablate)
    assert {m.p for m in fusion.blocks.modules() if isinstance(m, torch.nn.Dropout)} <= {0.1}
    assert [m.p for m in fusion.head.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]
    assert list(model.specs) == sorted(table.features)


# Shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"fusion": "cma"}, {"fusion": "cma"}),
        ({"fusion": "cma", "lr": 3e-4, "dropout": 0.2, "epochs": 15}, {"fusion": "cma"}),
        ({"fusion": "cma", "lr": 1e-3, "dropout": 0.8}, {"fusion": "cma", "lr": 1e-3, "dropout": 0.8}),
        ({"fusion": "cma", "fusion_options": {"depth": 2, "width": str(CMA["width"])}}, {"fusion": "cma"}),
        ({"fusion": "cma", "ablate": ("modality-attention",)}, {"fusion": "cma", "ablate": ("modality-attention",)}),
        ({"fusion": "cma", "head": "linear", "seed": 4}, {"fusion": "cma", "head": "linear", "seed": 4}),
        ({"fusion": "cma", "optimizer": "sgd"}, {"fusion": "cma", "optimizer": "sgd"}),
        ({"fusion": "tirg"}, {"fusion": "tirg"}),
        ({}, {}),
    ],
    ids=str,
)
def test_only_what_differs_is_shown(given, shown):
    assert resolve(**given).differences("multilabel") == shown


def test_options_that_differ_are_shown():
    shown = resolve(fusion="cma", fusion_options={"depth": 1}).differences("multilabel")
    assert shown.keys() == {"fusion", "fusion_options"}
    assert shown["fusion_options"]["depth"] == 1
    shown = resolve(fusion="tirg", fusion_options={"query": "text"}).differences("multilabel")
    assert (shown.keys(), shown["fusion_options"]["query"]) == ({"fusion", "fusion_options"}, "text")
