import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.runs.files import find_run
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run
from cachefuse.store.store import FeatureStore
from fixtures.columns import images_of, texts_of
from fixtures.messages import says


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def photo(folder):
    """The first test row's image, as a file; and its text."""
    dataset = load_dataset(load_manifest("./mine.toml")[0], folder)
    images_of(dataset)[120].load().save(folder / "photo.png")
    return folder / "photo.png", texts_of(dataset)[120][0]


def test_writes_a_submission_from_the_latest_run(cachefuse, workspace, folder, fits):
    result = cachefuse("predict")
    assert result.code == 0
    assert says(result.err, "mine-sum-linear-asl-1 classic")
    assert "40 rows, " in result.out
    header, *rows = read("submission.csv")
    assert header == ["id", "labels"]
    assert [row[0] for row in rows] == [f"{i:05d}" for i in range(120, 160)]
    fits(result.out)


def test_as_json_with_a_split_and_an_output(cachefuse, workspace):
    result = cachefuse("predict", "--split", "val", "-o", "val.csv", "--json")
    assert json.loads(result.out) == {
        "run": "mine-sum-linear-asl-1", "rows": len(read("val.csv")) - 1, "output": "val.csv",
    }  # fmt: skip


def test_checks_against_a_sample(cachefuse, workspace, folder):
    cachefuse("predict")
    header, *rows = read("submission.csv")
    sample = folder / "sample.csv"
    sample.write_text("\n".join(",".join(row) for row in (header, *reversed(rows))) + "\n")
    result = cachefuse("predict", "--sample-submission", "sample.csv")
    assert "checked against sample.csv" in result.out
    assert read("submission.csv") == [header, *reversed(rows)]
    sample.write_text("id,labels\n00120,\n")
    Path("submission.csv").unlink()
    assert says(cachefuse("predict", "--sample-submission", "sample.csv").error, "sample.csv ids")
    assert not Path("submission.csv").exists()


def test_predicts_one_sample_as_its_stored_features(cachefuse, workspace, photo, fits):
    image, text = photo
    both = json.loads(cachefuse("predict", "--image", image, "--text", text, "--json").out)
    cachefuse("predict")
    assert set(both["labels"]) == set(read("submission.csv")[1][1].split())
    assert list(both["scores"].values()) == sorted(both["scores"].values(), reverse=True)
    alone = [json.loads(cachefuse("predict", *args, "--json").out) for args in (["--image", image], ["--text", text])]
    assert alone[0]["scores"] != alone[1]["scores"] != both["scores"]
    table = cachefuse("predict", "--image", image)
    assert "score" in table.out
    fits(table.out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "gone.png"], "gone.png"),
        (["--image", "mine.toml"], "mine.toml image"),
        (["--image", "."], ". folder"),
        (["--text", ""], "text"),
        (["--input", "gone.csv"], "gone.csv"),
        (["--input", "mine.toml"], "mine.toml .toml"),
        (["--split", "dev"], "mine dev test train val"),
        (["--run", "nope"], "nope workspace/runs mine-sum-linear-asl-1"),
        (["--output", "gone/s.csv"], "gone/s.csv folder"),
        (["--output", "workspace"], "workspace folder"),
        (["--device", "tpu"], "device tpu"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace, folder):
    result = cachefuse("predict", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert not (folder / "submission.csv").exists()


@pytest.mark.parametrize(
    "args", [["--input", "a.csv", "--text", "a"], ["--split", "val", "--text", "a"], ["--split", "val", "--input", "a"]]
)
def test_options_that_contradict_are_wrong_usage(args, cachefuse, workspace):
    assert cachefuse("predict", *args).code == 2


def test_a_run_that_reads_only_text_needs_a_text(cachefuse, workspace, photo):
    cachefuse("train-head", "--fusion", "text", "--head", "linear", "--epochs", "1")
    assert says(cachefuse("predict", "--image", photo[0]).error, "mine-text-linear-asl-1 text")
    assert cachefuse("predict", "--image", photo[0], "--run", "mine-sum-linear-asl-1").code == 0
    assert cachefuse("predict", "--image", photo[0], "--run", "workspace/runs/mine-sum-linear-asl-1").code == 0


def test_new_rows_from_a_table(cachefuse, workspace, photo, folder):
    (folder / "new.csv").write_text(f'id,image,text\n"a,1",photo.png,{photo[1]}\nb,gone.png,an oak thing\n')
    result = cachefuse("predict", "--input", "new.csv")
    assert result.code == 0
    assert says(result.err, "note 1 2 image gone.png")
    rows = read("predictions.csv")
    assert [row[0] for row in rows] == ["id", "a,1", "b"]
    assert all(row[1] for row in rows)


@pytest.mark.parametrize("default", [False, True])
def test_the_input_is_not_overwritten(default, cachefuse, workspace, folder):
    table = folder / "predictions.csv"
    table.write_text("id,text\na,an oak thing\n")
    (folder / "link.csv").symlink_to(table)
    result = cachefuse("predict", "--input", "predictions.csv", *([] if default else ["--output", "link.csv"]))
    assert (result.code, result.out) == (1, "")
    assert says(result.error, "cannot write predictions.csv input" if default else "cannot write link.csv input")
    assert table.read_text() == "id,text\na,an oak thing\n"


def test_says_that_there_are_no_runs_or_no_store(cachefuse, workspace):
    shutil.move(workspace / "cache", workspace / "elsewhere")
    assert says(cachefuse("predict").error, "workspace/cache/mine.zarr extract")
    shutil.rmtree(workspace / "runs")
    assert says(cachefuse("predict").error, "workspace/runs train-head")


def test_names_the_broken_file_of_a_run(cachefuse, workspace):
    path = workspace / "runs" / "mine-sum-linear-asl-1" / "run.json"
    path.write_text(path.read_text()[:-20])
    broken = "workspace/runs/mine-sum-linear-asl-1/run.json"
    assert says(cachefuse("predict", "--run", "mine-sum-linear-asl-1").error, broken)
    latest = cachefuse("predict")
    assert (latest.code, latest.out) == (1, "")
    assert says(latest.error, f"{broken} --run delete")


def test_one_sample_is_printed_not_written(cachefuse, workspace, folder):
    result = cachefuse("predict", "--text", "an oak thing", "--output", "x.csv")
    assert result.code == 2
    assert says(result.err, "--output")
    assert not (folder / "x.csv").exists()


def test_new_rows_that_none_of_can_be_used(cachefuse, workspace, folder):
    (folder / "new.csv").write_text("id,image,text\na,gone.png,\nb,,\n")
    assert says(cachefuse("predict", "--input", "new.csv").error, "image text")
    assert not (folder / "predictions.csv").exists()


def test_an_interrupt_writes_nothing(cachefuse, workspace, folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cachefuse.runs.predict.predict_split", stop)
    result = cachefuse("predict")
    assert result.code == 130
    assert says(result.err, "note interrupted")
    assert not (folder / "submission.csv").exists()


def test_long_class_names_and_many_classes_fit_the_terminal(fits, capsys, monkeypatch):
    from cachefuse.runs.predict import Predictions
    from cachefuse_cli.shared import render

    monkeypatch.setenv("COLUMNS", "80")
    names = tuple(f"a very long class name that goes on and on, number {c}, and on and on and on" for c in range(40))
    scores = np.linspace(0, 1, 40)[None]
    render.prediction(Predictions(["x"], names, scores, scores > 0.9), as_json=False)
    fits(capsys.readouterr().out)


def test_scores_beside_a_submission(cachefuse, workspace, folder, fits):
    result = cachefuse("predict", "--scores", "scores.csv")
    header, *rows = read("scores.csv")
    run = load_run(find_run(workspace / "runs"))
    predicted = predict_split(run, FeatureStore(workspace / "cache" / "mine.zarr"))
    assert header == ["id", *run.classes]
    assert [row[0] for row in rows] == predicted.ids == [row[0] for row in read("submission.csv")[1:]]
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], np.float32), predicted.scores)
    assert says(result.out, "submission.csv scores.csv")
    fits(result.out)
    named = json.loads(cachefuse("predict", "--scores", "scores.npz", "--json").out)
    assert (named["output"], named["scores"]) == ("submission.csv", "scores.npz")
    assert sorted(np.load("scores.npz")) == ["classes", "ids", "scores"]


def test_scores_of_new_rows_do_not_replace_them(cachefuse, workspace, photo, folder):
    (folder / "new.csv").write_text(f"id,image,text\n=a,photo.png,{photo[1]}\n")
    table = (folder / "new.csv").read_bytes()
    assert says(cachefuse("predict", "--input", "new.csv", "--scores", "new.csv").error, "new.csv input")
    assert cachefuse("predict", "--input", "new.csv", "--scores", "scores.csv").code == 0
    assert [row[0] for row in read("scores.csv")] == ["id", "=a"]
    assert (folder / "new.csv").read_bytes() == table


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scores", "scores.xlsx"], "scores.xlsx .csv .parquet .npz"),
        (["--scores", "gone/s.csv"], "gone/s.csv folder"),
        (["--scores", "submission.csv"], "submission.csv"),
        (["--scores", "./a.csv", "-o", "a.csv"], "a.csv"),
    ],
)
def test_scores_that_cannot_be_written_are_refused_before_the_run_is_read(args, message, cachefuse, folder):
    result = cachefuse("predict", *args)
    assert (result.code, says(result.error, message)) == (1, True)
    assert not (folder / "submission.csv").exists()


def test_one_sample_has_no_file_of_scores(cachefuse, workspace):
    assert cachefuse("predict", "--text", "a", "--scores", "s.csv").code == 2
