"""Settings that a sweep tries, as they are given."""

import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.experiments.settings import grid, grid_values, parse_setting
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
        ({"layers": "2048,512"}, {"layers": (2048, 512)}),
        ({"layers": [2048, 512]}, {"layers": (2048, 512)}),
        ({"layers": "64"}, {"layers": (64,)}),
        ({"batch_size": "all"}, {"batch_size": 0}),
        ({"batch_size": "256"}, {"batch_size": 256}),
        ({"loss_options": {"gamma": "2", "reduction": "sum"}}, {"loss_options": {"gamma": 2.0, "reduction": "sum"}}),
        ({"ablate": "one,two", "stages": ["warm-up"]}, {"ablate": ("one", "two"), "stages": ("warm-up",)}),
        ({"ablate": "none"}, {"ablate": ()}),
        ({"shuffle": {"text": 1}}, {"shuffle": {"text": 1.0}}),
        ({"loss_options": "gamma=2"}, {"loss_options": {"gamma": 2.0}}),
        ({"fusion": "mixed", "monitor": None}, {"fusion": "mixed", "monitor": None}),
    ],
)
def test_settings_take_text_and_values(given, parsed):
    assert parse_setting(given) == parsed


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"dropout": "x"}, "dropout x"),
        ({"dropout": ""}, "dropout"),
        ({"dropout": "1.5"}, "dropout 1.5"),
        ({"epochs": 1.5}, "epochs 1.5"),
        ({"layers": "8-x"}, "layers 8-x"),
        ({"layers": "-8"}, "layers -8"),
        ({"layers": 8}, "layers 8"),
        ({"loss": 3}, "loss 3"),
        ({"shuffle": {"text": "some"}}, "shuffle text some"),
        ({"loss_options": "gamma"}, "loss-options gamma"),
        ({"seed": 3}, "seed"),
        ({"refit": True}, "refit"),
        ({"views": "tokens"}, "views"),
        ({"view": "tokens"}, "view"),
    ],
)
def test_settings_that_do_not_parse(given, names):
    with pytest.raises(ConfigError, match=naming(names)):
        parse_setting(given)


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("dropout", "0, 0.5", ("0", "0.5")),
        ("batch_size", "64,all", ("64", "all")),
        ("layers", "512 2048,512", ("512", "2048,512")),
        ("layers", "512", ("512",)),
        ("ablate", "none one one,two", ("none", "one", "one,two")),
        ("loss_options", "gamma=1 gamma=2", ("gamma=1", "gamma=2")),
    ],
)
def test_values_in_a_grid_are_spelled_as_options_are(name, text, values, caplog):
    assert grid_values(name, text) == values
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "text", "values", "advice"),
    [
        ("layers", "512,2048-512", ("512", "2048,512"), '"layers=512 2048,512"'),
        ("without", "one,one+two", ("one", "one,two"), '"ablate=one one,two"'),
        ("without", "one,two", ("one", "two"), '"ablate=one two"'),
        ("layers", "2048,512", ("2048,512",), '"layers=2048 512"'),  # of which the other meaning is told
    ],
)
def test_earlier_spellings_of_lists_in_a_grid_are_taken_with_a_warning(name, text, values, advice, caplog):
    assert grid_values(name, text) == values
    assert advice in caplog.text


@pytest.mark.parametrize(
    ("given", "parsed", "words"),
    [
        ({"layers": "2048-512"}, {"layers": (2048, 512)}, "2048,512"),
        ({"without": ["one"]}, {"ablate": ("one",)}, "ablate"),
    ],
)
def test_earlier_spellings_of_settings_are_taken_with_a_warning(given, parsed, words, caplog):
    assert parse_setting(given) == parsed
    assert words in caplog.text


def test_settings_that_are_none():
    with pytest.raises(UnknownNameError, match=naming("droput dropout")):
        parse_setting({"droput": 0.5})
