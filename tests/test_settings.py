"""A setting is one line: a field that says what it is, which options, grids, checks, files and texts then know."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cachefuse.alignment.config import AlignConfig
from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.experiments.settings import grid_values, parse_setting
from cachefuse.fusion import FUSIONS
from cachefuse.settings import as_stored, check_settings, from_stored, setting, settings_of
from cachefuse.training.config import TrainConfig
from cachefuse_cli.shared.setting_options import METAVARS, Command, read, takes
from fixtures.messages import naming

COLORS = {"red": 1, "green": 2}


@dataclass(frozen=True)
class Warmer(TrainConfig):
    """The settings of a training and one line more."""

    warmth: float | None = setting(0.5, "How warm {choices} is.", panel="Mine", least=0, below=1, shown="a half")


@dataclass(frozen=True)
class Every:
    """A setting of every kind."""

    color: str = setting("red", "{choices}.", choices=COLORS)
    size: int | None = setting(None, words={"all": 0}, least=0, most=9)
    widths: tuple[int, ...] = setting((), most=100)
    names: tuple[str, ...] = setting((), old="words")
    shares: Mapping[str, float] = setting(dict, least=0, most=1)
    fast: bool = setting(False)
    rate: float = setting(1.0, above=0)
    kind: str = setting("a", choices=("a", "b", "c"), unfit={"c": "is for others"})
    steps: tuple[str, ...] = setting((), repeats=True)

    def __post_init__(self):
        check_settings(self)


def command_of(config):
    """A command with an option for each setting, which keeps what it was called with."""
    app, called = typer.Typer(), []

    @takes(config, lambda given: config(**read(config, given)))
    def command(config):
        called.append(config())

    app.command(cls=Command)(command)
    return app, called


def call(config, *args):
    app, called = command_of(config)
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return called[0] if called else " ".join(result.output.replace("│", " ").split())


def test_one_line_more_is_an_option():
    assert call(Warmer, "--warmth", "0.25").warmth == 0.25
    assert call(Warmer).warmth == 0.5
    assert "--warmth X How warm is. [default: (a half)]" in call(Warmer, "--help")


def test_one_line_more_is_in_grids():
    assert grid_values("warmth", "0.1,0.2", Warmer) == ("0.1", "0.2")
    assert parse_setting({"warmth": "0.1"}, Warmer) == {"warmth": 0.1}
    with pytest.raises(UnknownNameError, match=naming("setting warmth")):
        parse_setting({"warmth": "0.1"})


@pytest.mark.parametrize("value", [-0.1, 1, float("nan"), "warm"])
def test_one_line_more_is_checked(value):
    with pytest.raises(ConfigError, match=naming("warmth")):
        Warmer(warmth=value)


def test_one_line_more_is_kept():
    assert from_stored(Warmer, as_stored(Warmer, {"warmth": 0.1, "ablate": ("x",)})) == {
        "warmth": 0.1,
        "ablate": ("x",),
    }


@pytest.mark.parametrize(
    ("name", "given", "value", "text"),
    [
        ("color", "green", "green", "green"),
        ("size", "3", 3, "3"),
        ("size", "all", 0, "all"),
        ("size", None, None, "None"),
        ("widths", "8,4", (8, 4), "8,4"),
        ("widths", [8, 4], (8, 4), "8,4"),
        ("names", ["a,b", "c", "a"], ("a", "b", "c"), "a,b,c"),
        ("names", "none", (), ""),
        ("names", None, (), ""),
        ("shares", ["a=0.5", "b=1"], {"a": 0.5, "b": 1.0}, "a=0.5 b=1"),
        ("shares", {"a": 1}, {"a": 1.0}, "a=1"),
        ("fast", "true", True, "True"),
        ("rate", 2, 2.0, "2"),
        ("steps", "a,b,a", ("a", "b", "a"), "a,b,a"),
        ("size", np.int64(3), 3, "3"),
        ("widths", (np.int32(8), 4), (8, 4), "8,4"),
        ("widths", np.array([8, 4]), (8, 4), "8,4"),
        ("widths", range(8, 10), (8, 9), "8,9"),
        ("shares", {"a": np.float32(0.5)}, {"a": 0.5}, "a=0.5"),
        ("fast", np.True_, True, "True"),
        ("rate", np.float16(2), 2.0, "2"),
    ],
)
def test_values_are_parsed_and_written_the_same_way(name, given, value, text):
    one = settings_of(Every)[name]
    parsed = one.parse(given)
    assert (parsed, type(parsed)) == (value, type(value))
    assert one.text(parsed) == text
    one.check(parsed)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("size", "0"),  # it has a word of its own
        ("size", "some"),
        ("size", 1.5),
        ("widths", "8,x"),
        ("widths", 8),
        ("names", 3),
        ("shares", ["a"]),
        ("shares", ["a=1", "a=0"]),
        ("shares", ["a=x"]),
        ("fast", "maybe"),
        ("rate", "x"),
        ("rate", True),
    ],
)
def test_what_does_not_parse_names_the_setting(name, given):
    with pytest.raises(ConfigError, match=naming(name)):
        settings_of(Every)[name].parse(given)


@pytest.mark.parametrize(
    "value",
    [
        {"color": "grean"}, {"color": 3}, {"size": 10}, {"size": -1}, {"size": True}, {"size": "3"}, {"widths": (101,)},
        {"widths": ("8",)}, {"names": "a"}, {"names": (1,)}, {"shares": {"a": 2}}, {"shares": {"a": "x"}},
        {"shares": []}, {"fast": 1}, {"size": "all"}, {"rate": 0}, {"rate": None}, {"kind": "d"}, {"kind": "c"},
    ],
)  # fmt: skip
def test_what_is_out_of_range_names_the_setting(value):
    with pytest.raises((ConfigError, UnknownNameError), match=naming(next(iter(value)))):
        Every(**value)


def test_what_fits_is_taken():
    Every("green", 9, (100, 1), ("a",), {"a": 0, "b": 1}, True, 1, "b")


def test_an_earlier_name_is_taken_with_a_note(capsys):
    assert call(Every, "--names", "a", "--words", "b,c").names == ("a", "b", "c")
    assert "--words" not in call(Every, "--help")
    assert from_stored(Every, {"words": ["a"]}) == {"names": ("a",)}
    assert as_stored(Every, {"names": ("a",)}) == {"words": ("a",)}
    with pytest.raises(ConfigError, match=naming("colour")):
        from_stored(Every, {"colour": "red"})


@pytest.mark.parametrize("config", [TrainConfig, AlignConfig])
def test_every_setting_says_what_it_is(config):
    for one in settings_of(config).values():
        assert one.help()[-1] in ".?", one.name
        assert one.about.panel, one.name
        assert one.kind in METAVARS, one.name
        one.check(one.default)


def test_help_lists_what_is_in_a_registry(monkeypatch):
    monkeypatch.setitem(FUSIONS, "newest", "no.such:Thing")
    text = call(TrainConfig, "--help")
    assert "mixed, neighbours, newest, prototype, sum" in " ".join(text.split())
    assert "--refit" in text
    assert "--no-refit" in text
