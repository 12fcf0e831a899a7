"""Settings that a sweep tries, as they are given."""

import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.experiments.settings import grid, parse_setting
from fixtures.messages import naming


def test_a_grid_is_every_combination():
    assert grid({"loss": ["bce", "asl"], "lr": [1, 2]}) == [
        {"loss": "bce", "lr": 1},
        {"loss": "bce", "lr": 2},
        {"loss": "asl", "lr": 1},
        {"loss": "asl", "lr": 2},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "grid"), ({"lr": [1], "loss": []}, "loss")],
)
def test_an_empty_grid(values, message):
    with pytest.raises(ConfigError, match=naming(message)):
        grid(values)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ({"dropout": "0.5", "epochs": "20"}, {"dropout": 0.5, "epochs": 20}),
        ({"lr": "1e-3"}, {"lr": 0.001}),
        ({"layers": "2048-512"}, {"layers": (2048, 512)}),
        ({"layers": [2048, 512]}, {"layers": (2048, 512)}),
        ({"layers": "64"}, {"layers": (64,)}),
        ({"batch_size": "all"}, {"batch_size": 0}),
        ({"batch_size": "256"}, {"batch_size": 256}),
        ({"loss_options": {"gamma": "2", "reduction": "sum"}}, {"loss_options": {"gamma": 2.0, "reduction": "sum"}}),
        ({"fusion": "mixed", "monitor": None}, {"fusion": "mixed", "monitor": None}),
    ],
)
def test_settings_take_text_and_values(given, parsed):
    assert parse_setting(given) == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout": "x"}, "dropout x"),
        ({"dropout": ""}, "dropout"),
        ({"epochs": 1.5}, "epochs 1.5"),
        ({"layers": "8-x"}, "layers 2048-512 8-x"),
        ({"layers": "-8"}, "layers 2048-512 -8"),
        ({"loss": 3}, "loss 3"),
        (
            {"loss_options": {"gamma": "two"}},
            "loss_options --settings",
        ),
        ({"seed": 3}, "seed"),
        ({"refit": True}, "refit"),
        ({"view": "tokens"}, "view"),
    ],
)
def test_settings_that_do_not_parse(given, message):
    with pytest.raises(ConfigError, match=naming(message)):
        parse_setting(given)


def test_settings_that_are_none():
    with pytest.raises(UnknownNameError, match=naming("droput dropout")):
        parse_setting({"droput": 0.5})
