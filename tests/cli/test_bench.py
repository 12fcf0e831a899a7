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
