"""Fusions compared with equal budgets, what models cost, and the presets over tokens."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file

from cachefuse.errors import CacheError, ConfigError, UnknownNameError
from cachefuse.experiments import costs
from cachefuse.experiments.compare import METHODS, compare, default_pool
from cachefuse.experiments.costs import measure_costs
from cachefuse.experiments.files import plot_curves, write_results
from cachefuse.experiments.presets import preset, preset_views
from cachefuse.experiments.recipes import TRAININGS
from cachefuse.experiments.settings import parse_setting
from cachefuse.experiments.sweep import run_sweep, sweep
from cachefuse.experiments.token_presets import TOKEN_PRESETS
from cachefuse.fusion import FUSIONS
from cachefuse.runs.train import train_head
from cachefuse.store.format import append_lines, read_lines
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.resolved import resolve
from cachefuse_cli.shared.sweep_tables import sweep_table
from fixtures.messages import naming, says
from fixtures.specs import specs_of

QUICK = {"folds": 2, "epochs": 1, "batch_size": 16}


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setattr(costs, "TIMES", 1)
    monkeypatch.setattr("cachefuse.experiments.sweep.RESAMPLES", 20)


def pooled_store(make_store):
    x = {"image": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float16)}
    return make_store(x, np.eye(2, dtype=np.int8)[np.arange(32) % 2], ["train"] * 32, name="pooled")


def open_all(store, views):
    return store, open_training_data(store, views=views)


@pytest.mark.slow
def test_every_method_has_the_same_rows_and_budget(toy_store, folder):
    result = compare(toy_store(), folder=folder, **QUICK)
    assert [setting.config.fusion for setting in result.settings] == list(METHODS)
    assert result.fields == ("fusion",)
    assert (result.split, result.n_rows) == ("oof", 52)
    for setting in result.settings:
        config, (trial,) = setting.config, setting.trials
        assert (config.folds, config.epochs, config.batch_size, config.seed) == (2, 1, 16, 0)
        low, high = setting.interval
        assert low <= high
        assert trial.metrics[result.metrics[0]] == setting.mean(result.metrics[0])
        assert setting.costs.parameters > 0
        assert setting.costs.size_mb == pytest.approx(setting.costs.parameters * 4e-6, rel=0.2)
        assert setting.costs.ms_per_item > 0
        assert setting.costs.steps_per_second > 0
        assert ("image" in trial.weights) == (config.fusion == "cma")
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [row["fusion"] for row in rows] == list(METHODS)
    assert all(float(row["ms_per_item"]) > 0 and float(row["low"]) <= float(row["high"]) for row in rows)


def test_is_what_train_head_says(toy_store, folder):
    result = compare(toy_store(), folder=folder, methods=["sum"], **QUICK)
    run = train_head(toy_store(), TrainConfig(fusion="sum", **QUICK))
    metric = result.metrics[0]
    assert result.settings[0].mean(metric) == pytest.approx(run.results["oof"].metrics[metric])
    assert result.settings[0].costs.parameters == run.members[0].model.n_parameters


def test_goes_on_where_it_was_stopped(toy_store, folder):
    seen = []
    compare(toy_store(), folder=folder, methods=["image", "text"], **QUICK)
    compare(toy_store(), folder=folder, methods=["image", "text", "sum"], on_trial=seen.append, **QUICK)
    assert [result.n_done for result in seen] == [2, 3]
    assert len((folder / "trials.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize("file", ["trials.jsonl", "scores"])
def test_a_flipped_bit_in_what_is_kept_changes_no_figure(file, toy_store, folder, monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0)
    store = toy_store()
    whole = compare(store, folder=folder, methods=["image", "text"], **QUICK)
    path = folder / file if file == "trials.jsonl" else min(folder.glob("held_out/*.safetensors"))
    written = path.read_bytes()
    for place in np.linspace(0, len(written) - 2, 3).astype(int):  # the last byte of the journal is no part of a line
        spoilt = bytearray(written)
        spoilt[place] ^= 2
        path.write_bytes(spoilt)
        again = compare(store, folder=folder, methods=["image", "text"], **QUICK)
        assert again.standings == whole.standings
        figures = [[setting.trials[0].metrics for setting in result.settings] for result in (again, whole)]
        assert figures[0] == figures[1]


def test_scores_of_before_there_were_checksums_are_used_and_said(toy_store, folder, caplog, monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0)
    store, seen = toy_store(), []
    whole = compare(store, folder=folder, methods=["image", "text"], **QUICK)
    assert all(setting.trials[0].scores for setting in whole.settings)
    lines = [{**line, "scores": ""} for line in read_lines(folder / "trials.jsonl")]
    (folder / "trials.jsonl").unlink()
    append_lines(folder / "trials.jsonl", lines)
    again = compare(store, folder=folder, methods=["image", "text"], on_trial=seen.append, **QUICK)
    assert [result.n_done for result in seen] == [2]
    assert again.standings == whole.standings
    assert says(caplog.text, f"checksums {folder}")


def test_says_what_it_can_not_compare(toy_store, make_store, folder):
    with pytest.raises(UnknownNameError, match=naming("fusion smu")):
        compare(toy_store(), folder=folder, methods=["smu"])
    with pytest.raises(ConfigError, match="fusion"):
        compare(toy_store(), folder=folder, methods=[])
    with pytest.raises(CacheError, match=naming("tokens image --dataset pooled")):
        compare(pooled_store(make_store), folder=folder, methods=["concat", "cma"])
    assert not (folder / "trials.jsonl").exists()


def test_a_store_that_no_method_fits_is_one_error(make_store, folder, caplog):
    x = {"image": np.ones((8, 4), np.float16)}
    store = make_store(x, np.ones((8, 1), np.int8), ["train"] * 8, name="single", task="multiclass")
    with pytest.raises(ConfigError, match=naming("single class")):
        compare(store, folder=folder)
    assert not caplog.records


def test_compares_by_default_what_fits_the_store(make_store, folder, caplog):
    store = pooled_store(make_store)
    result = compare(store, folder=folder, **QUICK)
    assert [setting.config.fusion for setting in result.settings] == ["image", "concat", "sum", "mixed"]
    left_out = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert [message.split(": ")[0].split()[-1] for message in left_out] == ["text", "tirg", "cma", "midfusion"]
    assert all(word in message for message, word in zip(left_out, ("text", "tirg", "tokens", "tokens"), strict=True))


def test_only_many_tokens_are_pooled_by_themselves(make_store, toy_store):
    def views(modality):
        return ("pooled", "tokens")

    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(8, 4)).astype(np.float16)}
    many = {"image": {"tokens": rng.normal(size=(8, 65, 4)).astype(np.float16)}}
    store = make_store(x, np.eye(8, dtype=np.int8), ["train"] * 8, others=many, name="many")
    assert default_pool(store, (), views) == "image=mean:16"
    assert default_pool(toy_store(), (), views) == ""
    assert default_pool(store, (), lambda modality: ("pooled",)) == ""


def test_costs_leave_no_trace(toy_store):
    """What is measured draws its own random numbers and changes neither the store nor a training after it."""
    store, config = toy_store(), TrainConfig(fusion="sum", epochs=1)
    before = train_head(store, config).members[0].model.state_dict()
    _, data = open_all(store, config.reads)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measure_costs(data, data.resolve(config))
    assert torch.equal(torch.get_rng_state(), state)
    after = train_head(store, config).members[0].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class TestPresets:
    @pytest.fixture
    def store(self, toy_store):
        return toy_store()

    @pytest.mark.slow
    def test_where_to_fuse(self, store, folder, monkeypatch):
        monkeypatch.setattr("cachefuse.experiments.token_presets.POOLINGS", ("", "mean:2", "attention:1"))
        changes = {"fusion_options": {"width": 8, "depth": 4, "heads": 4}, "epochs": 1, "batch_size": 16}
        opened = open_all(store, preset_views("where-to-fuse", changes))
        experiment = preset("where-to-fuse", opened[1], changes)
        assert [setting["fusion_options"]["fusion_spec"] for setting in experiment.settings[:5]] == [
            f"0:text,{layer}:image" for layer in range(5)
        ]
        names = {f"all 4, decoder of {n}" for n in (1, 2, 4)} | {"mean:2, decoder of 4", "attention:1, decoder of 4"}
        assert {curve.name for curve in experiment.curves} == names
        result = run_sweep(*opened, replace(experiment, settings=experiment.settings[:10]), folder, [0])
        assert [setting.curve.x for setting in result.settings] == [0, 1, 2, 3, 4] * 2
        assert all(setting.config.fusion_options["width"] == 8 for setting in result.settings)
        write_results(result, folder)
        assert (folder / "curves.png").stat().st_size > 1000
        assert plot_curves(result)["svg"] == (folder / "curves.svg").read_bytes()
        first = next(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
        assert first["label"] == "all 4, decoder of 1, at 0"

    def test_lit_table(self, store, folder, small_options):
        changes = {"fusion_options": small_options["lit"], "epochs": 1, "batch_size": 16}
        opened = open_all(store, preset_views("lit-table", changes))
        experiment = preset("lit-table", opened[1], changes)
        assert experiment.published == [None] * 5
        settings = [{**own, "fusion_options": {"grid": 1}} if own.get("fusion_options") else own
                    for own in experiment.settings]  # fmt: skip
        result = run_sweep(*opened, replace(experiment, settings=settings), folder, [0])
        labels = [setting.label for setting in result.settings]
        assert labels == ["text", "image", "as MMBT", "without TIRG", "full"]
        header = [str(column.header) for column in sweep_table(result).columns]
        assert header == ["", "micro-F1", "macro-F1", "macro-AP", "params", "MB", "ms/item"]
        published = tuple(replace(setting, published=(0.638, math.nan)) for setting in result.settings)
        assert Console(width=80).measure(sweep_table(replace(result, settings=published))).maximum <= 80
        mmimdb = preset("lit-table", replace(opened[1], name="mmimdb"), changes)
        assert [mean for mean, _ in mmimdb.published] == [0.633, 0.486, 0.647, 0.674, 0.686]

    def test_an_irrelevant_modality(self, store, folder, small_options):
        changes = {"fusion_options": small_options["cma"], "epochs": 1, "batch_size": 16}
        opened = open_all(store, preset_views("cma-irrelevant", changes))
        result = run_sweep(*opened, preset("cma-irrelevant", opened[1], changes), folder, [0])
        assert len(result.settings) == 9
        for setting in result.settings:
            assert 0 < setting.weight("text") < 1
            if "modality-attention" in setting.config.ablate:
                assert setting.weight("text") == pytest.approx(0.5, abs=0.01)
        lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        assert len(lines) == 9

    def test_recipes_are_settings_that_build(self):
        with torch.device("meta"):
            paper = resolve(TRAININGS["cma-paper"].train_config("multilabel", ()), "multilabel", 100)
            specs = specs_of({"image": 512, "text": 512, "image_tokens": (768, 49), "text_tokens": (512, 77)})
            model = build_model(paper, specs, 18)
        assert len(model.fusion.blocks) == 12
        assert model.fusion.blocks[0].heads == 8

    def test_what_a_preset_needs(self, make_store, folder):
        x = {"image": np.eye(4, dtype=np.float16)}
        store = make_store(x, np.array([0, 1, 0, 1], np.int32), ["train"] * 4, task="multiclass")
        with pytest.raises(CacheError, match=naming("tokens image")):
            open_all(store, preset_views("where-to-fuse", {}))
        with pytest.raises(UnknownNameError, match=naming("preset where-to-fus")):
            preset("where-to-fus", None)
        assert sorted(TOKEN_PRESETS) == ["cma-irrelevant", "lit-table", "where-to-fuse"]


class TestShuffle:
    def test_rows_get_others(self, toy_store):
        _, data = open_all(toy_store(absent={"text": {3}}), TrainConfig(fusion="cma").reads)
        rows = torch.arange(60)
        whole, _ = data.table.batch(rows)
        table = data.table.shuffled({"text": 0.5}, seed=0)
        moved, present = table.batch(rows)
        assert torch.equal(moved["image"], whole["image"])
        changed = (moved["text"] != whole["text"]).any(1)
        assert changed.sum() == 30
        source = table.sources["text"]
        assert sorted(source.tolist()) == list(range(60))
        assert torch.equal(moved["text"], whole["text"][source])
        assert torch.equal(table.present["text"], data.table.present["text"][source])
        lengths = present["text_tokens"].sum(1)
        expected = torch.tensor([1 + row % 5 for row in source.tolist()]) * table.present["text"]
        assert torch.equal(lengths, expected)
        assert np.array_equal(table.lengths, data.table.lengths[source])

    def test_all_or_none(self, toy_store):
        _, data = open_all(toy_store(), TrainConfig().reads)
        assert data.shuffled(TrainConfig()) is data
        everything = data.table.shuffled({"text": 1.0}, seed=0).sources["text"]
        assert (everything != torch.arange(60)).all()
        assert torch.equal(data.table.shuffled({"text": 0.0}, seed=0).sources["text"], torch.arange(60))

    def test_trained_with_texts_of_others_they_are_of_no_use(self, toy_store):
        config = TrainConfig(fusion="text", head="linear", epochs=30, batch_size=16, lr=0.05)
        as_it_is, shuffled = (
            train_head(toy_store(name=f"n{i}"), replace(config, shuffle=shares)).metrics["train"]["macro_ap"]
            for i, shares in enumerate(({}, {"text": 1.0}))
        )
        assert shuffled < as_it_is - 0.05

    def test_what_it_refuses(self, toy_store):
        with pytest.raises(ConfigError, match=naming("shuffle 0 1 text 2")):
            TrainConfig(shuffle={"text": 2})
        with pytest.raises(UnknownNameError, match="txt"):
            train_head(toy_store(), TrainConfig(shuffle={"txt": 0.5}, epochs=1))


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_parts_of_a_step_add_up_to_the_step(parts, toy_store):
    """Adam's first step moves each weight by its gradient's sign alone, so SGD: gradients themselves are compared."""
    config = TrainConfig(fusion="sum", optimizer="sgd", dropout=0.0, epochs=2, batch_size=16, lr=0.1)
    store = toy_store()
    whole, some = (train_head(store, replace(config, accumulate=n)).members[0].model.state_dict() for n in (1, parts))
    for name, tensor in whole.items():
        torch.testing.assert_close(some[name], tensor, rtol=1e-4, atol=1e-6)


def test_parts_are_of_a_mean():
    with pytest.raises(ConfigError, match=naming("loss reduction")):
        TrainConfig(accumulate=2, loss_options={"reduction": "sum"})
    with pytest.raises(ConfigError, match=naming("accumulate 1")):
        TrainConfig(accumulate=0)


def test_a_grid_may_hold_fusions_that_read_other_views(toy_store, folder, small_options):
    settings = [{"fusion": "sum"}, {"fusion": "cma", "fusion_options": small_options["cma"]},
                {"fusion": "midfusion", "fusion_options": small_options["midfusion"]}]  # fmt: skip
    result = sweep(toy_store(), TrainConfig(epochs=1, batch_size=16), settings, folder=folder, seeds=[0])
    assert [len(setting.trials) for setting in result.settings] == [1, 1, 1]
    assert [setting.trials[0].diverged for setting in result.settings] == [""] * 3


def test_settings_are_those_of_every_fusion(small_options):
    for name in FUSIONS:
        options = small_options["lit"] if name == "lit" else {}
        config = resolve(TrainConfig(fusion=name, fusion_options=options), "multilabel", 1000)
        assert set(config.fusion_options) == set(FUSIONS[name].options())
        assert None not in (config.epochs, config.batch_size, config.lr, config.dropout)
    assert parse_setting({"fusion_options": {"depth": "3"}}) == {"fusion_options": {"depth": "3"}}


def test_the_fastest_within_the_margin_of_all_is_enough(toy_store, folder):
    result = compare(toy_store(), folder=folder, methods=["image", "text", "sum"], **QUICK)

    def judged(**within):
        standings = [replace(standing, within=within[standing.method]) for standing in result.standings]
        times = {"image": 0.1, "text": 0.2, "sum": 0.9}
        settings = []
        for setting in result.settings:
            costs = replace(setting.trials[0].costs, ms_per_item=times[setting.config.fusion])
            settings.append(replace(setting, trials=(replace(setting.trials[0], costs=costs),)))
        changed = replace(result, settings=tuple(settings), standings=tuple(standings))
        enough = changed.enough and changed.enough.config.fusion
        return enough, [setting.config.fusion for setting in changed.undecided]

    assert judged(image="no", text="yes", sum="yes") == ("text", [])
    assert judged(image="undecided", text="no", sum="yes") == ("sum", ["image"])
    assert judged(image="yes", text="undecided", sum="yes") == ("image", [])
    assert judged(image="undecided", text="no", sum="undecided") == (None, ["image", "sum"])
    assert replace(result, standings=()).enough is None


def test_few_rows_decide_nothing(toy_store, folder):
    """52 rows cannot show that a loss is below .01, even where two methods predict the same."""
    result = compare(toy_store(), folder=folder, methods=["image", "text", "sum"], **QUICK)
    assert result.enough is None
    assert {standing.within for standing in result.standings} <= {"undecided", "no"}
    (best,) = [standing for standing in result.standings if standing.method == result.best.config.fusion]
    assert (best.behind.value, best.p_corrected) == (0, 1)
    for standing, setting in zip(result.standings, result.settings, strict=True):
        metric = result.metrics[0]
        assert standing.behind.value == pytest.approx(result.best.mean(metric) - setting.mean(metric))
        assert standing.behind.low <= standing.behind.value <= standing.behind.high


def test_a_wide_margin_decides(toy_store, folder):
    result = compare(toy_store(), folder=folder, methods=["image", "sum"], margin=0.9, **QUICK)
    assert {standing.within for standing in result.standings} == {"yes"}
    for margin in (0, 1, -0.01, math.nan):
        with pytest.raises(ConfigError, match="margin"):
            compare(toy_store(), folder=folder, methods=["image", "sum"], margin=margin, **QUICK)


def test_one_method_is_compared_with_none(toy_store, folder):
    result = compare(toy_store(), folder=folder, methods=["sum", "sum"], **QUICK)
    assert (len(result.settings), result.enough) == (1, None)


@pytest.mark.parametrize("damage", ["gone", "cut", "other rows"])
def test_trials_without_their_scores_are_trained_again(damage, toy_store, folder):
    """A folder of an older version has trials but no scores: the verdict needs them."""
    first = compare(toy_store(), folder=folder, methods=["image", "sum"], **QUICK)
    file, *_ = sorted((folder / "held_out").iterdir())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        arrays = load_file(file)
        save_file({**arrays, "rows": arrays["rows"] + 1}, file, {"split": "oof"})
    seen = []
    again = compare(toy_store(), folder=folder, methods=["image", "sum"], on_trial=seen.append, **QUICK)
    assert [result.n_done for result in seen] == [1, 2]
    assert again.standings == first.standings
    assert [setting.trials[0].metrics for setting in again.settings] == [
        setting.trials[0].metrics for setting in first.settings
    ]
