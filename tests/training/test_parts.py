"""Folds, members, refitting, staged training and thresholds: what train_head makes of rows and settings."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cachefuse.errors import ConfigError, RunError
from cachefuse.metrics import METRICS
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.thresholds import choose_thresholds
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.split import make_splits
from fixtures.messages import naming, says


def quick(**settings):
    return TrainConfig(**{"head": "linear", "epochs": 3, "lr": 0.05, "patience": 0, **settings})


def states(run):
    return [save(dict(member.model.state_dict())) for member in run.members]


def rows_of(store, *splits):
    return set(np.flatnonzero(np.isin(store.splits, splits)).tolist())


def test_each_fold_is_measured_by_a_model_that_has_not_seen_it(toy_store):
    store = toy_store()
    data = open_training_data(store)
    parts = make_splits(data, quick(folds=4))
    everything = rows_of(store, "train", "val")
    assert sorted(torch.cat([part.held_out for part in parts]).tolist()) == sorted(everything)
    for part in parts:
        assert set(part.train.tolist()) == everything - set(part.held_out.tolist())


def test_with_patience_a_fold_has_no_say_in_when_to_stop(toy_store):
    data = open_training_data(toy_store())
    for part in make_splits(data, quick(folds=4, patience=3)):
        train, stop, held_out = (set(rows.tolist()) for rows in (part.train, part.validate, part.held_out))
        assert stop
        assert not train & stop
        assert not (train | stop) & held_out
        assert len(train | stop | held_out) == 52


def test_out_of_fold_scores_are_those_of_the_folds_own_models(toy_store):
    store = toy_store()
    run = train_head(store, quick(folds=4, members=2))
    assert [(member.fold, member.config.seed) for member in run.members] == [
        (f, s) for f in range(4) for s in (0, 1000)
    ]
    assert list(run.results) == ["oof"]
    assert run.results["oof"].n_rows == 52
    again = run.held_out_scores(StoreTables([run], store, "cpu"))
    np.testing.assert_allclose(again, run.held_out.scores, atol=1e-6)
    everyones = run.scores(StoreTables([run], store, "cpu"), torch.from_numpy(run.held_out.rows))
    assert np.abs(everyones - run.held_out.scores).max() > 1e-3


def test_no_figure_sees_the_rows_that_chose_its_thresholds(toy_store):
    store = toy_store()
    for config in (quick(folds=4), quick(thresholds="class"), quick(folds=3, threshold_metric="samples_f1")):
        run = train_head(store, config)
        held_out, targets = run.held_out, store.targets[run.held_out.rows]
        metric, per_class = config.threshold_metric or "micro_f1", config.thresholds == "class"
        predictions = np.zeros(held_out.scores.shape, bool)
        for part in np.unique(held_out.parts):
            inside = held_out.parts == part
            thresholds = choose_thresholds(targets[~inside], held_out.scores[~inside], metric, per_class)
            predictions[inside] = decide(held_out.scores[inside], "multilabel", thresholds)
        for name, value in run.results[held_out.split].metrics.items():
            assert value == METRICS[name](targets, held_out.scores, predictions)
        np.testing.assert_array_equal(run.thresholds, choose_thresholds(targets, held_out.scores, metric, per_class))
        predicted = predict_split(run, store)
        np.testing.assert_array_equal(predicted.labels, predicted.scores >= run.thresholds)


def test_without_thresholds_half_decides(toy_store):
    store = toy_store()
    run = train_head(store, quick(thresholds="none"))
    assert set(run.thresholds) == {0.5}
    predictions = run.held_out.scores >= 0.5
    targets = store.targets[run.held_out.rows]
    assert run.metrics["val"]["micro_f1"] == METRICS["micro_f1"](targets, run.held_out.scores, predictions)


def test_thresholds_need_rows_to_choose_them_on(make_store):
    x = {"image": np.eye(6, dtype=np.float16)}
    y = np.array([[0, 1], [1, 0]] * 3, np.int8)
    store = make_store(x, y, ["train"] * 6)
    with pytest.raises(ConfigError, match=naming("0 --folds 5")):
        train_head(store, quick(thresholds="class"))
    assert set(train_head(store, quick()).thresholds) == {0.5}
    assert train_head(store, quick(folds=3, thresholds="class")).results["oof"].n_rows == 6


def test_a_multiclass_task_has_no_thresholds(toy_store):
    with pytest.raises(ConfigError, match="thresholds"):
        train_head(toy_store("multiclass"), quick(thresholds="global"))


def test_members_differ_in_their_seed_and_are_averaged(toy_store):
    store = toy_store()
    together = train_head(store, quick(members=3, seed=5))
    alone = [train_head(store, quick(seed=seed)) for seed in (5, 1005, 2005)]
    assert states(together) == [states(run)[0] for run in alone]
    mean = np.mean([predict_split(run, store).scores for run in alone], axis=0)
    np.testing.assert_allclose(predict_split(together, store).scores, mean, atol=1e-6)


def test_the_members_of_runs_with_neighbouring_seeds_are_all_different(toy_store):
    store = toy_store()
    weights = [x for seed in (0, 1, 2) for x in states(train_head(store, quick(members=3, seed=seed)))]
    assert len(set(weights)) == 9


def test_refit_gives_each_stage_its_own_best_epoch(toy_store):
    config = quick(scheme="staged", fusion="mixed", head="mlp", layers=(8,), epochs=30, patience=4, refit=True, lr=0.01)
    store, seen = toy_store(), {}

    def hear(progress):
        seen.setdefault(progress.model, {}).setdefault(progress.stage, []).append(progress.epoch)

    run = train_head(store, config, on_progress=hear)
    (history,) = run.histories
    best = {**history.stages, "": history.best_epoch}
    assert best.keys() == {"image", "text", "concat", ""}
    assert len(set(best.values())) > 1
    assert {stage: len(epochs) for stage, epochs in seen[2].items()} == best
    assert {stage: max(epochs, key=lambda e: e.score).epoch for stage, epochs in seen[1].items()} == best


def test_an_interrupt_while_refitting_is_passed_on(toy_store):
    def interrupt(progress):
        if (progress.model, progress.epoch.epoch) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_head(toy_store(), quick(refit=True, epochs=5), on_progress=interrupt)


def test_to_stop_early_takes_rows_that_say_when(make_store):
    x, y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16), np.eye(20, 2, dtype=np.int8)
    store = make_store({"image": x}, y, ["train"] * 20)
    with pytest.raises(ConfigError, match=naming("--folds 5")):
        train_head(store, quick(fusion="image", patience=2))
    assert train_head(store, quick(fusion="image", patience=2, folds=2)).held_out is not None


def test_refit_trains_on_all_of_train_and_val(toy_store, make_store):
    store = toy_store()
    run = train_head(store, quick(folds=3, refit=True, batch_size=0))
    everything = store.splits.copy()
    everything[everything == "val"] = "train"
    x = {m: store.open_features("toy", m).read() for m in ("image", "text")}
    whole = make_store(x, store.targets, everything.tolist(), name="whole")
    assert states(run) == states(train_head(whole, quick(batch_size=0)))
    assert list(run.results) == ["oof"]
    with pytest.raises(RunError, match="--split"):
        run.held_out_scores(StoreTables([run], store, "cpu"))


def test_refit_takes_the_epochs_that_were_best_on_average(toy_store):
    run = train_head(toy_store(), quick(folds=3, refit=True, patience=2, epochs=40))
    best = [history.best_epoch for history in run.histories]
    seen = []
    train_head(toy_store(name="b"), quick(folds=3, refit=True, patience=2, epochs=40), on_progress=seen.append)
    assert seen[-1].model == seen[-1].n_models == 4
    assert seen[-1].epoch.epoch == round(np.mean(best))


def test_a_labelled_test_split_is_measured_and_never_trained_on(toy_store, make_store):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float16)
    y = (x[:, :2] > 0).astype(np.int8)
    splits = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
    other = x.copy()
    other[40:] *= -100
    runs = [
        train_head(make_store({"image": values}, y, splits, name=name), quick(fusion="image", folds=4, refit=True))
        for values, name in ((x, "a"), (other, "b"))
    ]
    assert states(runs[0]) == states(runs[1])
    assert list(runs[0].results) == ["oof", "test"]
    assert runs[0].results["test"].n_rows == 20


@pytest.mark.parametrize("fusion", ["sum", "mixed", "gated"])
def test_staged_training_freezes_each_head_before_what_joins_them(fusion, toy_store):
    store = toy_store()
    stages = []
    config = quick(fusion=fusion, scheme="staged", head="mlp", layers=(8,), dropout=0.5, modality_dropout=0.2)
    run = train_head(store, config, on_progress=lambda now: stages.append(now.stage))
    heads = {"sum": ["image", "text"], "gated": ["image", "text"], "mixed": ["image", "text", "concat"]}[fusion]
    assert list(dict.fromkeys(stages)) == [*heads, ""]
    longer = train_head(store, quick(**{**vars(config), "ema": 0.9, "patience": 2}))
    assert longer.results
    model = run.members[0].model
    assert all(parameter.requires_grad for parameter in model.parameters())
    if fusion != "mixed":
        # The first head's training sees nothing of the rest: alone, from the same seed, it comes out the same.
        once_more = train_head(store, config).members[0].model
        for one, other in zip(model.parameters(), once_more.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_staged_head_learns_from_the_rows_that_have_what_it_reads(toy_store):
    def heads(x):
        run = train_head(x, quick(scheme="staged", head="linear", batch_size=8))
        return {m: head.weight for m, head in run.members[0].model.fusion.heads.items()}

    store = toy_store(absent={"text": {3, 9}})
    ours = heads(store)
    targets = store.targets.copy()
    targets[[3, 9]] = 1 - targets[[3, 9]]
    store.targets = targets
    theirs = heads(store)
    assert torch.equal(ours["text"], theirs["text"])
    assert not torch.equal(ours["image"], theirs["image"])


def test_a_staged_head_is_validated_on_the_rows_that_have_what_it_reads(toy_store):
    def scores(store):
        stages = {}
        config = quick(scheme="staged", modality_dropout=0.5)
        train_head(store, config, on_progress=lambda p: stages.setdefault(p.stage, []).append(p.epoch.score))
        return stages

    store = toy_store(absent={"image": set(range(40, 50))})
    ours = scores(store)
    targets = store.targets.copy()
    targets[40:50] = 1 - targets[40:50]
    store.targets = targets
    theirs = scores(store)
    assert ours["image"] == theirs["image"]
    assert ours["text"] != theirs["text"]


def test_staged_and_joint_differ_where_there_is_something_to_join(toy_store):
    store = toy_store()
    assert states(train_head(store, quick(scheme="staged"))) != states(train_head(store, quick()))
    assert states(train_head(store, quick(fusion="concat", scheme="staged"))) == states(
        train_head(store, quick(fusion="concat"))
    )


def test_averaged_weights_are_kept_and_measured_beside_the_raw_ones(toy_store):
    store = toy_store()
    epochs = []
    run = train_head(store, quick(ema=0.9, epochs=5), on_progress=lambda now: epochs.append(now.epoch))
    assert all(epoch.raw_score is not None for epoch in epochs)
    raw = train_head(store, quick(epochs=5))
    assert states(run) != states(raw)
    assert [epoch.raw_score for epoch in epochs] == [epoch.score for epoch in raw.histories[0].epochs]


def test_a_table_in_memory_and_one_on_the_disk_train_alike(toy_store, monkeypatch):
    store = toy_store(absent={"text": {3, 9}})
    near = train_head(store, quick(scheme="staged", fusion="mixed", epochs=4))
    monkeypatch.setattr("cachefuse.training.feature_table.COPY_SHARE", 0)
    far = train_head(store, quick(scheme="staged", fusion="mixed", epochs=4))
    for one, other in zip(near.members[0].model.parameters(), far.members[0].model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_above_the_limit_is_refused_before_it_is_trained(toy_store):
    store = toy_store()
    with pytest.raises(ConfigError, match=naming("10 0.00 max-size-mb 0.002 --members --refit")):
        train_head(store, quick(folds=5, members=2), max_size_mb=0.002)
    assert train_head(store, quick(folds=5, members=2, refit=True), max_size_mb=0.002).size_mb < 0.002


def test_classes_without_positives_are_named(make_store, caplog):
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(30, 4)).astype(np.float16)}
    y = np.zeros((30, 3), np.int8)
    y[:, 0], y[5, 1] = rng.integers(0, 2, 30), 1
    store = make_store(x, y, ["train"] * 20 + ["val"] * 10)
    run = train_head(store, quick(fusion="image"))
    assert says(caplog.text, "class 2")
    assert run.metrics["val"]["micro_f1"] >= 0
    caplog.clear()
    train_head(store, quick(fusion="image", folds=3, thresholds="class"))
    assert says(caplog.text, "class 1")


def test_rows_without_any_label_train_and_predict(make_store):
    x = {"image": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)}
    store = make_store(x, np.zeros((30, 2), np.int8), ["train"] * 20 + ["val"] * 10)
    for config in (quick(fusion="image"), quick(fusion="image", sampler="balanced", class_weights="balanced")):
        run = train_head(store, config)
        assert run.metrics["val"]["micro_f1"] == 0
        assert np.isfinite(predict_split(run, store, "val").scores).all()


def test_one_class_is_a_yes_or_no_in_multilabel_and_nothing_in_multiclass(make_store):
    x = {"image": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)}
    yes = (np.asarray(x["image"])[:, :1] > 0).astype(np.int8)
    splits = ["train"] * 20 + ["val"] * 10
    assert train_head(make_store(x, yes, splits, name="a"), quick(fusion="image", epochs=20)).metrics["val"]
    one = make_store(x, np.zeros(30, np.int32), splits, task="multiclass", name="b")
    with pytest.raises(ConfigError, match=naming("0")):
        train_head(one, quick(fusion="image"))


@pytest.mark.parametrize("settings", [{}, {"folds": 3, "refit": True, "members": 2, "thresholds": "class"}])
def test_runs_of_several_models_come_back_as_they_were(settings, toy_store, tmp_path):
    store = toy_store()
    run = train_head(store, quick(ema=0.9, schedule="cosine", sampler="balanced", **settings))
    again = load_run(save_run(run, tmp_path / "runs"))
    assert states(again) == states(run)
    np.testing.assert_array_equal(again.thresholds, run.thresholds)
    np.testing.assert_array_equal(predict_split(again, store).scores, predict_split(run, store).scores)
    assert again.config == run.config
    assert again.results == run.results


@pytest.mark.slow
def test_same_seed_same_bytes_with_everything_on(toy_store):
    store = toy_store(absent={"text": {3, 9}})
    config = TrainConfig(
        layers=(8,), folds=3, members=2, ema=0.99, schedule="onecycle", modality_dropout=0.3, sampler="balanced",
        class_weights="effective", clip_norm=1.0, optimizer="adamw", weight_decay=0.01, epochs=3, batch_size=8,
        thresholds="class", refit=True, loss="asl", loss_options={"gamma_negative": 2.0, "reduction": "sum"},
    )  # fmt: skip
    first, again = (train_head(store, config) for _ in range(2))
    assert states(first) == states(again)
    assert first.held_out.scores.tobytes() == again.held_out.scores.tobytes()
