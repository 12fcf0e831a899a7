"""Options of fusions, parts that are left out, and settings of their own: checked once, kept with the run."""

import json
import logging
import math
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from cachefuse.errors import ConfigError, RunError
from cachefuse.fusion.cma import CMAFusion
from cachefuse.fusion.tirg import TIRGFusion
from cachefuse.training.config import TrainConfig
from cachefuse.training.run import Run, build_model
from cachefuse.training.selection import load_table, select_features
from cachefuse.training.train import train_head
from cachefuse_cli.app import main
from cachefuse_cli.train_options import DEFAULTS, parse_config

SMALL = {"depth": 1, "width": 8, "heads": 2}
N = 10**6  # rows, of which an epoch makes enough steps


def resolve(n_rows=N, task="multilabel", **settings):
    return TrainConfig(**settings).resolve(task, n_rows)


# Checked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fusion": "cma", "fusion_options": {"dept": 1}},
            r"fusion 'cma' has no option 'dept'; its options are: depth, width, heads, dropout",
        ),
        ({"fusion": "tirg", "fusion_options": {"depth": 1}}, r"'tirg' has no option 'depth'; its options are: query"),
        ({"fusion": "sum", "fusion_options": {"depth": 1}}, r"fusion 'sum' has no option 'depth'; it has none"),
        ({"fusion": "cma", "fusion_options": {"without": ()}}, r"fusion 'cma' has no option 'without'; its option"),
        ({"fusion": "cma", "fusion_options": {"head": 1}}, r"fusion 'cma' has no option 'head'"),
        (
            {"fusion": "cma", "fusion_options": {"depth": "two"}},
            r"fusion option depth must be a whole number\. Got 'two' instead",
        ),
        ({"fusion": "cma", "fusion_options": {"depth": "1.5"}}, r"depth must be a whole number\. Got '1\.5' instead"),
        ({"fusion": "cma", "fusion_options": {"depth": ""}}, r"depth must be a whole number\. Got '' instead"),
        (
            {"fusion": "cma", "fusion_options": {"dropout": "some"}},
            r"fusion option dropout must be a number\. Got 'some' instead",
        ),
        ({"fusion": "tirg", "fusion_options": {"width": "wide"}}, r"width must be a whole number\. Got 'wide' instead"),
        (
            {"fusion": "cma", "without": ("attention",)},
            r"fusion 'cma' has no 'attention' to leave out; its parts are: modality-attention, sequence-attention",
        ),
        (
            {"fusion": "cma", "without": ("modality-attention", "image")},
            r"fusion 'cma' has no 'image' to leave out; its parts are: modality-attention, sequence-attention",
        ),
        ({"fusion": "tirg", "without": ("gate",)}, r"'tirg' has no 'gate' to leave out; its parts are: none"),
        ({"fusion": "sum", "without": ("meta",)}, r"fusion 'sum' has no 'meta' to leave out; its parts are: none"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_what_the_fusion_does_not_have(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**settings)


def test_a_training_refuses_them_too(toy_store):
    store = toy_store()
    for settings, message in (
        ({"fusion_options": {"dept": 1}}, "has no option 'dept'"),
        ({"without": ("attention",)}, "has no 'attention' to leave out"),
        ({"fusion_options": {"depth": 0}}, r"depth must be at least 1\. Got 0"),
        ({"fusion_options": {"heads": 5}}, r"width must be a multiple of 5, the attention heads\. Got \d+ instead"),
        ({"fusion_options": {"dropout": 2}}, r"dropout must be at least 0 and below 1\. Got 2\.0 instead"),
        ({"fusion_options": {"dropout": math.nan}}, r"dropout must be at least 0 and below 1\. Got nan instead"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_head(store, TrainConfig(fusion="cma", **settings))
    with pytest.raises(ConfigError, match=r"adjusts a query, 'audio' here, by one other modality\. Got image, text"):
        train_head(store, TrainConfig(fusion="tirg", fusion_options={"query": "audio"}))


@pytest.mark.parametrize("fusion", ["cma", "tirg"])
def test_lbfgs_is_for_linear_models(fusion):
    with pytest.raises(ConfigError, match=f"optimizer 'lbfgs' is for linear models. Got fusion '{fusion}'; take adam"):
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
    config = TrainConfig(fusion="cma", fusion_options={"depth": 1}, without=("modality-attention",))
    assert config.own_options() == {"depth": 1, "without": ("modality-attention",)}
    assert resolve(fusion="cma").own_options().keys() >= {"depth", "width", "heads", "dropout"}
    assert "without" not in resolve(fusion="cma").own_options()


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
    # What training reads before anything is resolved is no other.
    open_ended = TrainConfig(fusion="cma")
    assert (open_ended.learning_rate, open_ended.penalty, open_ended.rows_a_step) == (3e-4, 1e-4, 64)
    assert open_ended.head_options()["dropout"] == 0.2
    assert TrainConfig().head_options()["dropout"] == 0.8


def test_what_is_given_wins():
    given = {"dropout": 0.5, "lr": 1e-2, "weight_decay": 0.3, "epochs": 7, "batch_size": 32}
    config = resolve(fusion="cma", **given)
    assert {name: getattr(config, name) for name in given} == given
    zeros = resolve(fusion="cma", dropout=0.0, weight_decay=0.0, batch_size=0)  # 0 is given, too; batches of all rows
    assert (zeros.dropout, zeros.weight_decay, zeros.batch_size, zeros.rows_a_step) == (0.0, 0.0, 0, 0)
    assert zeros.lr == 3e-4


def test_resolving_twice_changes_nothing():
    for settings in ({"fusion": "cma", "fusion_options": {"depth": "1"}}, {"fusion": "tirg"}, {"fusion": "sum"}):
        once = resolve(n_rows=100, **settings)
        assert once.resolve("multilabel", 100) == once
        assert once.resolve("multilabel", N) == once  # none is left open


def test_the_rate_of_another_optimizer_is_its_own():
    assert resolve(fusion="cma", optimizer="adamw").lr == 3e-4
    assert resolve(fusion="cma", optimizer="sgd").lr == 0.05
    assert resolve(fusion="cma", optimizer="sgd", lr=0.1).lr == 0.1


def test_views_are_those_that_the_fusion_reads():
    assert TrainConfig(fusion="cma").views("text") == ("pooled", "tokens")
    assert TrainConfig(fusion="cma", without=("sequence-attention",)).views("text") == ("pooled",)
    assert TrainConfig(fusion="tirg").views("image") == ("pooled",)
    assert TrainConfig(fusion="sum").views("image") == ("pooled",)
    assert TrainConfig(fusion="sum", view="tokens").views("image") == ("flat",)
    assert TrainConfig(fusion="cma", view="tokens").views("text") == ("pooled", "tokens")


@pytest.mark.parametrize("without", [(), ("modality-attention",), ("sequence-attention",)], ids=str)
def test_the_model_is_the_one_that_the_settings_describe(without, toy_store):
    store, config = toy_store(), resolve(fusion="cma", fusion_options={**SMALL, "depth": "3"}, without=without)
    table = load_table(store, select_features(store, views=config.views), config.views)
    model = build_model(config, {name: x.shape[1] for name, x in table.features.items()}, 3)
    fusion = model.fusion
    assert len(fusion.blocks) == (0 if "sequence-attention" in without else 3)
    assert (fusion.relevance is None) == ("modality-attention" in without)
    assert {m.p for m in fusion.blocks.modules() if isinstance(m, torch.nn.Dropout)} <= {0.1}
    assert [m.p for m in fusion.head.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]
    assert list(model.widths) == sorted(table.features)


# Shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"fusion": "cma"}, {"fusion": "cma"}),
        ({"fusion": "cma", "lr": 3e-4, "dropout": 0.2, "epochs": 15}, {"fusion": "cma"}),
        ({"fusion": "cma", "lr": 1e-3, "dropout": 0.8}, {"fusion": "cma", "lr": 1e-3, "dropout": 0.8}),
        ({"fusion": "cma", "fusion_options": {"depth": 2, "width": str(CMA["width"])}}, {"fusion": "cma"}),
        ({"fusion": "cma", "without": ("modality-attention",)}, {"fusion": "cma", "without": ("modality-attention",)}),
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


# Kept with the run


@pytest.mark.parametrize(
    ("fusion", "options", "without"),
    [
        ("cma", SMALL, ("modality-attention",)),
        ("cma", {**SMALL, "dropout": "0"}, ("modality-attention", "sequence-attention")),
        ("tirg", {"query": "text", "width": "8"}, ()),
    ],
)
def test_a_run_keeps_options_and_parts(fusion, options, without, toy_store, tmp_path):
    config = TrainConfig(fusion=fusion, fusion_options=options, without=without, head="linear", epochs=2)
    run = train_head(toy_store(), config)
    path = run.save(tmp_path / "runs")
    again = Run.load(path)
    assert again.config == run.config
    assert again.config.without == without
    assert again.members[0].config == run.members[0].config
    assert again.config.fusion_options.items() >= {
        name: {"width": int, "dropout": float}.get(name, type(x))(x) for name, x in options.items()
    }.items()  # fmt: skip
    written = json.loads((path / "run.json").read_text())["config"]
    assert (written["fusion_options"], written["without"]) == (run.config.fusion_options, list(without))
    one, two = (x.members[0].model.state_dict() for x in (run, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    card = (path / "README.md").read_text()
    assert all(part in card for part in without)
    assert "width=8" in card


def test_a_run_of_before_there_were_options_loads(toy_store, tmp_path):
    path = train_head(toy_store(), TrainConfig(head="linear", epochs=2)).save(tmp_path / "runs")
    values = json.loads((path / "run.json").read_text())
    for config in (values["config"], *(member["config"] for member in values["members"])):
        del config["fusion_options"], config["without"]
    (path / "run.json").write_text(json.dumps(values))
    run = Run.load(path)
    assert (run.config.fusion_options, run.config.without) == ({}, ())


@pytest.mark.parametrize(
    "change",
    [
        {"fusion_options": {"dept": 1}}, {"fusion_options": {**SMALL, "depth": 1.5}}, {"fusion_options": None},
        {"fusion_options": {**SMALL, "heads": 3}}, {"fusion_options": {**SMALL, "width": -8}}, {"without": 3},
        {"without": None}, {"with": ["modality-attention"]},
    ],
    ids=str,
)  # fmt: skip
def test_options_edited_into_nonsense_are_refused(change, saved):
    values = json.loads((saved / "run.json").read_text())
    values["members"][0]["config"].update(change)
    (saved / "run.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"run\.json: not a run's description: "):
        Run.load(saved)


def test_options_that_do_not_fit_the_weights_are_refused(saved):
    values = json.loads((saved / "run.json").read_text())
    for change in ({"fusion_options": {**SMALL, "depth": 2}}, {"without": ["modality-attention"]}):
        values["members"][0]["config"].update(change)
        (saved / "run.json").write_text(json.dumps(values))
        with pytest.raises(RunError, match=r"model\.safetensors: the weights don't fit the run's settings"):
            Run.load(saved)


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def saved(folder_of_runs, tmp_path, toy_store):
    """A copy of a run of cma, trained once."""
    if not (folder_of_runs / "run").exists():
        run = train_head(toy_store(), TrainConfig(fusion="cma", fusion_options=SMALL, head="linear", epochs=1))
        run.save(tmp_path / "first").rename(folder_of_runs / "run")
    return shutil.copytree(folder_of_runs / "run", tmp_path / "run")


# On the command line


def given(**values):
    """What the command line says where these options are given."""
    return {**{field.name: DEFAULTS.get(field.name, field.default) for field in fields(TrainConfig)}, **values}


def test_the_command_line_parses_options_and_parts():
    without = ["modality-attention", "sequence-attention", "modality-attention"]
    config = parse_config(given(fusion="cma", fusion_options=["depth=1", "dropout=0.3"], without=without))
    assert config == TrainConfig(
        fusion="cma",
        fusion_options={"depth": "1", "dropout": "0.3"},
        without=("modality-attention", "sequence-attention"),
    )
    options = config.resolve("multilabel", N).fusion_options
    assert (options["depth"], options["dropout"]) == (1, 0.3)
    assert parse_config(given()) == TrainConfig()
    text = parse_config(given(fusion="tirg", fusion_options=["query=text"]))
    assert text.resolve("multilabel", N).fusion_options == {"query": "text", "width": 512}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["depth"], r"fusion-options are given as depth=2\. Got 'depth' instead"),
        ([""], r"fusion-options are given as depth=2\. Got '' instead"),
        (["depth=1", "depth=2"], "fusion option depth is given twice"),
    ],
)
def test_what_does_not_parse_says_so(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(given(fusion="cma", fusion_options=options))


@pytest.fixture
def cachefuse(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; its exit code, results, and messages line by line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("CACHEFUSE_WORKSPACE", raising=False)
    logger = logging.getLogger("cachefuse")
    handlers, propagate = list(logger.handlers), logger.propagate

    def run(*args):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit.value.code or 0, captured.out, captured.err.splitlines()

    yield run
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def in_workspace(tmp_path):
    """Have commands find a store."""

    def copy(store):
        shutil.copytree(store, tmp_path / "workspace" / "cache" / "made.zarr")

    return copy


def test_a_command_trains_with_options_and_parts(cachefuse, in_workspace, toy_store, tmp_path):
    in_workspace(toy_store().path)
    code, out, _ = cachefuse(
        *("train-head", "--fusion", "cma", "--fusion-options", "depth=1", "--fusion-options", "width=8"),
        *("--fusion-options", "heads=2", "--without", "modality-attention"),
        *("--head", "linear", "--epochs", "2", "--json"),
    )
    assert code == 0
    run = Run.load(tmp_path / "workspace" / "runs" / json.loads(out)["run"])
    assert run.config.fusion_options.items() >= {**SMALL, "dropout": 0.1}.items()
    assert run.config.without == ("modality-attention",)
    assert (run.config.lr, run.config.batch_size) == (3e-4, 64)
    assert sorted(run.features) == ["image", "image_tokens", "text", "text_tokens"]
    code, out, _ = cachefuse("runs", "--json")
    (listed,) = json.loads(out)
    assert listed["settings"]["without"] == ["modality-attention"]
    assert "lr" not in listed["settings"]


@pytest.mark.parametrize(
    ("fusion", "args", "message"),
    [
        ("cma", ["dept=1"], "fusion 'cma' has no option 'dept'; its options are: depth, width, heads, dropout"),
        ("cma", ["depth=x"], "fusion option depth must be a whole number. Got 'x' instead"),
        ("cma", ["depth"], "fusion-options are given as depth=2. Got 'depth' instead"),
        ("cma", ["heads=5"], "width must be a multiple of 5, the attention heads. Got "),
        ("cma", ["width=-6"], "width must be at least 1. Got -6 instead"),
        ("cma", ["dropout=2"], "dropout must be at least 0 and below 1. Got 2.0 instead"),
        ("cma", ["dropout=nan"], "dropout must be at least 0 and below 1. Got nan instead"),
        ("tirg", ["width=0"], "width must be at least 1. Got 0 instead"),
        ("tirg", ["query=x"], "fusion 'tirg' adjusts a query, 'x' here, by one other modality. Got image, text"),
        ("sum", ["depth=1"], "fusion 'sum' has no option 'depth'; it has none"),
        ("cma", ["depth=1", "--without", "text"], "fusion 'cma' has no 'text' to leave out; its parts are: modality-a"),
        ("tirg", ["width=8", "--without", "gate"], "fusion 'tirg' has no 'gate' to leave out; its parts are: none"),
        ("cma", ["depth=1", "--optimizer", "lbfgs", "--head", "linear"], "optimizer 'lbfgs' is for linear models. Got"),
    ],
    ids=str,
)  # fmt: skip
def test_a_command_says_in_one_line_what_is_wrong(fusion, args, message, cachefuse, in_workspace, made, tmp_path):
    in_workspace(made)
    code, out, err = cachefuse("train-head", "--fusion", fusion, "--fusion-options", *args)
    assert (code, out) == (1, "")
    (line,) = [line for line in err if line.startswith("error: ")]
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "workspace" / "runs").exists()


@pytest.fixture
def made(folder_of_runs, toy_store):
    """The path of the toy store, made once."""
    if not (folder_of_runs / "made.zarr").exists():
        toy_store().path.rename(folder_of_runs / "made.zarr")
    return folder_of_runs / "made.zarr"


def test_a_command_says_how_to_make_the_tokens_that_are_not_there(cachefuse, in_workspace, make_store, tmp_path):
    rng = np.random.default_rng(0)
    x = {m: rng.normal(size=(20, 3)).astype(np.float16) for m in ("image", "text")}
    in_workspace(make_store(x, np.ones((20, 2), np.int8), ["train"] * 20).path)
    code, out, err = cachefuse("train-head", "--fusion", "cma")
    assert (code, out) == (1, "")
    assert err == [
        "error: workspace/cache/made.zarr holds no tokens of image; make them with cachefuse extract --dataset made "
        "--encoder toy --views pooled,tokens"
    ]
    assert cachefuse("train-head", "--fusion", "cma", "--without", "sequence-attention", "--epochs", "1")[0] == 0
    assert len(list((tmp_path / "workspace" / "runs").glob("*-cma-*/run.json"))) == 1


def test_the_help_names_options_and_parts(cachefuse):
    code, out, _ = cachefuse("train-head", "--help")
    text = re.sub(r"[\s│]+", " ", out)
    assert code == 0
    for fusion in (CMAFusion, TIRGFusion):
        defaults = (f"{name} {value}" for name, value in fusion.options().items() if value not in ("", None))
        assert f"{fusion.name}: {', '.join(defaults)}" in text
    assert f"cma: {', '.join(CMAFusion.parts)}" in text
