from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression

from cachefuse.errors import CacheError, ConfigError, DataError, TrainingError
from cachefuse.feature_spec import pooled_specs
from cachefuse.fusion import FUSIONS
from cachefuse.metrics import METRICS
from cachefuse.nn import HEADS, LOSSES
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming


def layers(head):
    return None if head == "linear" else (8,)


def quick(**settings):
    return TrainConfig(**{"head": "linear", "epochs": 2, **settings})


def model_of(run):
    (member,) = run.members
    return member.model


def as_bytes(run):
    return save(dict(model_of(run).state_dict()))


# Every head and loss with fusions of pooled features; with others they are the same modules, and take longer.
LARGE = {"cma", "lit", "midfusion", "tirg"}
COMBINATIONS = [
    (fusion, head, loss)
    for fusion in sorted(name for name in FUSIONS if not FUSIONS[name].solved)  # others have neither
    for head in sorted(HEADS)
    for loss in sorted(LOSSES)
    if fusion not in LARGE or (head == "mlp" and loss in ("asl", "ce"))
]


def is_quick(fusion, head, loss):
    """Whether a combination is no slow test: each fusion with each head, and the losses by turns."""
    turn = sorted(FUSIONS).index(fusion) + sorted(HEADS).index(head)
    return fusion in LARGE or loss == sorted(LOSSES)[turn % len(LOSSES)]


@pytest.mark.parametrize(
    ("fusion", "head", "loss"),
    [c if is_quick(*c) else pytest.param(*c, marks=pytest.mark.slow) for c in COMBINATIONS],
)
@pytest.mark.one_in(2)
def test_every_combination_trains_and_survives_a_round_trip(fusion, head, loss, toy_store, small_options, tmp_path):
    for task in ("multilabel", "multiclass"):
        store = toy_store(task, absent={"text": {1, 41, 53}}, name=task)
        options = small_options.get(fusion, {})
        config = TrainConfig(
            fusion=fusion, fusion_options=options, head=head, loss=loss, layers=layers(head), epochs=2, batch_size=16
        )
        if task == "multilabel" and loss == "ce":
            with pytest.raises(ConfigError, match=naming("loss ce")):
                train_head(store, config)
            continue
        run = train_head(store, config)
        assert set(run.modalities) == ({fusion} if fusion in ("image", "text") else {"image", "text"})
        assert list(run.metrics) == ["train", "val"]
        before = predict_split(run, store)
        after = predict_split(load_run(save_run(run, tmp_path / "runs")), store)
        assert before.ids == after.ids == [f"row{row}" for row in range(52, 60)]
        assert np.array_equal(before.scores, after.scores)
        assert np.array_equal(before.labels, after.labels)
        assert ((before.scores >= 0) & (before.scores <= 1)).all()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.one_in(3)
def test_every_optimizer_learns(optimizer, toy_store):
    settings = {"optimizer": optimizer, "lr": 0.05, "epochs": 30, "batch_size": 10, "patience": 0}
    assert train_head(toy_store(), quick(**settings)).metrics["train"]["micro_f1"] > 0.9


def test_lbfgs_ends_where_scikit_learn_does(toy_store):
    store = toy_store()
    run = train_head(store, quick(fusion="image", optimizer="lbfgs", loss="bce", weight_decay=0.01))
    x = torch.tensor(store.open_features("toy", "image").read())[:40]
    z = model_of(run).standardize["image"](x).double().numpy()
    for c in range(3):  # the loss is a mean over rows and classes
        expected = LogisticRegression(C=1 / (0.01 * 40 * 3), tol=1e-10, max_iter=1000).fit(z, store.targets[:40, c])
        head = model_of(run).fusion.head
        np.testing.assert_allclose(head.weight[c].detach(), expected.coef_[0], atol=1e-4)
        np.testing.assert_allclose(head.bias[c].detach(), expected.intercept_[0], atol=1e-4)


def test_a_linear_probe_equals_an_independent_loop(toy_store):
    store = toy_store(absent={"image": {0, 7}})
    settings = {"optimizer": "sgd", "lr": 0.1, "batch_size": 0, "epochs": 4, "loss": "bce", "schedule": "constant"}
    run = train_head(store, quick(fusion="image", **settings))
    x = store.open_features("toy", "image").read().astype(np.float64)[:40]
    present = np.ones(40, bool)
    present[[0, 7]] = False
    mean, std = x[present].mean(0), x[present].std(0)
    z = torch.tensor(np.where(present[:, None], (x - mean) / std, 0), dtype=torch.float32)
    y = torch.tensor(store.targets[:40], dtype=torch.float32)
    torch.manual_seed(0)
    probe = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(probe(z), y).backward()
        optimizer.step()
    torch.testing.assert_close(model_of(run).fusion.head.weight, probe.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model_of(run).standardize["image"].mean, torch.tensor(mean, dtype=torch.float32))


def test_measures_with_the_metrics_on_the_validation_rows(toy_store):
    store = toy_store(metrics=["macro_f1", "accuracy"])
    run = train_head(store, quick(thresholds="none"))
    predicted = predict_split(run, store, "val")
    expected = METRICS["macro_f1"](store.targets[40:52], predicted.scores, predicted.labels)
    assert run.metrics["val"]["macro_f1"] == pytest.approx(expected)
    assert list(run.metrics["val"]) == ["macro_f1", "accuracy"]
    assert {split: result.n_rows for split, result in run.results.items()} == {"train": 40, "val": 12}
    assert run.results["val"].per_class["support"] == store.targets[40:52].sum(0).tolist()


def test_keeps_the_epoch_with_the_best_validation_score(toy_store):
    epochs = []
    store = toy_store()
    config = quick(epochs=30, lr=0.05, patience=5, thresholds="none")
    run = train_head(store, config, on_progress=lambda now: epochs.append(now.epoch))
    assert run.metrics["val"]["micro_f1"] == max(epoch.score for epoch in epochs)
    assert run.histories[0].epochs == epochs
    assert len(epochs) == min(30, run.histories[0].best_epoch + 5)


def test_same_seed_same_bytes_another_seed_others(toy_store):
    store = toy_store()
    first, again, other = (
        as_bytes(train_head(store, TrainConfig(layers=(8,), epochs=3, batch_size=7, seed=seed))) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_statistics_do_not_see_validation_or_test_rows(toy_store, make_store):
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    y = np.array([[0, 1], [1, 0]] * 6, np.int8)
    splits = ["train"] * 6 + ["val"] * 6
    other = x.copy()
    other[6:] *= 100
    means = [
        model_of(train_head(make_store({"image": values}, y, splits, name=name), quick(fusion="image"))).standardize[
            "image"
        ]
        for values, name in ((x, "a"), (other, "b"))
    ]
    assert torch.equal(means[0].mean, means[1].mean)
    assert torch.equal(means[0].scale, means[1].scale)


def test_dead_and_constant_dimensions_do_no_harm(make_store):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)).astype(np.float16)
    x[:, 1], x[:, 2] = 0, 123.4
    x[25:, 2] = 60000  # constant in training, far off elsewhere
    y = (x[:, :1] > 0).astype(np.int8)
    store = make_store({"image": x}, y, ["train"] * 20 + ["val"] * 10, metrics=["macro_ap"])
    run = train_head(store, quick(fusion="image", epochs=20, lr=0.1))
    assert run.metrics["val"]["macro_ap"] > 0.8


def test_features_that_are_not_finite_are_refused(toy_store):
    store = toy_store()
    shards = (store.path / "features" / "toy" / "image" / "pooled" / "c").rglob("*")
    shard = next(path for path in shards if path.is_file())
    data = bytearray(shard.read_bytes())
    data[:2] = np.float16("nan").tobytes()
    shard.write_bytes(data)
    with pytest.raises((ConfigError, CacheError), match=r"image|checksum"):
        train_head(store, quick())


@pytest.mark.parametrize(("lr", "optimizer"), [(1e6, "adam"), (1e6, "sgd")])
def test_a_huge_learning_rate_is_said_to_diverge(lr, optimizer, toy_store):
    with pytest.raises(TrainingError, match="lr"):
        train_head(toy_store(metrics=["macro_ap"]), TrainConfig(layers=(8,), lr=lr, optimizer=optimizer, epochs=8))


@pytest.mark.parametrize(("head", "loss"), [("mlp", "bce"), ("gmlp", "asl"), ("mlp", "focal")])
def test_a_large_learning_rate_that_learns_nothing_is_said_to_diverge(head, loss, store):
    with pytest.raises(TrainingError, match=naming("loss lr")):
        train_head(store, TrainConfig(head=head, loss=loss, layers=(64,), lr=0.3, epochs=1))


@pytest.mark.parametrize("loss", ["asl", "bce", "focal"])
@pytest.mark.parametrize("settings", [{"lr": 1e-6, "epochs": 1}, {"lr": 1e-3, "epochs": 1, "batch_size": 4}])
def test_a_run_that_has_barely_begun_has_not_diverged(loss, settings, toy_store):
    store = toy_store()
    for seed in range(2):
        train_head(store, TrainConfig(fusion="mixed", head="gmlp", layers=(16,), loss=loss, seed=seed, **settings))


@pytest.mark.parametrize(("task", "loss"), [("multilabel", "asl"), ("multilabel", "bce"), ("multiclass", "ce")])
def test_two_rows_are_enough(task, loss, make_store):
    targets = np.array([[1, 0], [0, 1]], np.int8) if task == "multilabel" else np.array([0, 1], np.int32)
    x = {"image": np.array([[1, 0], [0, 1]], np.float16)}
    run = train_head(make_store(x, targets, ["train"] * 2, task=task), quick(fusion="image", loss=loss))
    assert list(run.metrics) == ["train"]
    assert run.histories[0].best_epoch == 2


def test_learns_from_several_encoders_of_a_modality(toy_store, add_features):
    store = toy_store()
    add_features(store, "second", "text", np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32))
    run = train_head(store, quick(fusion="concat"))
    assert [used.encoder for used in run.features["text"]] == ["second", "toy"]
    specs = pooled_specs({"image": 6, "text": 8})
    assert model_of(run).specs == {**specs, "text": replace(specs["text"], parts=(3, 5))}
    assert model_of(train_head(store, quick(fusion="text"), encoders=["second"])).specs == pooled_specs({"text": 3})


def test_refuses_a_retrieval_dataset(make_store):
    store = make_store({"text": np.eye(3, dtype=np.float16)}, np.full(3, -1, np.int32), ["train"] * 3, task="retrieval")
    with pytest.raises(ConfigError, match="head"):
        train_head(store, quick())


def test_refuses_a_dataset_without_labelled_training_rows(make_store):
    x = {"text": np.eye(4, dtype=np.float16)}
    y = np.array([[-1, -1], [-1, -1], [1, 0], [0, 1]], np.int8)
    store = make_store(x, y, ["train", "train", "test", "test"])
    with pytest.raises(DataError, match=naming("made train 0 test 2")):
        train_head(store, quick())


def test_refuses_a_modality_that_no_training_row_has(toy_store):
    store = toy_store(absent={"text": set(range(40))})
    with pytest.raises(ConfigError, match=naming("text fusion")):
        train_head(store, quick())
    assert train_head(store, quick(fusion="image")).metrics["val"]


def test_refuses_a_fusion_whose_modality_the_store_lacks(make_store):
    store = make_store({"text": np.eye(4, dtype=np.float16)}, np.eye(4, 2, dtype=np.int8), ["train"] * 4)
    with pytest.raises(ConfigError, match=naming("fusion image text")):
        train_head(store, quick(fusion="image"))


def test_refuses_settings_that_the_head_does_not_take(toy_store):
    with pytest.raises(ConfigError, match=naming("head linear layers")):
        train_head(toy_store(), quick(layers=(4,)))
    with pytest.raises(ConfigError, match=naming("head gmlp layers")):
        train_head(toy_store(name="b"), quick(head="gmlp", layers=(3,)))


def test_refuses_an_unknown_device(toy_store):
    with pytest.raises(ConfigError, match=naming("device gpu")):
        train_head(toy_store(), quick(), device="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trains_alike_on_cuda(toy_store):
    store = toy_store()
    here, there = (train_head(store, quick(epochs=10, batch_size=10), device=device) for device in ("cpu", "cuda"))
    metas = [model_of(run).fusion.meta.weight.cpu() for run in (here, there)]
    torch.testing.assert_close(*metas, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(
        predict_split(there, store, "val", device="cuda").scores, predict_split(here, store, "val").scores, atol=1e-3
    )


def test_captions_do_not_stand_in_the_way_of_the_image(make_store, monkeypatch):
    store = make_store(
        {"image": np.eye(4, dtype=np.float16), "text": np.eye(4, dtype=np.float16)},
        np.array([[0, 1], [1, 0], [1, 0], [0, 1]], np.int8),
        ["train"] * 4,
    )
    monkeypatch.setattr(store, "has_several", lambda modality: modality == "text")
    assert train_head(store, TrainConfig(fusion="image", head="linear", epochs=1)).metrics["train"]
    with pytest.raises(ConfigError, match=naming("fusion text image")):
        train_head(store, TrainConfig(fusion="text", head="linear", epochs=1))
