"""The presets against the papers' settings, read from the papers again, with the section or table of each.

``PAPERS`` holds what each paper states. A preset must train with these values, name the same places, and say of every
other setting what was chosen and why.
"""

import json
import re
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.presets import ALIGNMENTS
from cachefuse.errors import ConfigError
from cachefuse.experiments.presets import PRESETS, preset, preset_views
from cachefuse.experiments.recipe import CROSS_ENTROPY, Recipe
from cachefuse.experiments.recipes import SWEEPS, TRAININGS
from cachefuse.experiments.sweep import run_sweep
from cachefuse.nn import ATTENTION_HEADS
from cachefuse.nn.t5 import T5Settings
from cachefuse.runs.save import load_run
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse_cli.app import build_app
from fixtures.messages import naming

RECIPES: dict[str, Recipe] = {**TRAININGS, **SWEEPS, **ALIGNMENTS}
KINDS = {"multilabel": ["multilabel"], "multiclass": ["multiclass"], "vqa": ["vqa"]}

# MMC, "Multimodal Multilabel Classification by CLIP": table 1, section 4.1.2 (all rows in a step), table 5 (layers).
MMC = {
    "optimizer": ("adam", "table 1"), "lr": (0.001, "table 1"), "activation": ("gelu", "table 1"),
    "dropout": (0.5, "table 1"), "epochs": (200, "table 1"), "batch_size": (0, "section 4.1.2"),
    "layers": ((2048,), "table 5"), "patience": (0, "section 4.2.2"), "monitor": ("samples_f1", "section 4.1.1"),
    "head": ("mlp", "section 4.2.1"), "fusion": ("sum", "section 4.2.2"), "scheme": ("staged", "section"),
}  # fmt: skip
BCE = {"loss": (CROSS_ENTROPY, "section 4.2.3")}  # chosen there, for what follows
FOUR_LAYERS = {"layers": ((2048, 512), "section 4.3.1")}
LONGER = {"epochs": (300, "section 4.3.3")}
CMA = {
    "fusion_options.depth": (12, "section 3.2.1"), "fusion_options.width": (512, "section 3.2.1"),
    "fusion_options.heads": (8, "section 3.2.1"), "batch_size": (1024, "section 3.2.1"),
    "optimizer": ("adam", "section 3.2.1"), "weight_decay": (1e-4, "section 3.2.1"), "lr": (1e-5, "section 3.2.1"),
    "epochs": (100, "section 3.2.2"), "monitor": ("loss", "section 3.2.2"), "head": ("mlp", "section 2.3"),
    "fusion": ("cma", "section 2"),
}  # fmt: skip
LIT = {
    "loss": (CROSS_ENTROPY, "section 3.2"), "lr": (5e-5, "section 4.1"), "batch_size": (128, "section 4.1"),
    "epochs": (30, "section 4.1"), "head": ("mlp", "section 3.1"), "fusion_options.grid": (0, "section 4.1"),
    "fusion": ("lit", "section 3"), "ablate": ((), "section 3.3"),
}  # fmt: skip
PAPERS: dict[str, dict[str, tuple[Any, str]]] = {
    "mmc-heads": {**MMC, "fusion": ("image", "section 4.2.1")},
    "mmc-fusion": MMC,
    "mmc-losses": {**MMC, "epochs": (300, "section 4.2.3")},
    "mmc-layers": {**MMC, **BCE},
    "mmc-batch": {**MMC, **BCE, **FOUR_LAYERS},
    "mmc-epochs": {**MMC, **BCE, **FOUR_LAYERS},
    "mmc-activation": {**MMC, **BCE, **FOUR_LAYERS, **LONGER},
    "mmc-dropout": {**MMC, **BCE, **FOUR_LAYERS, **LONGER},
    "mmc-greedy": {**MMC, **BCE, "refit": (True, "section 4.5")},
    "mmc-paper": {
        **MMC, **BCE, "layers": ((2048, 512), "section 4.5"), "dropout": (0.6, "table 12"), "epochs": (300, "table 12"),
        "lr": (0.001, "table 12"), "batch_size": (0, "table 12"), "refit": (True, "section 4.5"),
    },
    "cma-paper": CMA,
    "cma-irrelevant": {**CMA, "epochs": (20, "section 3.2.2")},
    "lit-paper": LIT,
    "lit-table": LIT,
    "where-to-fuse": {"fusion": ("midfusion", "section 2.2")},
    "cbmf-paper": {
        "method": ("dfe", "section III"), "op": ("add", "section IV-C"), "targets": ("soft", "equations 5 and 6"),
        "epochs": (500, "section IV-A"), "monitor": ("loss", "section IV-A"),
    },
}  # fmt: skip
# What extract and the data must be: the text tokens of LiT, the threshold of CBMF's pairs.
FEATURES: dict[str, dict[str, tuple[Any, str]]] = {
    "lit-paper": {"--max-tokens": (256, "4.1")},
    "cbmf-paper": {"pairs --threshold": (0.7, "section IV-B")},
}


def config_of(name, task="multilabel", **changes):
    recipe = RECIPES[name]
    if name in ALIGNMENTS:
        return AlignConfig(**{**recipe.values(task), **changes})
    return recipe.train_config(task, KINDS.get(task, ()), changes)


def test_every_preset_is_in_the_table():
    assert PAPERS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_states_what_its_paper_states(name):
    config, recipe = asdict(config_of(name)), RECIPES[name]
    stated = {known.name: known for known in recipe.stated}
    for setting, (value, place) in PAPERS[name].items():
        field, _, option = setting.partition(".")
        trained = config[field][option] if option else config[field]
        if value == CROSS_ENTROPY:
            assert trained == "bce"
        else:
            assert trained == value, setting
        assert stated[setting].value == value
        assert place in stated[setting].source


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_stated_of_the_features(name):
    found = {known.name: known for known in RECIPES[name].features}
    for option, (value, place) in FEATURES[name].items():
        assert found[option].value == value
        assert place in found[option].source


@pytest.mark.parametrize("name", PAPERS)
def test_no_setting_is_left_unsaid(name):
    recipe = RECIPES[name]
    config = AlignConfig if name in ALIGNMENTS else TrainConfig
    settings = [*(known.name for known in recipe.stated), *(known.name for known in recipe.chosen)]
    once = [*settings, *recipe.idle]
    assert len(once) == len({*once})
    named = {setting.partition(".")[0] for setting in once} | {*recipe.varies}
    assert named == {field.name for field in fields(config)}
    assert all(known.source for known in (*recipe.stated, *recipe.features, *recipe.for_tasks))
    assert all(known.reason for known in recipe.chosen)
    assert all(recipe.varies.values())
    assert all(re.search(r"section|table|figure|equation", known.source) for known in recipe.stated)


@pytest.mark.parametrize("name", sorted({*PAPERS} - {*ALIGNMENTS}))
def test_nothing_of_ours_is_trained_with(name):
    """Neither asl with its gammas, nor a schedule, nor thresholds chosen on rows held out."""
    for task, loss in {"multilabel": "bce", "multiclass": "ce", "vqa": "bce"}.items():
        config = config_of(name, task)
        assert (config.loss, config.schedule, config.thresholds) == (loss, "constant", "none")
        assert dict(config.loss_options) == {}
        assert None not in (config.dropout, config.lr, config.weight_decay, config.epochs, config.batch_size)
    several = RECIPES[name].train_config("multitask", ["multiclass", "multilabel"])
    assert several.loss == "bce"  # and ce for the tasks with one label
    assert RECIPES[name].train_config("multitask", ["multiclass", "multiclass"]).loss == "ce"
    assert several.monitor in (None, "loss")  # a metric of one task means nothing for several
    if name.startswith("cma"):
        assert several.stages == ("warm-up", "tuning")  # section 3.2.2


def test_the_tables_of_mmc_train_with_their_recipes():
    for name, experiment in PRESETS.items():
        assert experiment.base == config_of(name)
        assert {*experiment.settings[0]} == {*SWEEPS[name].varies}


def test_a_patience_of_all_epochs_stays_one():
    """The best epoch is kept, and training never stops earlier, whatever the number of epochs."""
    for name in ("cma-paper", "cma-irrelevant"):
        assert config_of(name, epochs=300).patience == config_of(name, epochs=300).epochs == 300
        assert config_of(name, epochs=300, patience=7).patience == 7
    assert config_of("mmc-paper", epochs=10).patience == 0


def test_another_head_has_its_own_layers():
    assert config_of("mmc-paper").layers == (2048, 512)
    assert config_of("mmc-paper", head="linear").layers is None
    assert config_of("mmc-paper", head="gmlp", layers=(8,)).layers == (8,)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"epochs": 2, "standardize": "features"}, True),
        ({"fusion": "text"}, False),
        ({"loss": "asl"}, False),
        ({"monitor": "micro_f1"}, False),
    ],
)
def test_the_papers_figures_are_of_its_experiment(changes, same, toy_store):
    data = open_training_data(toy_store())
    experiment = preset("mmc-heads", data, changes)
    assert (experiment.published is not None) == same
    assert ("changed" in experiment.title) == (not same and "monitor" not in changes)


def test_other_options_are_added_to_the_papers():
    config = config_of("cma-paper", fusion_options={"pool": "image=mean:16", "depth": 2}, lr=1e-3)
    assert dict(config.fusion_options) == {
        "depth": 2,
        "width": 512,
        "heads": 8,
        "dropout": 0.1,
        "pool": "image=mean:16",
    }
    assert (config.lr, config.batch_size) == (1e-3, 1024)
    other = config_of("cma-paper", fusion="sum")
    assert (other.fusion_options, other.epochs) == ({}, 100)
    assert config_of("lit-paper", loss="focal").loss == "focal"


def test_the_block_of_the_dfe_has_the_papers_heads():
    assert ATTENTION_HEADS == 4  # section IV-A


@pytest.mark.parametrize(("task", "loss"), [("multilabel", "bce"), ("multiclass", "ce")])
@pytest.mark.parametrize("name", ["mmc-fusion", "cma-irrelevant", "lit-table", "where-to-fuse"])
def test_the_loss_is_that_of_the_task(name, task, loss, toy_store, tmp_path, small_options):
    sizes = {"cma-irrelevant": small_options["cma"], "lit-table": small_options["lit"],
             "where-to-fuse": small_options["midfusion"]}.get(name, {})  # fmt: skip
    changes = {"epochs": 1, "layers": (4,), **({"fusion_options": sizes} if sizes else {})}
    store = toy_store(task)
    data = open_training_data(store, views=preset_views(name, changes))
    experiment = preset(name, data, changes)
    first = experiment.settings[:1]
    labels, curves = (x and x[:1] for x in (experiment.labels, experiment.curves))
    one = type(experiment)(experiment.base, first, labels=labels, curves=curves)
    (setting,) = run_sweep(store, data, one, tmp_path, [0]).settings
    assert (setting.config.loss, setting.config.schedule) == (loss, "constant")
    assert not setting.trials[0].diverged


# "Where to fuse", figures 16 and 22: images join at 0, 1, 3, 5, 7, 9, 11, 12 of 12 layers; decoders of 1, 2, 4, 8, 12.
LAYERS = [
    (12, 12, [0, 1, 3, 5, 7, 9, 11, 12], [1, 2, 4, 8, 12]),
    (6, 6, [0, 1, 2, 3, 4, 5, 6], [1, 2, 4, 6]),
    (4, 2, [0, 1, 2, 3, 4], [1, 2]),
    (2, 3, [0, 1, 2], [1, 2, 3]),
    (1, 1, [0, 1], [1]),
]


@pytest.mark.parametrize(("encoder", "decoder", "joins", "decoders"), LAYERS)
def test_where_to_fuse_adapts_to_the_layers_of_a_t5(encoder, decoder, joins, decoders, toy_store, tmp_path):
    sizes = {"d_model": 8, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 20}
    t5 = T5Settings(num_layers=encoder, num_decoder_layers=decoder, **sizes)
    changes = {"epochs": 1, "fusion_options": {"architecture": json.loads(json.dumps(asdict(t5)))}}
    store = toy_store("multiclass")
    data = open_training_data(store, views=preset_views("where-to-fuse", changes))
    experiment = preset("where-to-fuse", data, changes)
    options = [setting["fusion_options"] for setting in experiment.settings]
    found = {(option["pool"], option["decoder_layers"], option["fusion_spec"]) for option in options}
    assert len(found) == len(options)
    # The store's 4 image tokens can be pooled to 1, not to 14; that has the deepest decoder alone.
    assert found == {
        (pool, n, f"0:text,{layer}:image")
        for layer in joins
        for pool, all_n in (("", decoders), ("image=mean:1", decoders[-1:]), ("image=attention:1", decoders[-1:]))
        for n in all_n
    }
    if encoder > 2:
        return
    last = [setting for setting in experiment.settings if setting["fusion_options"]["decoder_layers"] == decoders[-1]][
        -1
    ]
    (result,) = run_sweep(store, data, type(experiment)(experiment.base, [last]), tmp_path, [0]).settings
    assert not result.trials[0].diverged


def test_what_is_given_is_not_varied(toy_store):
    store = toy_store()
    given = {"depth": 4, "width": 8, "heads": 2, "decoder_layers": "2", "pool": "image=mean:2"}
    data = open_training_data(store, views=preset_views("where-to-fuse", {"fusion_options": given}))
    settings = preset("where-to-fuse", data, {"fusion_options": given}).settings
    assert {(s["fusion_options"]["pool"], s["fusion_options"]["decoder_layers"]) for s in settings} == {
        ("image=mean:2", 2)
    }
    assert len(settings) == 5
    with pytest.raises(ConfigError, match=naming("decoder_layers")):
        preset("where-to-fuse", data, {"fusion_options": {**given, "decoder_layers": "two"}})


def test_every_row_of_a_batch_is_a_share_of_the_papers(toy_store):
    """Table 7 has 25,000, 10,000 and 5,000 of 25,000 training rows; the toy store has 40."""
    data = open_training_data(toy_store())
    sizes = [setting["batch_size"] for setting in preset("mmc-batch", data).settings]
    assert np.unique(sizes).tolist() == [0, 8, 16]


def test_a_part_of_the_presets_fusion_can_be_left_out(toy_store, tmp_path):
    """The options are read for the preset's fusion, not for the default one."""
    store = toy_store("multiclass", name="made")
    workspace = tmp_path / "workspace"
    (workspace / "cache").mkdir(parents=True)
    store.path.rename(workspace / "cache" / "made.zarr")
    small = ["depth=1", "width=8", "heads=2", "pool="]
    options = [word for option in small for word in ("--fusion-options", option)]
    command = ["train-head", "--preset", "cma-paper", *options, "--ablate", "sequence-attention", "--epochs", "2"]
    result = CliRunner().invoke(build_app(["train-head", "sweep"]), [*command, "--workspace", str(workspace)])
    assert result.exit_code == 0, result.output
    (path,) = (workspace / "runs").iterdir()
    config = load_run(path).config
    assert (config.fusion, config.ablate, config.loss) == ("cma", ("sequence-attention",), "ce")
    assert (config.monitor, config.patience, config.batch_size) == ("loss", 2, 1024)
