"""Damage to a run's files: what is read is as it was written, or an error names the file."""

import json
import os
import shutil
import signal
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.finetune import fine_tune
from cachefuse.alignment.run import Alignment, list_alignments
from cachefuse.alignment.train import align, evaluate_alignment
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import RunError
from cachefuse.extraction.extract import extract
from cachefuse.files import to_json
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.files import find_run, list_runs
from cachefuse.runs.folder import ALIGNMENT, RunFolder
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming, says
from fixtures.runs import edit, reseal, without_checksums

MANIFEST = """
name = "mine"
task = "multilabel"
reader = { kind = "shapes", train = 60, test = 20 }
splits = { val = { from = "train", fraction = 0.25 } }
"""
QUICK = TrainConfig(head="linear", epochs=2, loss="bce")
KINDS = ("head", "folds", "ensemble", "alignment", "tuned", "tuned-head")
FILES = ("run.json", "history.json", "model.safetensors", "held_out.safetensors")
FLIPS = int(os.environ.get("CACHEFUSE_FLIPS", "8"))  # of a file; each is of another part of it


class Made:
    """A store, and a run of each kind, in one folder."""

    def __init__(self, folder):
        extract(load_dataset(parse_manifest(MANIFEST, "mine.toml"), Path()), ["classic"], folder / "mine.zarr")
        self.store, runs = FeatureStore(folder / "mine.zarr"), folder / "runs"
        heads = [train_head(self.store, TrainConfig(**{**asdict(QUICK), "seed": seed})) for seed in (0, 1)]
        heads += [train_head(self.store, TrainConfig(**{**asdict(QUICK), "folds": 2}))]
        paths = [save_run(head, runs) for head in heads]
        aligned = align(self.store, AlignConfig(epochs=2, width=8, batch_size=32), device="cpu")
        aligned.save(runs)
        tuned, tuned_head = fine_tune(aligned, self.store, runs, epochs=2, device="cpu")
        self.store = FeatureStore(folder / "mine.zarr")
        self.paths = {
            "head": paths[0],
            "folds": paths[2],
            "ensemble": save_run(ensemble([load_run(path) for path in paths[:2]], self.store), runs),
            "alignment": aligned.path,
            "tuned": tuned.path,
            "tuned-head": save_run(tuned_head, runs),
        }
        self.results = {kind: self.result(kind, self.paths[kind]) for kind in KINDS}

    def result(self, kind, path):
        """What commands read from a run or compute with it, as text."""
        if kind in ("alignment", "tuned"):
            space = Alignment.load(path)
            figures = evaluate_alignment(space, self.store, device="cpu") if kind == "alignment" else space.results
            by_split = {split: asdict(result) for split, result in figures.items()}
            return to_json(
                [by_split, space.config.to_dict(), asdict(space.history), space.created, weights(space.model)]
            )
        run = load_run(path)
        metrics = evaluate(run, self.store, n_resamples=0, device="cpu").metrics
        scores = predict_split(run, self.store, "test", device="cpu").scores
        histories = [asdict(history) for history in run.histories]
        models = [weights(member.model) for member in run.members]
        kept = [run.held_out.split, run.held_out.scores.tolist(), run.thresholds.tolist()]
        return to_json([metrics, scores.tolist(), histories, models, kept, run.created, run.caution])


def weights(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def copy(made, tmp_path):
    """Return a copy of a run in a folder of its own."""

    def copy(kind, folder="runs"):
        return Path(shutil.copytree(made.paths[kind], tmp_path / folder / made.paths[kind].name))

    return copy


@pytest.fixture
def in_time():
    """End the test where something waits for ever."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def attempt(work, *args):
    """Return what comes out, or the error."""
    try:
        return work(*args)
    except RunError as error:
        return error


def places(size):
    """Return bytes of a file: the first and the last, and one in each of its parts."""
    return sorted({0, size - 1, *np.linspace(0, size - 1, FLIPS).astype(int).tolist()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_changes_nothing_or_is_named(kind, made, copy):
    path, expected = copy(kind), made.results[kind]
    assert made.result(kind, path) == expected
    named = 0
    for file in (path / name for name in FILES if (path / name).exists()):
        whole = file.read_bytes()
        for place in places(len(whole)):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << (place % 8)
            file.write_bytes(spoilt)
            found = attempt(made.result, kind, path)
            if isinstance(found, RunError):
                assert says(str(found), str(file))
                assert "\n" not in str(found)
                named += 1
            else:
                assert found == expected
        file.write_bytes(whole)
    assert named >= 3 * FLIPS - 3
    assert made.result(kind, path) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_lost_or_of_another_run_is_named(kind, name, made, copy):
    path = copy(kind)
    if not (path / name).exists():
        return
    other, whole = made.paths["head" if kind == "folds" else "folds"], (path / name).read_bytes()
    contents = [b"", whole[:-1], whole + b"\0", bytes(len(whole)), (other / name).read_bytes(), None]
    for content in contents if name != "run.json" else (b"", whole[:-1], bytes(len(whole)), None):
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        with pytest.raises(RunError, match=naming(str(path / name))):
            made.result(kind, path)
        if name != "run.json" or content is not None:
            assert [*list_runs(path.parent), *list_alignments(path.parent)] == []


def test_weights_of_another_run_of_the_same_shape_are_refused(made, copy):
    path = copy("head")
    shutil.copy(path.parent / path.name / "model.safetensors", path / "spare")
    values = bytearray((path / "model.safetensors").read_bytes())
    values[-4:] = np.float32(0.5).tobytes()
    (path / "model.safetensors").write_bytes(values)
    with pytest.raises(RunError, match=naming("model.safetensors damaged")):
        load_run(path)
    shutil.move(path / "spare", path / "model.safetensors")
    assert made.result("head", path) == made.results["head"]


def test_a_file_that_was_added_is_refused_if_it_would_be_read(made, copy):
    path = copy("head")
    edit(path / "run.json", lambda values: values["files"].pop("held_out.safetensors"))
    with pytest.raises(RunError, match=naming("held_out.safetensors")):
        load_run(path)
    assert list_runs(path.parent) == []
    (path / "held_out.safetensors").unlink()
    (path / "notes.txt").write_text("mine")
    (path / "README.md").write_text("Edited.")
    assert load_run(path).held_out is None


@pytest.mark.parametrize("kind", ["head", "alignment"])
@pytest.mark.parametrize("special", ["pipe", "device", "socket", "folder", "loop", "large"])
@pytest.mark.parametrize("name", FILES)
def test_special_files_are_named_at_once(kind, special, name, copy, in_time, monkeypatch):
    path = copy(kind)
    if not (path / name).exists():
        return
    (path / name).unlink()
    monkeypatch.chdir(path)
    if special == "pipe":
        os.mkfifo(name)
    elif special == "device":
        Path(name).symlink_to("/dev/zero")
    elif special == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif special == "folder":
        Path(name).mkdir()
    elif special == "loop":
        Path(name).symlink_to(name)
    else:
        with open(name, "wb") as file:
            file.truncate(1 << 33)
    load = load_run if kind == "head" else Alignment.load
    with pytest.raises(RunError, match=naming(name)):
        load(path)
    if special != "large":
        assert list_runs(path.parent) == list_alignments(path.parent) == []
    for asked in (None, path.name):
        if name == "run.json":
            with pytest.raises(RunError, match=naming(name)):
                find_run(path.parent, asked, kind)


@pytest.mark.parametrize("other", ["alignment", "head", "tuned"])
def test_the_description_of_another_run_hides_no_run(made, copy, other):
    """It may be of another kind, or older, and so another run would be the latest."""
    latest, older = copy("ensemble"), copy("head")
    assert find_run(latest.parent) == latest
    shutil.copyfile(made.paths[other] / "run.json", latest / "run.json")
    with pytest.raises(RunError, match=naming(f"{latest.name} history.json --run")):
        find_run(latest.parent)
    assert [run.name for run in list_runs(latest.parent)] == [older.name]


class TestTheLatest:
    @pytest.fixture
    def runs(self, copy):
        """Three runs of both kinds; the alignment is older than a head and newer than another."""
        for kind in ("head", "alignment", "ensemble"):
            copy(kind)
        return copy("folds").parent

    def test_is_by_kind(self, runs, made):
        assert find_run(runs).name == made.paths["ensemble"].name
        assert find_run(runs, kind=ALIGNMENT).name == made.paths["alignment"].name

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("change", ["cut", "lost", "flipped"])
    def test_is_never_an_older_one_instead_of_a_damaged_one(self, name, change, runs, made):
        file = runs / made.paths["ensemble"].name / name
        whole = bytearray(file.read_bytes())
        if change == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        elif change == "lost":
            file.unlink()
        else:
            whole[len(whole) // 2] ^= 1
            file.write_bytes(whole)
        with pytest.raises(RunError, match=naming(name)):
            load_run(find_run(runs))
        kept = runs / made.paths["folds"].name
        assert load_run(find_run(runs, kept.name)).name == kept.name
        shutil.rmtree(file.parent)
        assert find_run(runs) == kept

    @pytest.mark.parametrize("kind", [None, "head", ALIGNMENT])
    def test_is_unknown_if_a_run_of_an_unknown_kind_is_damaged(self, kind, runs, made):
        file = runs / made.paths["alignment"].name / "run.json"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(RunError, match=naming("run.json --run delete")) as error:
            find_run(runs, kind=kind)
        assert str(file.parent) in str(error.value)

    def test_is_unknown_if_a_folder_can_not_be_read(self, runs):
        (runs / "gone").symlink_to("nowhere")
        with pytest.raises(RunError, match=naming("gone --run")):
            find_run(runs)

    def test_is_no_folder_that_is_no_run(self, runs, made):
        (runs / "notes").mkdir()
        (runs / "notes" / "README.md").write_text("mine")
        (runs / ".new-abc" / "run").mkdir(parents=True)
        (runs / "file").write_text("mine")
        assert find_run(runs).name == made.paths["ensemble"].name

    def test_of_another_version_is_an_error(self, runs, made):
        path = runs / made.paths["ensemble"].name
        edit(path / "run.json", format=99)
        with pytest.raises(RunError, match=naming("format 99")):
            load_run(find_run(runs))

    def test_is_the_one_that_was_made_last_though_the_clock_was_set_back(self, runs, made, caplog):
        later = runs / made.paths["folds"].name
        edit(later / "run.json", created="2999-01-01T00:00:00.000+00:00")
        assert find_run(runs) == later
        paths = [save_run(load_run(later), runs) for _ in range(2)]
        assert find_run(runs) == paths[-1]
        assert [run.path for run in list_runs(runs)][:3] == [paths[1], paths[0], later]
        assert says(caplog.text, f"{later.name} 2999 clock")

    def test_is_known_of_runs_that_were_made_in_the_same_moment(self, runs):
        run = load_run(find_run(runs))
        for _ in range(5):
            path = save_run(run, runs)
            assert find_run(runs) == path


def test_a_run_of_before_there_were_checksums_opens_and_says_so_once(made, copy, caplog):
    path = copy("head")
    whole = made.result("head", path)
    assert caplog.text == ""
    without_checksums(path)
    assert made.result("head", path) == whole
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert says(caplog.text, "checksums")
    assert [run.name for run in list_runs(path.parent)] == [path.name]
    again = save_run(load_run(path), path.parent)
    assert RunFolder.open(again).files is not None


@pytest.mark.parametrize("name", ["a\0/b", "a\0b", "x" * 5000, "model.safetensors/x", "..", "~", "\n"])
def test_a_name_of_nothing_is_one_error(name, copy):
    path = copy("head")
    with pytest.raises((RunError, OSError), match=r"\S"):
        find_run(path, name)


def test_checksums_are_of_the_files_that_are_read(made):
    import hashlib

    for path in made.paths.values():
        values = json.loads((path / "run.json").read_text())
        there = {file.name for file in path.iterdir()} - {"run.json", "README.md"}
        assert values["files"].keys() == there
        for name, described in values["files"].items():
            data = (path / name).read_bytes()
            assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_undefined_figures_and_odd_names_keep_their_checksum(made, copy, tmp_path):
    run = load_run(copy("head"))
    run.results["val"].metrics["micro_f1"] = float("nan")
    run.thresholds[:] = np.nextafter(0.1, 1)
    run.sources = ("\x1b[31m", "ü\u2028", "a\0b")
    path = save_run(run, tmp_path / "odd")
    again = load_run(path)
    assert np.isnan(again.results["val"].metrics["micro_f1"])
    np.testing.assert_array_equal(again.thresholds, run.thresholds)
    reseal(path)
    assert load_run(path).thresholds.tolist() == run.thresholds.tolist()
