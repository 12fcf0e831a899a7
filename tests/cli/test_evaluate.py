import json
import math
import re
import shutil

import numpy as np
import pytest
import zarr

from cachefuse.runs.evaluate import Evaluation, evaluate
from cachefuse.runs.files import find_run
from cachefuse.runs.save import load_run
from cachefuse.store.columns import column_checksum
from cachefuse.store.store import FeatureStore
from fixtures.messages import says


@pytest.fixture
def figures(workspace):
    """What the library says of the workspace's run."""
    return evaluate(load_run(find_run(workspace / "runs")), FeatureStore(workspace / "cache" / "mine.zarr"))


def row(text, name):
    (line,) = [line for line in text.splitlines() if re.match(rf"{re.escape(name)}  ", line)]
    return line.removeprefix(name).split()


def test_shows_metrics_with_intervals_and_figures_by_class(cachefuse, workspace, figures, fits):
    result = cachefuse("evaluate")
    assert result.code == 0
    assert says(result.err, "mine-sum-linear-asl-1 classic image text")
    assert result.out.startswith(f"mine, val: {figures.n_rows} rows")
    low, high = figures.intervals["micro_f1"]
    assert row(result.out, "micro-F1") == [f"{figures.metrics['micro_f1']:.3f}", f"{low:.3f}", "-", f"{high:.3f}"]
    assert re.search(r"^class +rows +precision +recall +F1 +AP +R@P90", result.out, flags=re.M)
    assert row(result.out, figures.classes[0])[0] == str(int(figures.per_class["support"][0]))
    assert "gate" not in result.out
    fits(result.out)


def test_json_has_all_of_it(cachefuse, workspace, figures):
    found = json.loads(cachefuse("evaluate", "--json").out)
    assert found["metrics"] == figures.metrics
    assert {name: tuple(ends) for name, ends in found["intervals"].items()} == figures.intervals
    assert (found["run"], found["split"], found["without"]) == ("mine-sum-linear-asl-1", "val", [])
    shown = {"precision", "recall", "f1", "ap", "recall_at_p90", "support", "calibration_error"}
    assert found["per_class"].keys() == shown
    assert found["caution"] is None
    assert json.loads(cachefuse("evaluate", "--json", "--no-intervals").out)["intervals"] == {}


@pytest.mark.slow
def test_without_a_modality_both_are_shown(cachefuse, workspace, fits):
    args = "evaluate", "--run", "mine-sum-linear-asl-1", "--drop-modality", "image"
    result = cachefuse(*args)
    found = json.loads(cachefuse(*args, "--json").out)
    assert re.search(r"^metric +with everything +without image +difference$", result.out, flags=re.M)
    everything, without = found["everything"]["metrics"], found["metrics"]
    cells = row(result.out, "micro-F1")
    assert (cells[0], cells[4]) == (f"{everything['micro_f1']:.3f}", f"{without['micro_f1']:.3f}")
    assert cells[-1] == f"{found['difference']['micro_f1']:+.3f}"
    assert found["difference"]["micro_f1"] == without["micro_f1"] - everything["micro_f1"] != 0
    assert (found["without"], found["everything"]["without"]) == (["image"], [])
    assert found["everything"] == json.loads(cachefuse("evaluate", "--json").out)
    fits(result.out)
    plain = cachefuse(*args, "--no-intervals")
    assert row(plain.out, "micro-F1") == [cells[0], cells[4], cells[-1]]
    fits(plain.out)


def test_the_weights_of_gated_modalities(cachefuse, workspace, fits):
    cachefuse("train-head", "--fusion", "gated", "--head", "linear", "--epochs", "5")
    result = cachefuse("evaluate")
    found = json.loads(cachefuse("evaluate", "--json").out)
    weights = [f"{found['gates'][modality]:.3f}" for modality in ("image", "text")]
    assert row(result.out, "all rows") == weights
    assert "mean gate weights" in result.out
    fits(result.out)


def test_weights_that_can_not_be_written_are_refused_before_anything_is_measured(cachefuse, workspace, monkeypatch):
    measured = []
    monkeypatch.setattr("cachefuse.runs.evaluate.evaluate", lambda *args, **options: measured.append(args))
    plain = cachefuse("evaluate", "--gates", "gates.csv")
    assert (plain.code, says(plain.error, "gated cma")) == (1, True)
    cachefuse("train-head", "--fusion", "gated", "--head", "linear", "--epochs", "1")
    for target, named in ((".", "folder"), ("nowhere/gates.csv", "nowhere/gates.csv")):
        result = cachefuse("evaluate", "--gates", target)
        assert result.code == 1
        assert says(result.error, named)
    assert measured == []


def test_says_that_rows_were_trained_on_once(cachefuse, workspace):
    result = cachefuse("evaluate", "--split", "train", "--drop-modality", "text", "--no-intervals")
    assert result.code == 0
    (note,) = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert says(note, "mine-sum-linear-asl-1 train")
    assert "mine, train: " in result.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--split", "dev"], "mine dev train val test"),
        (["--split", "test"], "mine test train val"),
        (["--drop-modality", "audio"], "audio image text"),
        (["--drop-modality", "image", "--drop-modality", "text"], "mine-sum-linear-asl-1 image text"),
        (["--run", "nope"], "nope workspace/runs mine-sum-linear-asl-1"),
        (["--device", "tpu"], "device tpu"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace):
    result = cachefuse("evaluate", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)


def test_says_how_to_go_on_where_the_splits_have_changed(cachefuse, workspace):
    store = workspace / "cache" / "mine.zarr"
    splits = FeatureStore(store).splits.copy()
    splits[0] = "val" if splits[0] == "train" else "train"
    array = zarr.open_group(store, mode="a")["samples"]["split"]
    array[:] = splits
    array.attrs["checksum"] = column_checksum(splits)
    assert says(cachefuse("evaluate").error, "--split train val")
    result = cachefuse("evaluate", "--split", "val", "--no-intervals")
    assert result.code == 0
    assert says(result.err, "note mine-sum-linear-asl-1")


def test_says_that_there_are_no_features(cachefuse, workspace):
    shutil.rmtree(workspace / "cache")
    assert says(cachefuse("evaluate").error, "mine extract")


def test_an_interrupt_is_told(cachefuse, workspace, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cachefuse.runs.evaluate.bootstrap_intervals", stop)
    result = cachefuse("evaluate")
    assert (result.code, result.out) == (130, "")


@pytest.mark.parametrize("without", [(), ("image", "text")])
def test_many_classes_with_long_names_and_undefined_figures_fit_the_terminal(without, fits, capsys, monkeypatch):
    from cachefuse_cli.shared import eval_tables

    monkeypatch.setenv("COLUMNS", "80")
    n = 40
    figures = {name: [0.5 + c / 100 for c in range(n)] for name in ("precision", "recall", "f1", "recall_at_p90")}
    found = Evaluation(
        run="a-run-1",
        dataset="a [bold]dataset[/]",
        split="oof",
        without=(),
        n_rows=12345678,
        classes=tuple(f"a [red] very long class name that goes on and on, number {c}, and on" for c in range(n)),
        metrics={"top_calibration_error": 0.1, "weighted_f1": math.nan},
        intervals={"top_calibration_error": (0.05, 0.15), "weighted_f1": (math.nan, math.nan)},
        per_class={**figures, "ap": [math.nan] * n, "support": [123456] * n},
        gates={"image": 0.5, "text": 0.5},
        gates_per_class={"image": [math.nan] * n, "text": [0.25] * n},
        caution=None,
        **dict.fromkeys(("rows", "targets", "scores", "predictions")),
    )
    ablated = Evaluation(**{**vars(found), "without": without}) if without else None
    eval_tables.evaluation_report(found, ablated)
    out = capsys.readouterr().out
    fits(out)
    assert "a [bold]dataset[/], oof: 12,345,678 rows" in out
    assert "the 30 lowest F1 of 40" in out
    assert "number 29" in re.sub(r"\s+", " ", out)
    assert "number 30" not in re.sub(r"\s+", " ", out)


@pytest.fixture
def two_runs(workspace, run_in, capsys):
    """A workspace with a second run on the same rows, and one of folds."""
    args = "train-head", "--head", "linear", "--epochs", "3", "--json"
    run_in(workspace.parent, *args, "--fusion", "text")
    run_in(workspace.parent, *args, "--folds", "2")
    capsys.readouterr()
    return "mine-sum-linear-asl-1", "mine-text-linear-asl-1", "mine-sum-linear-asl-2"


def test_against_another_run(cachefuse, two_runs, fits, folder):
    first, other, folds = two_runs
    args = "evaluate", "--run", first, "--against", other
    result = cachefuse(*args, "--differences", "differ.csv")
    assert result.code == 0
    assert all(name in result.err for name in (first, other, "differ.csv"))
    values = json.loads(cachefuse(*args, "--json").out)
    assert (values["run"], values["against"], values["split"]) == (first, other, "val")
    assert says(result.out.splitlines()[0], f"mine val {values['n_rows']} rows")
    figure = values["metrics"]["micro_f1"]
    value = f"{figure['difference']['value']:+.4f}".replace("0.", ".")
    assert row(result.out, "micro-F1")[:3] == [f"{figure['run']:.3f}", f"{figure['against']:.3f}", value]
    assert row(result.out, "exact match (McNemar)")
    assert re.search(r"^class +run +against +difference +95% +p$", result.out, flags=re.M)
    assert re.search(r"^id +truth +run +against *$", result.out, flags=re.M)
    assert len((folder / "differ.csv").read_text().splitlines()) == values["n_differ"] + 1
    fits(result.out, keep=(first,))
    shared = cachefuse("evaluate", "--run", first, "--against", folds).out.splitlines()[0]
    assert says(shared, f"{values['n_rows']} rows both held out 120")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--differences", "x.csv"), "--differences --against"),
        (("--against", "mine-sum-linear-asl-1"), "mine-sum-linear-asl-1 itself"),
        (("--against", "nothing"), "nothing mine-sum-linear-asl-1"),
        (("--against", "mine-sum-linear-asl-1", "--drop-modality", "image"), "--drop-modality --against"),
        (("--against", "mine-sum-linear-asl-1", "--no-intervals"), "--no-intervals --against"),
        (("--against", "mine-sum-linear-asl-1", "--gates", "x.csv"), "--gates --against"),
    ],
)
def test_what_goes_with_no_comparison(args, message, cachefuse, workspace, folder):
    result = cachefuse("evaluate", *args)
    assert result.code == 1
    assert says(result.error, message)
    assert not (folder / "x.csv").exists()


def test_scores_of_the_measured_rows(cachefuse, workspace, figures):
    result = cachefuse("evaluate", "--no-intervals", "--scores", "scores.npz")
    arrays, store = np.load("scores.npz"), FeatureStore(workspace / "cache" / "mine.zarr")
    assert says(result.err, "scores.npz")
    assert arrays["ids"].tolist() == store.ids[figures.rows].tolist()
    assert tuple(arrays["classes"]) == figures.classes
    np.testing.assert_array_equal(arrays["scores"], figures.scores)
    np.testing.assert_array_equal(arrays["targets"], store.targets[figures.rows])
    cachefuse("evaluate", "--no-intervals", "--drop-modality", "image", "--scores", "without.npz")
    without = evaluate(load_run(find_run(workspace / "runs")), store, without=["image"], n_resamples=0)
    np.testing.assert_array_equal(np.load("without.npz")["scores"], without.scores)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scores", "s.txt"], "s.txt .csv .parquet .npz"),
        (["--scores", "s.csv", "--against", "mine-sum-linear-asl-1"], "--scores --against"),
    ],
)
def test_scores_that_cannot_be_written_are_refused(args, message, cachefuse, workspace):
    result = cachefuse("evaluate", *args)
    assert (result.code, says(result.error, message)) == (1, True)
