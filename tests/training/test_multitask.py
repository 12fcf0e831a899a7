"""Training on a dataset of several tasks: losses, stages, figures, and everything that goes on from a run."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefuse.data.column import Column
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError, RunError
from cachefuse.experiments.sweep import sweep
from cachefuse.extraction.open_store import open_store
from cachefuse.fusion.cma import TUNING, WARM_UP
from cachefuse.metrics import METRICS
from cachefuse.nn.losses import asl, build_loss, class_weights, cross_entropy, per_task
from cachefuse.report.run_page import report_html
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate, write_gates
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.build import training_loss, untrained_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, TrainingSet, open_training_data
from cachefuse.training.inference import to_scores
from cachefuse.training.resolved import LOSS_OPTIONS
from cachefuse.training.split import make_splits
from cachefuse.training.train import train_model, train_models
from fixtures.messages import naming
from fixtures.toy_stores import MadeUpImage

MANIFEST = """
name = "apa"
task = "multitask"
reader = { kind = "table", files = { train = "all.csv" } }
[tasks.color]
task = "multiclass"
[tasks.pattern]
task = "multiclass"
[tasks.tags]
task = "multilabel"
min_labels = 1
"""
CLASSES = ("color=r", "color=g", "color=b", "pattern=plain", "pattern=dots", "tags=x", "tags=y", "tags=z")
N, TRAIN, VAL = 150, 100, 40
SMALL = {"width": 16, "heads": 2, "depth": 1}
QUICK = {"epochs": 2, "batch_size": 32, "layers": (8,)}


@pytest.fixture
def tasks_store(tmp_path, add_features):
    """150 rows, of which a third lack each label and ten have none; a quarter of the rows lack a modality."""

    def make(manifest=MANIFEST, classes=CLASSES, columns=slice(None), seed=0):
        rng = np.random.default_rng(seed)
        x = {m: rng.normal(size=(N, 6)).astype(np.float16) for m in ("image", "text")}
        signal = np.concatenate([*x.values()], axis=1).astype(np.float32) @ rng.normal(size=(12, 8))
        targets = np.concatenate(
            [np.eye(3)[signal[:, :3].argmax(1)], np.eye(2)[signal[:, 3:5].argmax(1)], signal[:, 5:] > 0], axis=1
        ).astype(np.int8)
        for columns_of_task in (slice(0, 3), slice(3, 5), slice(5, 8)):
            targets[rng.random(N) < 1 / 3, columns_of_task] = -1
        targets[TRAIN + VAL :] = -1
        parsed = parse_manifest(manifest, "apa.toml")
        images = [None if row % 8 == 0 else MadeUpImage(Path(f"{row}.png")) for row in range(N)]
        texts = [() if row % 8 == 4 else (f"text {row}",) for row in range(N)]
        dataset = Dataset(
            manifest=parsed,
            classes=classes,
            ids=[f"row{row}" for row in range(N)],
            splits=np.array(["train"] * TRAIN + ["val"] * VAL + ["test"] * (N - TRAIN - VAL)),
            targets=targets[:, columns],
            modalities={"image": Column(images), "text": Column.texts(texts)},
            name="apa",
        )
        store = open_store(tmp_path / f"apa{seed}.zarr", dataset)
        others = {
            "image": {"tokens": rng.normal(size=(N, 4, 3)).astype(np.float16)},
            "text": {"tokens": [rng.normal(size=(1 + row % 5, 2)).astype(np.float16) for row in range(N)]},
        }
        for modality, values in x.items():
            add_features(store, "toy", modality, values, **others[modality])
        return FeatureStore(store.path)

    return make


@pytest.fixture
def data(tasks_store):
    return open_training_data(tasks_store())


def cma(**settings):
    return TrainConfig(fusion="cma", fusion_options=SMALL, **{**QUICK, **settings})


def test_the_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=rng)
    targets = torch.tensor([[1, 0, 0, 1, 0], [-1, -1, -1, 0, 1], [0, 0, 1, -1, -1], [-1] * 5])
    loss = per_task([(slice(0, 3), cross_entropy), (slice(3, 5), asl)])
    one = -logits[0, :3].log_softmax(0)[0]
    other = -logits[2, :3].log_softmax(0)[2]
    tags = asl(logits[:2, 3:], targets[:2, 3:])
    torch.testing.assert_close(loss(logits, targets), ((one + other) / 2 + tags) / 2)
    only_color = targets.clone()
    only_color[:, 3:] = -1
    torch.testing.assert_close(loss(logits, only_color), (one + other) / 4)
    nothing = logits.clone().requires_grad_(True)
    value = loss(nothing, torch.full((4, 5), -1))
    value.backward()
    assert value == 0
    assert not nothing.grad.any()


def test_rows_without_a_label_have_no_gradient_in_its_task(data):
    config = data.resolve(TrainConfig(head="linear"))
    model = untrained_model(data, config)
    training_set = TrainingSet.prepare(data, model, data.train_rows())
    logits = torch.randn(len(training_set.rows), 8, requires_grad=True)
    training_loss(data, config, training_set)(logits, training_set.targets).backward()
    missing = training_set.targets < 0
    assert missing.any()
    assert not logits.grad[missing].any()
    assert logits.grad[~missing].abs().min() > 0


def test_one_task_is_trained_as_a_dataset_of_it_alone(tasks_store):
    several = open_training_data(tasks_store())
    for name, columns, kind in (("color", slice(0, 3), "multiclass"), ("tags", slice(5, 8), "multilabel")):
        text = MANIFEST.partition("[tasks.")[0] + f'[tasks.{name}]\ntask = "{kind}"\n'
        store = tasks_store(text, CLASSES[columns], columns)
        config = TrainConfig(head="linear", epochs=3)
        named = open_training_data(store)
        alone = TrainingData.of_one_task("alone", named.table, named.classes, kind, ("accuracy",))
        assert several.tasks[0].name == "color"
        one, other = (train_models(of, of.resolve(config)) for of in (named, alone))
        assert one.members[0].config.loss == other.members[0].config.loss
        for key, weights in one.members[0].model.state_dict().items():
            torch.testing.assert_close(weights, other.members[0].model.state_dict()[key], msg=key)
        np.testing.assert_allclose(one.held_out.scores, other.held_out.scores, atol=1e-6)
        np.testing.assert_allclose(one.thresholds, other.thresholds, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "settled", "losses"),
    [(None, "asl", ("ce", "ce", "asl")), ("bce", "bce", ("ce", "ce", "bce")), ("ce", "ce", ("ce", "ce", "asl"))],
)
def test_each_task_takes_the_loss_that_fits_it(given, settled, losses, data):
    config = data.resolve(TrainConfig(loss=given, head="linear", class_weights="balanced"))
    assert config.loss == settled
    training_set = TrainingSet.prepare(data, untrained_model(data, config), data.train_rows())
    logits = torch.randn(len(training_set.rows), 8)
    expected = []
    for task, name in zip(data.tasks, losses, strict=True):
        rows = training_set.targets[:, task.columns.start] >= 0
        own = training_set.targets[rows, task.columns]
        weights = class_weights(own, "balanced", task.kind)
        expected.append(build_loss(name, LOSS_OPTIONS.get(name, {}), weights)(logits[rows, task.columns], own))
    torch.testing.assert_close(
        training_loss(data, config, training_set)(logits, training_set.targets), sum(expected) / 3
    )
    scores = to_scores(logits, config.loss, data.tasks)
    torch.testing.assert_close(scores[:, :3], logits[:, :3].softmax(1))
    torch.testing.assert_close(scores[:, 3:5], logits[:, 3:5].softmax(1))
    torch.testing.assert_close(scores[:, 5:], logits[:, 5:].sigmoid())


def test_tasks_of_one_kind(tasks_store):
    text = MANIFEST.partition("[tasks.tags]")[0]
    data = open_training_data(tasks_store(text, CLASSES[:5], slice(0, 5)))
    assert data.resolve(TrainConfig()).loss == "ce"
    with pytest.raises(ConfigError, match=naming("loss asl")):
        data.resolve(TrainConfig(loss="asl"))
    with pytest.raises(ConfigError, match="thresholds"):
        train_models(data, data.resolve(TrainConfig(thresholds="class", epochs=1)))


def test_settings_of_one_task_are_refused(data):
    with pytest.raises(ConfigError, match=naming("sampler balanced")):
        data.resolve(TrainConfig(sampler="balanced"))
    with pytest.raises(ConfigError, match="metrics"):
        data.resolve(TrainConfig(monitor="macro_f1"))
    assert data.resolve(TrainConfig(monitor="loss", patience=2)).monitored_metric is None


def test_figures_are_of_the_rows_that_have_the_label(tasks_store):
    run = train_head(tasks_store(), TrainConfig(head="linear", epochs=20))
    result = run.results["val"]
    targets = tasks_store().targets[run.held_out.rows]
    rows = targets[:, 0] >= 0
    scores = run.held_out.scores
    right = scores[rows, :3].argmax(1) == targets[rows, :3].argmax(1)
    assert result.metrics["color.accuracy"] == pytest.approx(right.mean())
    names = ("color.accuracy", "pattern.accuracy", "tags.micro_f1")
    assert result.metrics["mean"] == pytest.approx(np.mean([result.metrics[name] for name in names]))
    assert result.per_class["support"] == (targets > 0).sum(0).tolist()
    assert result.metrics["mean"] > 0.5  # by chance 0.4
    assert (run.thresholds[:5] == 0.5).all()


@pytest.mark.parametrize("fusion", ["sum", "concat", "mixed", "gated", "tirg", "midfusion", "cma", "image"])
@pytest.mark.one_in(3)
def test_every_fusion_trains_saves_and_predicts(fusion, tasks_store, tmp_path):
    store = tasks_store()
    options = {"cma": SMALL, "midfusion": SMALL, "tirg": {"width": 16}}.get(fusion, {})
    run = train_head(store, TrainConfig(fusion=fusion, fusion_options=options, **QUICK))
    again = load_run(save_run(run, tmp_path / "runs"))
    assert again.tasks == run.tasks
    found = predict_split(again, store)
    assert found.ids == [f"row{row}" for row in range(TRAIN + VAL, N)]
    np.testing.assert_array_equal(found.scores, predict_split(run, store).scores)
    np.testing.assert_allclose(found.scores[:, :3].sum(1), 1, atol=1e-5)
    for row in range(len(found.ids)):
        by_task = found.by_task(row)
        assert [len(by_task[name]) for name in ("color", "pattern")] == [1, 1]
        assert by_task["color"] == [CLASSES[found.scores[row, :3].argmax()].removeprefix("color=")]
        assert len(by_task["tags"]) >= 1
        assert found.names(row) == [f"{task}={label}" for task, labels in by_task.items() for label in labels]


@pytest.mark.parametrize("settings", [{"folds": 3, "members": 2, "refit": True}, {"folds": 2, "patience": 1}])
def test_folds(settings, tasks_store, caplog):
    store = tasks_store()
    with caplog.at_level(logging.WARNING):
        run = train_head(store, TrainConfig(head="linear", **QUICK | {"layers": None}, **settings))
    assert run.held_out.split == "oof"
    assert run.results["oof"].n_rows == (store.targets[: TRAIN + VAL] >= 0).any(1).sum()
    assert not caplog.records


@pytest.mark.parametrize("ablate", [(), ("modality-attention",)])
def test_tuning_trains_modality_attention_and_heads_alone(ablate, tasks_store):
    data = open_training_data(tasks_store(), views=cma().reads)
    config = data.resolve(cma(stages=(WARM_UP, TUNING), ablate=ablate))
    (split,) = make_splits(data, config)
    after = {}

    def look(progress):
        after.setdefault(progress.stage, []).append(progress.epoch.epoch)

    model, history = train_model(data, config, split, on_progress=look)
    assert after == {WARM_UP: [1, 2], TUNING: [1, 2]}
    assert history.stages == {WARM_UP: 2, TUNING: 2}
    assert [epoch.epoch for epoch in history.earlier[WARM_UP]] == [1, 2]
    warm, _ = train_model(data, data.resolve(cma(stages=(WARM_UP,), ablate=ablate)), split)
    before, now = warm.state_dict(), model.state_dict()
    for name, weights in now.items():
        tuned = "head" in name or "relevance" in name
        assert torch.equal(weights, before[name]) != tuned, name
    assert all(parameter.requires_grad for parameter in model.parameters())
    joint, _ = train_model(data, data.resolve(cma(ablate=ablate)), split)
    assert all(torch.equal(x, before[name]) for name, x in joint.state_dict().items())


def test_tuning_begins_at_the_best_of_the_warm_up(tasks_store):
    data = open_training_data(tasks_store(), views=cma().reads)
    config = data.resolve(cma(stages=(WARM_UP, TUNING), epochs=8, lr=0.3, patience=2, schedule="constant"))
    (split,) = make_splits(data, config)
    _, history = train_model(data, config, split)
    warm_up = history.earlier[WARM_UP]
    best = history.stages[WARM_UP]
    assert best == 1 + int(np.argmax([epoch.score for epoch in warm_up]))
    assert best < len(warm_up)


def test_stages_are_kept_with_the_run(tasks_store, tmp_path):
    store = tasks_store()
    run = train_head(store, cma(stages=(WARM_UP, TUNING), folds=2, refit=True))
    again = load_run(save_run(run, tmp_path / "runs"))
    assert again.config.stages == (WARM_UP, TUNING)
    assert again.histories == run.histories
    assert set(again.histories[0].stages) == {WARM_UP, TUNING}
    page = report_html(again, store)
    assert "Loss, warm-up" in page
    assert "--stages warm-up,tuning" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "sum", "stages": (WARM_UP,)}, "fusion sum --stages"),
        (
            {"fusion": "cma", "stages": (WARM_UP, "end-to-end", TUNING)},
            "encoders",
        ),
        ({"fusion": "cma", "stages": (TUNING,)}, "warm-up,tuning tuning"),
        (
            {"fusion": "cma", "stages": (WARM_UP, "warmup")},
            "warm-up,tuning warm-up,warmup",
        ),
        ({"fusion": "cma", "stages": (WARM_UP,), "scheme": "staged"}, "scheme staged"),
    ],
)
def test_stages_that_cannot_be(settings, message, data):
    with pytest.raises(ConfigError, match=naming(message)):
        data.resolve(TrainConfig(**settings))


def test_gates_are_each_tasks_own(tasks_store, tmp_path):
    store = tasks_store()
    run = train_head(store, cma(epochs=4, lr=0.02))
    found = evaluate(run, store, n_resamples=20)
    weights = found.weights
    assert weights.shape == (len(run.held_out.rows), 3, 2)
    np.testing.assert_allclose(weights.sum(2), 1, atol=1e-6)
    assert np.abs(weights[:, 0] - weights[:, 1]).max() > 1e-3
    targets = store.targets[found.rows]
    table = open_training_data(store, views=run.config.reads).table
    model = copy.deepcopy(run.members[0].model).eval()
    with torch.no_grad():
        expected = model.modality_weights(*table.batch(torch.from_numpy(found.rows))).numpy()
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    for k, task in enumerate(run.tasks):
        own, rows = found.of_task(task), targets[:, task.columns.start] >= 0
        assert own.n_rows == rows.sum() == len(own.rows)
        assert own.classes == tuple(name.partition("=")[2] for name in CLASSES[task.columns])
        assert own.gates["image"] == pytest.approx(expected[rows, k, 0].mean(), abs=1e-5)
        first = targets[:, task.columns.start] > 0
        assert own.gates_per_class["text"][0] == pytest.approx(expected[first, k, 1].mean(), abs=1e-5)
        assert own.metrics.keys() >= {"recall_at_p90", "macro_f1"}
        assert own.intervals.keys() == own.metrics.keys()
        for name in ("macro_f1", "recall_at_p90"):
            value = METRICS[name](own.targets, own.scores, own.predictions)
            assert own.metrics[name] == pytest.approx(value) == found.metrics[f"{task.name}.{name}"]
        assert found.as_dict()["tasks"][task.name] == own.as_dict()
    write_gates(found, store, tmp_path / "gates.csv")
    header, first_row, *_ = (tmp_path / "gates.csv").read_text().splitlines()
    assert header == "id,color.image,color.text,pattern.image,pattern.text,tags.image,tags.text"
    assert first_row == ",".join([store.ids[found.rows[0]], *(f"{x:.4f}" for x in weights[0].ravel())])


def test_without_a_modality(tasks_store, tmp_path):
    store = tasks_store()
    run = train_head(store, TrainConfig(fusion="gated", head="linear", epochs=20))
    everything, without = (evaluate(run, store, without=gone, n_resamples=0) for gone in ((), ["image"]))
    assert without.metrics["mean"] < everything.metrics["mean"]
    assert without.of_task(run.tasks[0]).gates["image"] == 0
    assert everything.weights.shape[1] == 3  # a fusion that weighs once does it for all tasks
    plain = train_head(store, TrainConfig(head="linear", epochs=1))
    assert evaluate(plain, store, n_resamples=0).weights.shape[2] == 0
    with pytest.raises(RunError, match=naming("gated cma")):
        write_gates(evaluate(plain, store, n_resamples=0), store, tmp_path / "x.csv")


def test_an_ensemble_of_fusions(tasks_store):
    store = tasks_store()
    runs = [train_head(store, config) for config in (cma(), TrainConfig(fusion="gated", **QUICK))]
    joined = ensemble(runs, store)
    np.testing.assert_allclose(
        joined.held_out.scores, np.mean([run.held_out.scores for run in runs], axis=0), atol=1e-6
    )
    assert joined.results["val"].metrics.keys() == runs[0].results["val"].metrics.keys()
    both = evaluate(joined, store, n_resamples=0)
    alone = [evaluate(run, store, n_resamples=0).weights for run in runs]
    np.testing.assert_allclose(both.weights, np.mean(alone, axis=0), atol=1e-6)


@pytest.mark.slow
def test_a_sweep_is_of_the_figures_of_runs(tasks_store, tmp_path):
    store = tasks_store()
    base = TrainConfig(head="linear", epochs=5)
    result = sweep(store, base, [{"fusion": "sum"}, {"fusion": "concat"}], folder=tmp_path / "s", seeds=(0, 1))
    run = train_head(store, TrainConfig(fusion="concat", head="linear", epochs=5, seed=1))
    assert result.metrics[0] == "mean"
    (trial,) = [trial for trial in result.settings[1].trials if trial.seed == 1]
    assert trial.metrics == pytest.approx(run.results["val"].metrics)
    again = sweep(store, base, [{"fusion": "sum"}, {"fusion": "concat"}], folder=tmp_path / "s", seeds=(0, 1))
    assert again.best.trials == result.best.trials


def test_averaged_weights_over_tokens(tasks_store):
    run = train_head(tasks_store(), cma(ema=0.9))
    assert all(epoch.raw_score is not None for epoch in run.histories[0].epochs)


def test_few_rows_with_a_label_choose_no_thresholds(tasks_store):
    store = tasks_store()
    data = open_training_data(store)
    val = data.rows("val")
    data.table.targets[val[1:], 5:] = -1
    trained = train_models(data, data.resolve(TrainConfig(head="linear", epochs=1)))
    assert (trained.thresholds == 0.5).all()
    assert trained.held_out.predictions(data, data.resolve(TrainConfig())).shape == (len(val), 8)
