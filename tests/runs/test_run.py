import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.errors import RunError
from cachefuse.runs.files import find_run
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import match_features
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import ResolvedConfig
from fixtures.messages import naming
from fixtures.runs import edit, reseal, without_checksums

QUICK = TrainConfig(head="linear", epochs=2, loss="bce")


@pytest.fixture(scope="module")
def once(toy_store_in, tmp_path_factory):
    return train_head(toy_store_in(tmp_path_factory.mktemp("once")), QUICK)


@pytest.fixture
def trained(once):
    """A copy of one run, which a test may spoil."""
    return deepcopy(once)


@pytest.fixture
def saved(trained, tmp_path):
    return save_run(trained, tmp_path / "runs")


def test_comes_back_as_it_was(trained, saved):
    run = load_run(saved)
    for name in ("name", "dataset", "manifest", "classes", "features", "results", "split_digest", "sources"):
        assert getattr(run, name) == getattr(trained, name), name
    assert (run.histories, run.created, run.path) == (trained.histories, trained.created, saved)
    assert run.config == ResolvedConfig(
        head="linear", epochs=2, loss="bce", lr=1e-3, weight_decay=0.0, schedule="cosine", dropout=0.8, batch_size=256
    )
    assert run.task == "multilabel"
    state = trained.members[0].model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.members[0].model.state_dict().items())
    assert run.thresholds.tolist() == trained.thresholds.tolist()
    assert run.held_out.split == "val"
    for name in ("rows", "parts", "scores"):
        np.testing.assert_array_equal(getattr(run.held_out, name), getattr(trained.held_out, name))


def test_a_figure_that_is_not_defined_is_null_in_the_file_and_nan_in_python(make_store, tmp_path):
    x = {"image": np.eye(4, dtype=np.float16)}
    y = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.int8)
    path = save_run(train_head(make_store(x, y, ["train", "train", "val", "val"]), QUICK), tmp_path / "runs")
    assert json.loads((path / "run.json").read_text())["results"]["val"]["per_class"]["ap"][1] is None
    assert np.isnan(load_run(path).results["val"].per_class["ap"][1])


def test_counts_parameters_and_size(trained):
    assert trained.n_parameters == (6 * 3 + 3) + (5 * 3 + 3) + (3 * 3 + 3)
    assert trained.size_mb == pytest.approx(4 * (trained.n_parameters + 2 * 11) / 1e6)


def test_names_count_up_and_the_latest_is_by_date(toy_store, tmp_path):
    runs, store = tmp_path / "runs", toy_store()
    paths = [save_run(train_head(store, QUICK), runs) for _ in range(3)]
    assert [path.name for path in paths] == [f"made-sum-linear-bce-{n}" for n in (1, 2, 3)]
    assert find_run(runs) == paths[2]
    edit(paths[0] / "run.json", lambda values: values.update(created="2999-01-01T00:00:00"))
    assert find_run(runs) == paths[0]


def test_runs_saved_at_once_all_find_a_name(trained, tmp_path):
    from copy import copy

    runs, copies = tmp_path / "runs", [copy(trained) for _ in range(6)]
    threads = [threading.Thread(target=save_run, args=(run, runs)) for run in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.name for run in copies) == [f"made-sum-linear-bce-{n}" for n in range(1, 7)]
    assert all((run.path / "run.json").is_file() for run in copies)
    assert sorted(path.name for path in runs.iterdir()) == sorted(run.name for run in copies)


def test_finds_a_run_by_name_or_path(saved, tmp_path, monkeypatch):
    assert find_run(saved.parent, saved.name) == saved
    assert find_run(tmp_path / "elsewhere", str(saved)) == saved
    monkeypatch.chdir(saved)
    assert load_run(find_run(tmp_path / "elsewhere", ".")).name == saved.name


def test_says_which_runs_there_are(saved, tmp_path):
    with pytest.raises(RunError, match=naming("nope made-sum-linear-bce-1")):
        find_run(saved.parent, "nope")
    with pytest.raises(RunError, match="nope"):
        find_run(tmp_path, "nope")
    with pytest.raises(RunError, match=naming("elsewhere train-head")):
        find_run(tmp_path / "elsewhere")


def test_a_failed_save_leaves_nothing(trained, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("cachefuse.runs.folder.write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        save_run(trained, tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from cachefuse.runs import folder as module
real = module.write_atomically
def write(path, data):
    real(path, data)
    if path.name == "run.json":
        os.kill(os.getpid(), signal.SIGKILL)
module.write_atomically = write
from cachefuse.runs.save import load_run, save_run
save_run(load_run(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_kill_in_save_leaves_no_run(saved, tmp_path):
    runs = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, saved, runs], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(RunError, match=naming("killed train-head")):
        find_run(runs)
    path = save_run(load_run(saved), runs)
    assert find_run(runs) == path


@pytest.mark.parametrize("file", ["run.json", "history.json", "model.safetensors", "held_out.safetensors"])
def test_names_a_file_that_is_missing(saved, file):
    (saved / file).unlink()
    with pytest.raises(RunError, match=naming(file)):
        load_run(saved)


@pytest.mark.parametrize("file", ["run.json", "history.json", "model.safetensors", "held_out.safetensors"])
@pytest.mark.parametrize("size", [0, 0.5, 0.99])
def test_names_a_file_that_is_cut_short(saved, file, size):
    path = saved / file
    path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    with pytest.raises(RunError, match=naming(file)):
        load_run(saved)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", ["run.json", "history.json"])
def test_names_a_file_that_is_no_json_object(saved, file, content):
    (saved / file).write_bytes(content)
    with pytest.raises(RunError, match=naming(file)):
        load_run(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", {"fuse": 1}, "fuse"),
        ("config", {"fusion": "smu"}, "fusion smu"),
        ("config", {"fusion": ["sum"]}, ""),
        ("config", {"epochs": "many"}, ""),
        ("config", {"dropout": "none"}, ""),
        ("config", {"seed": -1}, "seed"),
        ("config", 5, "config"),
        ("classes", "abc", "classes"),
        ("classes", [1, 2, 3], "classes.0"),
        ("classes", None, "classes"),
        ("dataset", 5, "dataset"),
        ("created", 5, "created"),
        ("seconds", "long", "seconds"),
        ("results", {"val": {"n_rows": "many"}}, "results.val.n_rows"),
        ("results", {"val": 1}, "results.val"),
        ("thresholds", [0.5], "thresholds 1 3"),
        ("thresholds", ["high", 0.5, 0.5], "thresholds.0"),
        ("members", [], "members"),
        ("members", [{}], "members.0.config"),
        ("sources", "abc", "sources"),
        ("manifest", {}, "manifest.name"),
        ("manifest", {"name": "a", "task": "retrieval", "reader": {"kind": "shapes"}}, "retrieval"),
        ("manifest", {"name": "../a", "task": "multilabel", "reader": {"kind": "shapes"}}, "manifest.name"),
        ("manifest", {"name": "a", "task": "multilabel", "reader": {"kind": "os"}}, "reader os"),
    ],
)
def test_refuses_a_description_edited_into_nonsense(saved, key, value, message):
    edit(saved / "run.json", lambda values: values.update({key: value}))
    with pytest.raises(RunError, match=naming(f"run.json {message}")):
        load_run(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", {"head": "mlp", "layers": [-1]}, "layers 1"),
        ("config", {"head": "mlp", "layers": ["a"]}, ""),
        ("config", {"loss": "ce"}, "loss ce"),
        ("features", {"image": [{"encoder": "toy"}]}, "features.image.0.source"),
        ("features", {"image": [], "text": 5}, "features.text"),
        ("features", {}, "fusion sum"),
        ("weight", "all", "members.0.weight"),
        ("weight", -1.0, "members.0.weight"),
        ("weight", float("inf"), "members.0.weight"),
    ],
)
def test_refuses_a_member_edited_into_nonsense(saved, key, value, message):
    edit(saved / "run.json", lambda values: values["members"][0].update({key: value}))
    with pytest.raises(RunError, match=naming(f"run.json {message}")):
        load_run(saved)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores", lambda x: x.bfloat16()),
        ("scores", lambda x: x.double()),
        ("scores", lambda x: x * torch.nan),
        ("rows", lambda x: x.to(torch.int8)),
        ("rows", lambda x: -x),
    ],
)
def test_names_held_out_scores_of_other_kinds(saved, name, change):
    arrays = load_file(saved / "held_out.safetensors")
    save_file({**arrays, name: change(arrays[name])}, saved / "held_out.safetensors")
    reseal(saved)
    with pytest.raises(RunError, match=naming("held_out.safetensors")):
        load_run(saved)


def test_names_held_out_scores_that_lack_a_fold(saved):
    edit(saved / "run.json", lambda values: values["members"][0].update(fold=7))
    with pytest.raises(RunError, match=naming("held_out.safetensors")):
        load_run(saved)


@pytest.mark.parametrize("change", [{"rows": 2}, {"scores": 3}, {"parts": None}])
def test_names_held_out_scores_edited_into_nonsense(saved, change):
    arrays = load_file(saved / "held_out.safetensors")
    for name, n in change.items():
        arrays[name] = arrays[name][:n] if n else arrays.pop(name)[:0]
    save_file({name: x.clone() for name, x in arrays.items() if len(x)}, saved / "held_out.safetensors")
    reseal(saved)
    with pytest.raises(RunError, match=naming("held_out.safetensors")):
        load_run(saved)


def test_without_the_held_out_scores_a_run_of_before_there_were_checksums_still_predicts(saved):
    (saved / "held_out.safetensors").unlink()
    without_checksums(saved)
    run = load_run(saved)
    assert run.held_out is None
    with pytest.raises(RunError, match=naming("--folds --split")):
        run.held_out_scores(lambda member: None)


def test_a_description_of_a_huge_model_takes_no_memory(saved):
    edit(saved / "run.json", lambda values: values["members"][0]["config"].update(head="mlp", layers=[10**6, 10**6]))
    with pytest.raises(RunError, match=naming("model.safetensors weights")):
        load_run(saved)


@pytest.mark.parametrize("width", [-1, 0, "wide", None, 10**13])
def test_refuses_a_width_edited_into_nonsense(saved, width):
    edit(saved / "run.json", lambda values: values["members"][0]["features"]["image"][0].update(width=width))
    with pytest.raises(RunError, match=r"(run\.json|model\.safetensors): "):
        load_run(saved)


@pytest.mark.parametrize("key", ["dataset", "manifest", "classes", "config", "members", "thresholds", "results"])
def test_names_a_key_that_is_missing(saved, key):
    edit(saved / "run.json", lambda values: values.pop(key))
    with pytest.raises(RunError, match=naming(f"run.json {key}")):
        load_run(saved)


@pytest.mark.parametrize(
    "history", [{"histories": 5}, {"histories": [{"epochs": [{"epoch": 1}]}]}, {"histories": [{"best_epoch": "first"}]}]
)
def test_names_a_history_edited_into_nonsense(saved, history):
    edit(saved / "history.json", lambda values: values.update(history))
    with pytest.raises(RunError, match=naming("history.json")):
        load_run(saved)


@pytest.mark.parametrize("version", [1, "2", None])
def test_refuses_a_run_of_another_version(saved, version):
    edit(saved / "run.json", lambda values: values.update(format=version))
    with pytest.raises(RunError, match=naming(f"version {version} 3")):
        load_run(saved)


def test_refuses_weights_of_another_shape_or_name(saved):
    weights = load_file(saved / "model.safetensors")
    for tensors in ({**weights, "extra": torch.zeros(1)}, {k: v[:-1].clone() for k, v in weights.items()}, {}):
        save_file(tensors, saved / "model.safetensors")
        reseal(saved)
        with pytest.raises(RunError, match=naming("model.safetensors weights")):
            load_run(saved)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_never_unpickles(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    reseal(saved)
    with pytest.raises(RunError, match=naming("model.safetensors weights")):
        load_run(saved)
    assert not (tmp_path / "bombed").exists()


def test_what_a_run_says_names_no_place_to_write(saved, tmp_path):
    edit(saved / "run.json", lambda values: values.update(name="../../escaped"))
    run = load_run(saved)
    assert run.name == saved.name
    assert save_run(run, tmp_path / "copies").parent == tmp_path / "copies"
    assert not list(tmp_path.parent.glob("*escaped*"))
    for name in ("../../escaped", "/tmp/escaped", "here.toml", ""):
        edit(saved / "run.json", lambda values, name=name: values.update(dataset=name))
        with pytest.raises(RunError, match="dataset"):
            load_run(saved)


def match(saved, store):
    run = load_run(saved)
    return match_features(run, run.features, store)


def test_refuses_a_store_with_other_classes(saved, make_store):
    y = np.array([[1, 0], [0, 1]], np.int8)
    other = make_store({"image": np.eye(2, 6, dtype=np.float16)}, y, ["train", "val"], name="other")
    with pytest.raises(RunError, match="classes"):
        match(saved, other)


def test_refuses_a_store_without_the_encoder(saved, toy_store):
    store = toy_store()
    shutil.rmtree(store.path / "features" / "toy" / "text")
    with pytest.raises(RunError, match=naming("toy text")):
        match(saved, store)


def test_refuses_a_store_made_differently(saved, toy_store, add_features):
    store = toy_store()
    shutil.rmtree(store.path / "features" / "toy" / "text")
    add_features(store, "toy", "text", np.zeros((60, 5), np.float32))
    with pytest.raises(RunError, match=naming("toy text")):
        match(saved, store)
