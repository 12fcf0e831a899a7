"""A run of a blend: trained without settings, saved, loaded, predicted, measured, described."""

import json
from dataclasses import replace

import numpy as np
import pytest
from runs.conftest import SPLITS
from sklearn.metrics import average_precision_score

from cachefuse.errors import ConfigError
from cachefuse.report.provenance import settings, train_command
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.files import list_runs
from cachefuse.runs.model_card import model_card
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming, says

SETTINGS = {"folds": 3, "refit": True, "seed": 0}
LINEAR = TrainConfig(head="linear", optimizer="lbfgs", weight_decay=0.02, loss="bce", epochs=2, **SETTINGS)
BLEND = (TrainConfig(fusion="kernel", **SETTINGS), LINEAR)


@pytest.fixture(scope="module")
def run(data):
    return train_head(data.store, BLEND, device="cpu")


def test_without_settings_a_blend_is_trained(data):
    run = train_head(data.store, device="cpu")
    assert run.config.folds == 5
    assert set(run.models) <= {"kernel-ridge-bce", "sum-mlp-bce"}
    assert run.held_out.split == "oof"


def test_it_is_the_weighted_mean_of_its_models(run, data):
    assert sorted(run.models) == ["kernel-ridge-bce", "sum-linear-bce"]
    assert sum(run.models.values()) == pytest.approx(1)
    assert [member.fold for member in run.members] == [None, None]
    alone = [train_head(data.store, config, device="cpu") for config in BLEND]
    scores = [predict_split(each, data.store, "test", device="cpu").scores for each in alone]
    mean = sum(weight * x for weight, x in zip(run.models.values(), scores, strict=True))
    np.testing.assert_allclose(predict_split(run, data.store, "test", device="cpu").scores, mean, atol=1e-6)
    held_out = [each.held_out for each in alone]
    assert (run.held_out.parts == held_out[0].parts).all()
    apart = np.stack([each.scores for each in held_out])
    assert (run.held_out.scores <= apart.max(0) + 1e-6).all()
    assert (run.held_out.scores >= apart.min(0) - 1e-6).all()


def test_it_comes_back_from_its_folder(run, data, tmp_path):
    loaded = load_run(save_run(run, tmp_path))
    assert loaded.name == "made-blend-1"
    assert loaded.models == pytest.approx(run.models)
    ours, theirs = (predict_split(each, data.store, "test", device="cpu") for each in (run, loaded))
    np.testing.assert_array_equal(ours.scores, theirs.scores)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert loaded.members[0].config.fusion_options["n_landmarks"] == len(data.labelled("train")) + len(
        data.labelled("val")
    )
    [listed] = list_runs(tmp_path)
    assert (listed.n_models, listed.split, listed.settings) == (2, "oof", {})


def test_it_is_measured_without_a_modality_on_rows_that_no_model_has_seen(run, data):
    whole, less = (
        evaluate(run, data.store, split="dev", without=absent, device="cpu").metrics["macro_ap"]
        for absent in ((), ("image",))
    )
    assert less < whole


def test_it_says_what_it_is(run):
    card = model_card(replace(run, name="made-blend-1"))
    assert says(card, "blend kernel-ridge-bce sum-linear-bce")
    assert [name for name, _ in settings(run)] == list(run.models)
    assert train_command(run).split() == [
        "cachefuse", "train-head", "--dataset", "made", "--encoder", "toy", "--folds", "3", "--refit",
    ]  # fmt: skip


def test_settings_without_effect_are_not_listed(data, tmp_path):
    save_run(train_head(data.store, TrainConfig(fusion="kernel", folds=3, standardize="rows"), device="cpu"), tmp_path)
    [listed] = list_runs(tmp_path)
    assert listed.settings == {"fusion": "kernel", "folds": 3, "standardize": "rows"}


def test_the_same_seed_gives_the_same_bytes(run, data, tmp_path):
    again = train_head(data.store, BLEND, device="cpu")
    files = [save_run(each, tmp_path / name) / "model.safetensors" for name, each in (("a", run), ("b", again))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_must_be_held_out_in_the_same_way(data):
    with pytest.raises(ConfigError, match=naming("blend folds")):
        train_head(data.store, [BLEND[0], replace(BLEND[1], folds=2)], device="cpu")


def test_weights_need_rows_held_out(make_data, tmp_path):
    store = make_data(tmp_path / "made.zarr", n=60).store
    with pytest.raises(ConfigError, match=naming("val --folds 5")):
        train_head(store, [replace(config, folds=0) for config in BLEND], device="cpu")


def test_warnings_come_once(make_store_in, tmp_path, caplog):
    x = {"image": np.random.default_rng(0).normal(size=(len(SPLITS), 6)).astype(np.float16)}
    targets = np.zeros((len(SPLITS), 3), np.int8)
    targets[::2, 0] = targets[1::2, 1] = 1
    train_head(make_store_in(tmp_path, x, targets, SPLITS), BLEND, device="cpu")
    assert sum(says(record.getMessage(), "never occurs") for record in caplog.records) == 1


def test_a_limit_of_size_is_one_of_the_blend(data):
    """A model that is too large by itself is left out; two that are too large together are not joined."""
    free = train_head(data.store, BLEND, device="cpu")
    sizes = {member.config.fusion: member.model.size_mb for member in free.members}
    assert len(sizes) == 2
    small, large = sorted(sizes, key=sizes.get)
    for bound in (0.5 * (sizes[small] + sizes[large]), 0.99 * sum(sizes.values())):
        run = train_head(data.store, BLEND, max_size_mb=bound, device="cpu")
        assert run.size_mb <= bound
        assert len(run.models) == 1


def test_a_limit_of_size_is_kept(data):
    with pytest.raises(ConfigError, match=naming("max-size-mb 0.001")):
        train_head(data.store, BLEND[0], max_size_mb=0.001, device="cpu")


@pytest.mark.parametrize("name", ["lr", "epochs", "head", "dropout", "patience", "optimizer", "class_weights"])
def test_settings_of_gradients_are_refused_for_a_solved_fusion(data, name):
    value = {
        "lr": 0.1, "epochs": 3, "head": "linear", "dropout": 0.1, "patience": 3, "optimizer": "sgd",
        "class_weights": "balanced",
    }[name]  # fmt: skip
    with pytest.raises(ConfigError, match=naming(f"kernel solved directly {name}")):
        train_head(data.store, TrainConfig(fusion="kernel", **{name: value}), device="cpu")


def test_multiclass(multiclass):
    run = train_head(multiclass.store, device="cpu")
    scores = predict_split(run, multiclass.store, "test", device="cpu").scores
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    shares = np.bincount(multiclass.hot.argmax(1)) / len(multiclass.hot)
    assert run.metrics["oof"]["accuracy"] > shares.max()


def test_shuffled_labels_give_chance(make_store_in, tmp_path):
    """Nothing leaks from the rows that are measured: not through folds, penalties, weights or thresholds."""
    rng = np.random.default_rng(5)
    x = {m: rng.normal(size=(len(SPLITS), 6)).astype(np.float16) for m in ("image", "text")}
    targets = (rng.random((len(SPLITS), 3)) < 0.3).astype(np.int8)
    store = make_store_in(tmp_path, x, targets, SPLITS)
    gaps = []
    for seed in range(4):
        run = train_head(store, [replace(config, seed=seed) for config in BLEND], device="cpu")
        truth = targets[run.held_out.rows]
        ap = np.mean([average_precision_score(truth[:, c], run.held_out.scores[:, c]) for c in range(3)])
        gaps.append(ap - truth.mean())
    assert abs(np.mean(gaps)) < 0.08


def test_run_json_lists_its_models(run, tmp_path):
    about = json.loads((save_run(run, tmp_path) / "run.json").read_text())
    assert [member["config"]["fusion"] for member in about["members"]] == ["kernel", "sum"]
    assert sum(member["weight"] for member in about["members"]) == pytest.approx(1)
