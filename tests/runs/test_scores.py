import csv
import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest

from cachefuse.errors import ConfigError, DataError
from cachefuse.runs import scores as module
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.scores import check_scores_file, write_scores
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming

IDS = ["=1+1", "a,b", 'say "hi"', "line\nbreak", "naïve", "007", "-5"]
CLASSES = ("+cat", "id", "color=red")
SUFFIXES = (".csv", ".parquet", ".npz")


@pytest.fixture
def scores():
    made = np.random.default_rng(0).random((len(IDS), len(CLASSES))).astype(np.float32)
    made[0] = 0, 1, 1e-30
    return made


def read(path):
    """Return a file's names of columns, ids and scores."""
    if path.suffix == ".npz":
        arrays = np.load(path, allow_pickle=False)
        return ["ids", *arrays["classes"]], arrays["ids"].tolist(), arrays["scores"]
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        ids, *columns = table.columns
        return table.column_names, ids.to_pylist(), np.stack([column.to_numpy() for column in columns], axis=1)
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return (
        header,
        [row[0] for row in rows],
        np.array([row[1:] for row in rows], np.float32).reshape(len(rows), len(header) - 1),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("at_once", [1, 6, 1 << 20])
def test_each_format_gives_back_names_and_scores_as_they_are(suffix, at_once, scores, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CSV_AT_ONCE", at_once)
    monkeypatch.setattr(module, "PARQUET_AT_ONCE", at_once)
    path = tmp_path / f"s{suffix.upper() if at_once == 1 else suffix}"
    write_scores(IDS, CLASSES, scores, path)
    path = path.rename(tmp_path / f"s{suffix}")
    header, ids, read_scores = read(path)
    assert header == ["ids" if suffix == ".npz" else "_id", *CLASSES]
    assert ids == IDS
    assert read_scores.dtype == np.float32
    np.testing.assert_array_equal(read_scores, scores)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_rows_and_the_same_bytes_twice(suffix, scores, tmp_path):
    first, second, empty = (tmp_path / f"{name}{suffix}" for name in "abc")
    write_scores(IDS, CLASSES, scores, first)
    write_scores(np.array(IDS), CLASSES, scores.astype(np.float64), second)
    assert first.read_bytes() == second.read_bytes()
    write_scores([], CLASSES, scores[:0], empty)
    assert [len(found) for found in read(empty)[1:]] == [0, 0]


def test_a_short_csv(tmp_path):
    write_scores(["a"], ("x", "y"), np.array([[0.1, 1 / 3]], np.float32), tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "id,x,y\na,0.1,0.33333334\n"


@pytest.mark.parametrize(
    ("name", "message"), [("s.json", "s.json .csv .parquet .npz"), ("s", "s .csv"), ("no/s.csv", "no")]
)
def test_what_cannot_be_written_is_refused(name, message, scores, tmp_path):
    with pytest.raises(ConfigError, match=naming(message)):
        check_scores_file(tmp_path / name)
    with pytest.raises(ConfigError, match=naming(message)):
        write_scores(IDS, CLASSES, scores, tmp_path / name)


def test_an_input_is_no_output(tmp_path):
    (tmp_path / "s.csv").touch()
    with pytest.raises(ConfigError, match="input"):
        check_scores_file(tmp_path / "s.csv", None, tmp_path / "s.csv")


def test_half_a_surrogate_pair_is_named_and_nothing_is_written(tmp_path):
    name, scores = "a\ud800", np.zeros((1, 1), np.float32)
    for names in (([name], ["x"]), (["x"], [name])):
        with pytest.raises(DataError, match=r"a\\ud800.*csv"):
            write_scores(*names, scores, tmp_path / "s.parquet")
    assert list(tmp_path.iterdir()) == []
    write_scores([name], ["x"], scores, tmp_path / "s.npz")
    assert read(tmp_path / "s.npz")[1] == [name]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_memory_does_not_grow_with_the_rows(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CSV_AT_ONCE", 1 << 12)
    monkeypatch.setattr(module, "PARQUET_AT_ONCE", 1 << 12)

    def peak(n):
        ids, scores = np.arange(n).astype("U7"), np.full((n, 8), 0.123456, np.float32)
        tracemalloc.start()
        write_scores(ids, [f"c{c}" for c in range(8)], scores, tmp_path / f"s{suffix}")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # imports
    assert peak(40_000) < 3 * peak(4_000)


def test_targets_of_an_evaluation_say_what_is_unknown(toy_store, tmp_path):
    store = toy_store()
    found = evaluate(train_head(store, TrainConfig(head="linear", epochs=2)), store, n_resamples=0)
    write_scores(store.ids[found.rows], found.classes, found.scores, tmp_path / "s.npz", found.known_targets)
    arrays = np.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(arrays["targets"], store.targets[found.rows])
    assert (arrays["scores"].shape, arrays["targets"].dtype) == ((12, 3), np.int8)
