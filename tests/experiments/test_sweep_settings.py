"""Settings that a sweep tries, as they are given."""

import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.experiments.settings import grid, parse_setting


def test_a_grid_is_every_combination():
    assert grid({"loss": ["bce", "asl"], "lr": [1, 2]}) == [
        {"loss": "bce", "lr": 1},
        {"loss": "bce", "lr": 2},
        {"loss": "asl", "lr": 1},
        {"loss": "asl", "lr": 2},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "the grid has no fields"), ({"lr": [1], "loss": []}, "the grid has no values for loss")],
)
def test_an_empty_grid(values, message):
    with pytest.raises(ConfigError, match=message):
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
        ({"dropout": "x"}, "dropout must be a number. Got 'x' instead"),
        ({"dropout": ""}, "dropout must be a number. Got '' instead"),
        ({"epochs": 1.5}, "epochs must be a whole number. Got 1.5 instead"),
        ({"layers": "8-x"}, "layers must be widths such as 2048-512. Got '8-x' instead"),
        ({"layers": "-8"}, "layers must be widths such as 2048-512. Got '-8' instead"),
        ({"loss": 3}, "loss must be a name. Got 3 instead"),
        (
            {"loss_options": {"gamma": "two"}},
            "loss_options must be a table of numbers, in a --settings file: .* Got {'gamma': 'two'} instead",
        ),
        ({"seed": 3}, "seed can't differ between settings: seeds are given apart"),
        ({"refit": True}, "refit can't differ between settings: models trained on every row have none left"),
        ({"view": "tokens"}, "view can't differ between settings: a sweep reads its features once"),
    ],
)
def test_settings_that_do_not_parse(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_setting(given)


def test_settings_that_are_none():
    with pytest.raises(UnknownNameError, match=r"unknown setting 'droput' \(did you mean 'dropout'\?\)"):
        parse_setting({"droput": 0.5})
