import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.experiments import presets
from cachefuse.experiments.files import JOURNAL
from cachefuse.experiments.presets import BASE, CHAIN, PRESETS, greedy, preset
from cachefuse.experiments.settings import parse_setting
from cachefuse.experiments.sweep import run_sweep
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.training.data import open_training_data
from fixtures.messages import naming


@pytest.fixture
def opened(toy_store):
    store = toy_store()
    return store, open_training_data(store)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_table(name):
    experiment = PRESETS[name]
    assert len(experiment.settings) == len(experiment.published) > 1
    assert len({repr(setting) for setting in experiment.settings}) == len(experiment.settings)
    assert len({tuple(setting) for setting in experiment.settings}) == 1
    assert all(parse_setting(setting) == setting for setting in experiment.settings)
    for mean, std in experiment.published:
        assert math.isnan(mean) or (0.5 < mean < 0.9 and 0 <= std < 0.001)
    base = experiment.base
    assert (base.lr, base.optimizer, base.schedule, base.batch_size, base.patience) == (1e-3, "adam", "constant", 0, 0)
    assert (base.thresholds, base.monitor, base.loss, base.scheme) == ("none", "samples_f1", "bce", "staged")


def test_each_table_goes_on_from_what_the_ones_before_chose():
    epochs = {name: PRESETS[name].base.epochs for name in PRESETS}
    assert epochs == {
        "mmc-heads": 200, "mmc-fusion": 200, "mmc-losses": 300, "mmc-layers": 200, "mmc-batch": 200, "mmc-epochs": 200,
        "mmc-activation": 300, "mmc-dropout": 300,
    }  # fmt: skip
    layers = {name: PRESETS[name].base.layers for name in PRESETS}
    assert {name for name, widths in layers.items() if widths == (2048, 512)} == {*CHAIN} - {"mmc-layers"}
    assert PRESETS["mmc-heads"].base.fusion == "image"


@pytest.mark.real
@pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="needs CACHEFUSE_REAL_DATA")
def test_the_published_figures_are_in_the_paper():
    papers = Path(os.environ["CACHEFUSE_REAL_DATA"]) / "papers"
    text = (papers / "mmc_by_clip.txt").read_text("utf-8")
    for name, experiment in PRESETS.items():
        for mean, std in experiment.published:
            row = "0.000 0.000" if math.isnan(mean) else f"{100 * mean:.3f} {100 * std:.3f}"
            assert row in text, name


@pytest.mark.parametrize(("folds", "some", "few"), [(0, 16, 8), (4, 16, 8), (2, 11, 6)])
def test_batches_are_shares_of_the_rows_to_train_on(folds, some, few, opened):
    # 40 rows of train, or of the 52 of train and val all but one part: 39, 26.
    experiment = preset("mmc-batch", opened[1], {"folds": folds})
    assert [setting["batch_size"] for setting in experiment.settings] == [0] * 3 + [some] * 3 + [few] * 3
    assert [setting["lr"] for setting in experiment.settings] == [1e-3, 1e-2, 1e-1] * 3
    assert experiment.base.folds == folds


@pytest.mark.parametrize(
    ("task", "changes", "shown"),
    [("multilabel", {}, True), ("multilabel", {"monitor": "micro_f1"}, False), ("multiclass", {}, False)],
)
def test_published_figures_stand_beside_figures_of_their_kind_only(toy_store, task, changes, shown):
    data = open_training_data(toy_store(task))
    assert (preset("mmc-fusion", data, changes).published is not None) == shown


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mmc-losses", {"loss": "bce"}, "preset loss"),
        ("mmc-batch", {"epochs": 3, "lr": 0.1}, "preset lr"),
    ],
)
def test_what_a_preset_tries_is_not_changed(name, changes, message, opened):
    with pytest.raises(ConfigError, match=naming(message)):
        preset(name, opened[1], changes)


def test_an_unknown_preset(opened):
    with pytest.raises(UnknownNameError, match=naming("preset mmc-loss mmc-losses")):
        preset("mmc-loss", opened[1])


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"mmc-epochs"}))
@pytest.mark.one_in(3)
def test_every_preset_runs(name, opened, tmp_path):
    tried = PRESETS[name].settings[0]
    changes = {key: value for key, value in {"epochs": 2, "layers": (4,)}.items() if key not in tried}
    experiment = preset(name, opened[1], changes)
    result = run_sweep(*opened, experiment, tmp_path, (0,))
    assert result.metrics[0] == "samples_f1"
    assert result.n_done == len(experiment.settings)
    assert [setting.published for setting in result.settings] == list(experiment.published)
    assert all(setting.config.scheme == "staged" for setting in result.settings)


SMALL = {
    "mmc-layers": [{"layers": (4,)}, {"layers": (8, 4)}],
    "mmc-batch": [{"batch_size": b, "lr": lr} for b in (25_000, 5_000) for lr in (1e-3, 1e-1)],
    "mmc-epochs": [{"epochs": 1}, {"epochs": 2}, {"epochs": 9}],
    "mmc-activation": [{"activation": "gelu"}, {"activation": "relu"}, {"activation": "leaky_relu"}],
    "mmc-dropout": [{"activation": a, "dropout": p} for a in ("gelu", "leaky_relu") for p in (0.0, 0.5)],
}


@pytest.fixture
def small(monkeypatch):
    """The chain with heads and epochs that take no time."""
    tables = {}
    for name, settings in SMALL.items():
        published = [(0.1 * i, 0.0) for i in range(len(settings))]
        tables[name] = replace(PRESETS[name], settings=settings, published=published)
    monkeypatch.setattr(presets, "PRESETS", tables)
    monkeypatch.setattr(presets, "BASE", replace(BASE, layers=(4,), epochs=2))


@pytest.mark.slow
def test_the_greedy_chain(small, opened, tmp_path):
    store = opened[0]
    heard = []
    results, run = greedy(*opened, tmp_path / "greedy", (1, 2), on_trial=heard.append)
    assert [result.fields for result in results] == [
        ("layers",), ("batch_size", "lr"), ("epochs",), ("activation",), ("dropout",)
    ]  # fmt: skip
    chosen = {}
    for result in results:
        means = [setting.mean("samples_f1") for setting in result.settings]
        best = result.settings[int(np.argmax(means))]
        for setting in result.settings:
            own = {**vars(setting.config)}
            assert {name: own[name] for name in chosen} == chosen
        chosen |= {name: vars(best.config)[name] for name in result.fields}
    assert {name: vars(run.config)[name] for name in chosen} == chosen
    assert (run.config.refit, run.config.seed, run.config.fusion, run.config.loss) == (True, 1, "sum", "bce")
    assert results[0].title.startswith("step 1 of 5, MMC table 6")
    assert heard[-1] == results[-1]
    # What one step has trained, the next does not train again.
    done = (tmp_path / "greedy" / JOURNAL).read_bytes()
    assert len(done.splitlines()) <= sum(result.n_trials for result in results) - 2 * 3
    folders = sorted(path.name for path in (tmp_path / "greedy").iterdir() if path.is_dir())
    assert folders == ["1-layers", "2-batch", "3-epochs", "4-activation", "5-dropout"]
    assert (tmp_path / "greedy" / "5-dropout" / "sweep.png").is_file()
    # Its run predicts, and was trained on train and val together.
    loaded = load_run(save_run(run, tmp_path / "runs"))
    assert len(predict_split(loaded, store).ids) == 8
    again, other = greedy(*opened, tmp_path / "greedy", (1, 2))
    assert (again, (tmp_path / "greedy" / JOURNAL).read_bytes()) == (results, done)
    for name, tensor in run.members[0].model.state_dict().items():
        assert (other.members[0].model.state_dict()[name] == tensor).all()


@pytest.mark.slow
def test_the_chain_goes_on_from_any_activation(small, opened, tmp_path, monkeypatch):
    only = replace(presets.PRESETS["mmc-activation"], settings=[{"activation": "relu"}], published=[(0.5, 0.0)])
    monkeypatch.setitem(presets.PRESETS, "mmc-activation", only)
    results, run = greedy(*opened, tmp_path, (0,))
    assert [setting.values["dropout"] for setting in results[-1].settings] == [0.0, 0.5]
    assert [setting.published for setting in results[-1].settings] == [None, None]
    assert run.config.activation == "relu"
    only = replace(only, settings=[{"activation": "leaky_relu"}])
    monkeypatch.setitem(presets.PRESETS, "mmc-activation", only)
    results, _ = greedy(*opened, tmp_path, (0,))
    assert [setting.published for setting in results[-1].settings] == [(0.2, 0.0), (pytest.approx(0.3), 0.0)]


@pytest.mark.parametrize("changes", [{"layers": (3,)}, {"lr": 0.1}, {"refit": True}, {"dropout": 0.1}])
def test_what_the_chain_chooses_is_not_changed(changes, small, opened, tmp_path):
    (name,) = changes
    with pytest.raises(ConfigError, match=naming(f"preset {name}")):
        greedy(*opened, tmp_path, (0,), changes)


@pytest.mark.slow
def test_the_chain_with_folds(small, opened, tmp_path):
    results, run = greedy(*opened, tmp_path, (0,), {"folds": 2})
    assert {result.split for result in results} == {"oof"}
    assert len(run.members) == 1
    assert run.held_out.split == "oof"
