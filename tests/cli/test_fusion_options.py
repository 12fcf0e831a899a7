"""Options of fusions and parts that are left out, on the command line."""

import json
import re
import shutil

import numpy as np
import pytest

from cachefuse.errors import ConfigError
from cachefuse.fusion.cma import CMAFusion
from cachefuse.fusion.declared import declared
from cachefuse.fusion.tirg import TIRGFusion
from cachefuse.runs.save import load_run
from cachefuse.settings import settings_of
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import resolve
from cachefuse_cli.shared.train_options import parse_config
from fixtures.messages import naming, says

N = 10**6  # rows, of which an epoch makes enough steps


def given(**values):
    """What the command line says where these options are given."""
    return {**{name: one.default for name, one in settings_of(TrainConfig).items()}, **values}


def test_the_command_line_parses_options_and_parts():
    ablate = ["modality-attention", "sequence-attention", "modality-attention"]
    config = parse_config(given(fusion="cma", fusion_options=["depth=1", "dropout=0.3"], ablate=ablate))
    assert config == TrainConfig(
        fusion="cma",
        fusion_options={"depth": "1", "dropout": "0.3"},
        ablate=("modality-attention", "sequence-attention"),
    )
    options = resolve(config, "multilabel", N).fusion_options
    assert (options["depth"], options["dropout"]) == (1, 0.3)
    assert parse_config(given()) == TrainConfig()
    text = parse_config(given(fusion="tirg", fusion_options=["query=text"]))
    assert resolve(text, "multilabel", N).fusion_options == {"query": "text", "width": 512}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["depth"], "fusion-options name=value depth"),
        ([""], "fusion-options name=value"),
        (["depth=1", "depth=2"], "fusion-options depth"),
    ],
)
def test_what_does_not_parse_says_so(options, message):
    with pytest.raises(ConfigError, match=naming(message)):
        parse_config(given(fusion="cma", fusion_options=options))


@pytest.fixture
def in_workspace(tmp_path):
    """Have commands find a store."""

    def copy(store):
        shutil.copytree(store, tmp_path / "workspace" / "cache" / "made.zarr")

    return copy


def test_a_command_trains_with_options_and_parts(cachefuse, in_workspace, toy_store, tmp_path):
    in_workspace(toy_store().path)
    result = cachefuse(
        *("train-head", "--fusion", "cma", "--fusion-options", "depth=1", "--fusion-options", "width=8"),
        *("--fusion-options", "heads=2", "--ablate", "modality-attention"),
        *("--head", "linear", "--epochs", "2", "--json"),
    )
    assert result.code == 0
    run = load_run(tmp_path / "workspace" / "runs" / json.loads(result.out)["run"])
    assert run.config.fusion_options.items() >= {"depth": 1, "width": 8, "heads": 2, "dropout": 0.1}.items()
    assert run.config.ablate == ("modality-attention",)
    assert (run.config.lr, run.config.batch_size) == (3e-4, 64)
    assert sorted(run.features) == ["image", "image_tokens", "text", "text_tokens"]
    (listed,) = json.loads(cachefuse("runs", "--json").out)
    assert listed["settings"]["ablate"] == ["modality-attention"]
    assert "lr" not in listed["settings"]


@pytest.fixture
def made(made_once, toy_store):
    """The path of the toy store that all commands are refused on."""
    return made_once("made.zarr", lambda path: toy_store().path.rename(path))


@pytest.mark.parametrize(
    ("fusion", "args", "message"),
    [
        ("cma", ["dept=1"], "fusion cma dept depth width heads dropout"),
        ("cma", ["depth=x"], "fusion depth x"),
        ("cma", ["depth"], "fusion-options name=value depth"),
        ("cma", ["heads=5"], "width 5 heads"),
        ("cma", ["width=-6"], "width 1 -6"),
        ("cma", ["dropout=2"], "dropout 0 1 2.0"),
        ("cma", ["dropout=nan"], "dropout number nan"),
        ("tirg", ["width=0"], "width 1 0"),
        ("tirg", ["query=x"], "fusion tirg x image text"),
        ("sum", ["depth=1"], "fusion sum depth"),
        ("cma", ["depth=1", "--ablate", "text"], "fusion cma text modality-attention"),
        ("tirg", ["width=8", "--ablate", "gate"], "fusion tirg gate"),
        ("cma", ["depth=1", "--optimizer", "lbfgs", "--head", "linear"], "optimizer lbfgs"),
    ],
    ids=str,
)  # fmt: skip
def test_a_command_says_in_one_line_what_is_wrong(fusion, args, message, cachefuse, in_workspace, made, tmp_path):
    in_workspace(made)
    result = cachefuse("train-head", "--fusion", fusion, "--fusion-options", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert not (tmp_path / "workspace" / "runs").exists()


def test_a_command_says_how_to_make_the_tokens_that_are_not_there(cachefuse, in_workspace, make_store, tmp_path):
    rng = np.random.default_rng(0)
    x = {m: rng.normal(size=(20, 3)).astype(np.float16) for m in ("image", "text")}
    in_workspace(make_store(x, np.ones((20, 2), np.int8), ["train"] * 20).path)
    result = cachefuse("train-head", "--fusion", "cma")
    assert (result.code, result.out) == (1, "")
    assert says(result.error, "workspace/cache/made.zarr tokens image extract")
    assert "--dataset made --encoder toy --views pooled,tokens" in result.error
    assert cachefuse("train-head", "--fusion", "cma", "--ablate", "sequence-attention", "--epochs", "1").code == 0
    assert len(list((tmp_path / "workspace" / "runs").glob("*-cma-*/run.json"))) == 1


def test_the_help_names_options_and_parts(cachefuse):
    result = cachefuse("train-head", "--help")
    text = re.sub(r"[\s│]+", " ", result.out)
    assert result.code == 0
    for fusion in (CMAFusion, TIRGFusion):
        defaults = (f"{name} {value}" for name, value in fusion.options().items() if value not in ("", None))
        assert f"{fusion.name}: {', '.join(defaults)}" in text
    assert f"cma: {', '.join(CMAFusion.parts)}" in text


@pytest.mark.parametrize("fusion", ["midfusion", "tirg"])
def test_help_in_place_of_options_explains_them(fusion, cachefuse):
    result = cachefuse("train-head", "--fusion", fusion, "--fusion-options", "help")
    options = declared(fusion).options
    assert (result.code, len(result.out.splitlines())) == (0, len(options))
    assert all(f"{option.name}={option.default} " in result.out and option.help in result.out for option in options)


def test_earlier_names_of_options_are_taken_with_a_note(cachefuse, in_workspace, made):
    in_workspace(made)
    old = ("--without", "sequence-attention", "--view", "pooled")
    result = cachefuse("train-head", "--fusion", "cma", *old, "--epochs", "1", "--json")
    assert result.code == 0
    assert all(name in result.err for name in ("--without", "--ablate", "--view ", "--views"))
    (listed,) = json.loads(cachefuse("runs", "--json").out)
    assert listed["settings"]["ablate"] == ["sequence-attention"]
    result = cachefuse("evaluate", "--without", "image", "--no-intervals", "--json")
    assert (result.code, json.loads(result.out)["without"]) == (0, ["image"])
    assert "--drop-modality" in result.err
