import json

import pytest

from cachefuse.bench import store, train
from cachefuse.bench.base import Sizes
from cachefuse.bench.timing import BenchRow
from cachefuse_cli.shared.bench_tables import bench_report
from fixtures.messages import says

TINY = Sizes(
    pairs=1, gather_pairs=1, disk_pairs=1, width=16,
    rows=5000, open_rows=5000, images=40, image_layers=1, texts=3, text_layers=1
)  # fmt: skip
NAMES = ["gather", "gather_zarr", "read_all", "write", "open", "extract", "text"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(store, "Sizes", lambda: TINY)


@pytest.mark.slow
def test_measures_the_store(cachefuse, tiny, folder, one_process):
    result = cachefuse("bench", "store", "--device", "cpu", "--json")
    assert (result.code, result.err) == (0, "")  # whether or not such small sizes meet the goals
    found = json.loads(result.out)
    assert list(found) == ["machine", "rows"]
    assert [row["name"] for row in found["rows"]] == NAMES
    assert list(found["rows"][0]) == [
        "name", "what", "unit", "ours", "baseline", "ratio", "goal", "at_most", "note", "met"
    ]  # fmt: skip
    assert not (folder / "workspace").exists()


def test_measures_training(cachefuse, monkeypatch, folder):
    tiny = train.TrainSizes(pairs=1, epochs=1, rows=5000, width=16, batch=512, small=(8,), large=(16, 8), heads=2)
    monkeypatch.setattr(train, "TrainSizes", lambda: tiny)
    result = cachefuse("bench", "train", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    assert "64 linear heads" not in result.out
    assert "linear head / a DataLoader loop" in result.out
    assert not (folder / "workspace").exists()


def test_measures_quality(cachefuse, workspace, fits):
    args = ("bench", "quality", "--folds", "2", "--only", "knn", "--only", "tfidf+lr")
    result = cachefuse(*args)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].strip() == "mine: 120 rows, 11 classes, out of fold (2 folds)"
    heads = ["classifier", "thresholds", "micro-F1", "macro-F1", "samples-F1", "macro-AP", "seconds"]
    assert lines[1].split() == heads
    assert [line[:10].strip() for line in lines[2:]] == ["knn", "tfidf+lr"]
    fits(result.out)
    both = cachefuse(*args, "--dataset", "mine", "--dataset", "./mine.toml", "--json")
    one, other = json.loads(both.out)["datasets"]
    assert list(one) == ["dataset", "n_rows", "n_classes", "folds", "metrics", "rows", "left_out"]
    assert [row["metrics"] for row in one["rows"]] == [row["metrics"] for row in other["rows"]]
    figures = [[row["metrics"][name] for row in one["rows"]] for name in one["metrics"]]
    for i, line in enumerate(lines[2:]):
        shown = [f"{values[i]:.3f}{'*' * (values[i] == max(values))}" for values in figures]
        assert line.split()[-5:-1] == shown


def test_quality_without_the_raw_data(cachefuse, folder):
    (folder / "notes.csv").write_text("id,text,labels\n" + "".join(f"{i},note {i % 2},{i % 2}\n" for i in range(40)))
    (folder / "notes.toml").write_text(
        'name = "notes"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = { train = "notes.csv" }\n'
        'id = "id"\ntext = "text"\nlabels = "labels"\n'
    )
    assert cachefuse("extract", "--dataset", "./notes.toml", "--encoder", "classic").code == 0
    (folder / "notes.csv").rename(folder / "elsewhere.csv")
    result = cachefuse("bench", "quality", "--folds", "2", "--only", "knn", "--only", "tfidf+lr")
    assert result.code == 0
    assert "knn" in result.out
    assert "tfidf" not in result.out
    assert says(result.err, "notes tfidf+lr raw data --data-dir notes.csv")
    refused = cachefuse("bench", "quality", "--dataset", "notes", "--dataset", "notes", "--data-dir", ".")
    assert refused.code == 1
    assert says(refused.error, "--data-dir --dataset")


@pytest.fixture
def notes(folder):
    """Write a folder with a manifest and 40 texts in two classes."""

    def write(name, manifest="data.toml"):
        (folder / name).mkdir()
        rows = "".join(f"{i},note {'ab'[i % 2]} {i},{i % 2}\n" for i in range(40))
        (folder / name / "notes.csv").write_text("id,text,labels\n" + rows)
        (folder / name / manifest).write_text(
            f'name = "{name}"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = {{ train = "notes.csv" }}\n'
            'id = "id"\ntext = "text"\nlabels = "labels"\n'
        )
        return folder / name

    return write


def test_quality_of_folders_extracts_what_is_missing(cachefuse, folder, notes, fits):
    one, two = notes("one"), notes("two", "mine.toml")
    args = ("bench", "quality", "--folds", "2", "--only", "knn", "--only", "tfidf+lr")
    result = cachefuse(*args, "--data", one, "--data", two / "mine.toml", "--encoder", "classic")
    assert result.code == 0
    assert [line.split(":")[0].strip() for line in result.out.splitlines() if "out of fold" in line] == ["one", "two"]
    assert "left out" not in result.err
    assert says(result.err, "added n-grams 40 texts")
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "workspace").rglob("*") if path.is_file()}
    again = cachefuse(*args, "--data", one, "--encoder", "classic", "--json")
    stored = cachefuse(*args, "--dataset", "one", "--data-dir", one, "--json")
    all_of_it = cachefuse(*args, "--data", one, "--json")
    assert "added" not in again.err
    assert {path: path.stat().st_mtime_ns for path in (folder / "workspace").rglob("*") if path.is_file()} == stamps
    figures = [[row["metrics"] for row in json.loads(x.out)["datasets"][0]["rows"]] for x in (again, stored, all_of_it)]
    assert figures[0] == figures[1] == figures[2]


def test_quality_extracts_again_what_has_changed_its_rows(cachefuse, notes):
    one = notes("one")
    args = ("bench", "quality", "--folds", "2", "--only", "knn", "--json", "--encoder", "classic", "--data", one)
    assert json.loads(cachefuse(*args).out)["datasets"][0]["n_rows"] == 40
    with open(one / "notes.csv", "a") as file:
        file.write("40,one more,0\n41,another,1\n")
    assert json.loads(cachefuse(*args).out)["datasets"][0]["n_rows"] == 42


def test_a_bad_dataset_keeps_the_results_of_others(cachefuse, folder, notes):
    one, bad, last = notes("one"), notes("bad"), notes("last")
    (bad / "notes.csv").unlink()
    args = ("bench", "quality", "--folds", "2", "--only", "knn", "--encoder", "classic", "--json")
    result = cachefuse(*args, "--data", one, "--data", bad, "--data", last)
    assert result.code == 1
    assert says(result.error, "raw data bad notes.csv")
    assert [quality["dataset"] for quality in json.loads(result.out)["datasets"]] == ["one", "last"]


def test_a_folder_must_have_one_manifest(cachefuse, folder, notes):
    one = notes("one")
    (folder / "empty").mkdir()
    refused = cachefuse("bench", "quality", "--data", folder / "empty")
    assert (refused.code, refused.out) == (1, "")
    assert says(refused.error, "empty manifest *.toml")
    (one / "other.toml").write_text("")
    assert says(cachefuse("bench", "quality", "--data", one).error, "data.toml other.toml")
    assert says(cachefuse("bench", "quality", "--data", folder / "none").error, "none manifest file")
    assert says(cachefuse("bench", "quality", "--data", "empty", "--dataset", "x").error, "--data --dataset")
    assert not (folder / "workspace").exists()


def test_an_interrupted_measurement_leaves_nothing(cachefuse, tiny, folder, monkeypatch):
    def interrupt(bench):
        assert bench.features.n_rows
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "MEASUREMENTS", {"waiting": interrupt})
    result = cachefuse("bench", "store", "--device", "cpu")
    assert result.code == 130
    assert says(result.err, "interrupted")
    assert not (folder / "workspace").exists()


def test_the_table_fits(folder, capsys, fits):
    rows = [
        BenchRow("gather", "random rows / raw memory map", "MB/s", 17_300.0, 17_500.0, 0.99, goal=0.8),
        BenchRow("gather_zarr", "random rows / zarr-python", "MB/s", 17_300.0, 16.2, 208.75, goal=100),
        BenchRow("read_all", "all rows / a copy of a raw map", "MB/s", 2_789.8, 3_005.1, 0.93, note="7,000 MB/s first"),
        BenchRow("open", "open 1,000,000 rows, first batch", "s", 0.354, goal=0.5, at_most=True),
        BenchRow("extract", "extract ViT-B-32 / its forward", "images/s", 18.36, 25.9, 0.71, goal=0.92),
        BenchRow("memory_train", "train on 4,000,000 rows / a quarter", "GB", 0.81, 0.4, 2.0, goal=1.5, at_most=True),
        BenchRow("memory_extract", "extract 100,000 rows / a quarter", "GB", None, goal=1.5, at_most=True, note="why"),
    ]
    machine = {"cpu": "Intel(R) Xeon(R) Platinum 8480C Processor", "cores": 2, "torch": "2.9.1+cpu", "device": "cpu"}
    bench_report(machine, rows)
    text = capsys.readouterr().out
    fits(text)
    assert (text.count("✓"), text.count("✗")) == (4, 1)
    assert "18.4 images/s" in text
    assert "≤ 0.5 s" in text
    assert "2 cores; torch 2.9.1+cpu" in text


def test_help_fits(cachefuse, fits):
    for command in ((), ("store",), ("train",), ("quality",)):
        result = cachefuse("bench", *command, "--help")
        assert result.code == 0
        fits(result.out)
