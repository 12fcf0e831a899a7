"""Texts over the limit are bad samples in every reader; nothing takes much memory or time."""

import io
import json
import random
import subprocess
import sys
from dataclasses import replace

import h5py
import pyarrow as pa
import pyarrow.parquet
import pytest

from cachefuse.data.column import TooLong
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers import csv_text
from cachefuse.data.readers.coco_captions import CocoCaptionsReader
from cachefuse.data.readers.flickr8k import Flickr8kReader
from cachefuse.data.readers.json_stream import JsonStream
from cachefuse.data.readers.mmimdb import MmImdbReader
from cachefuse.data.readers.sentence_pairs import SentencePairsReader
from cachefuse.data.readers.table import read_columns
from cachefuse.data.readers.vqa2 import Vqa2Reader
from cachefuse.encoders import open_encoder
from cachefuse.errors import DataError
from cachefuse.extraction.pipeline import is_bad, prepare_source
from cachefuse.limits import limited, limits
from fixtures.messages import naming

MOST = 1 << 10
LONG = "é" * 700  # 1,400 bytes
LONG_SIZE = TooLong(1400)


@pytest.fixture(autouse=True)
def small_limit():
    with limited(replace(limits(), text_bytes=MOST)):
        yield


def write_csv(path, rows):
    path.with_suffix(".csv").write_text("id,text,label\n" + "".join(f'{i},"{t}",{x}\n' for i, t, x in rows), "utf-8")
    return path.with_suffix(".csv")


def write_odd_csv(path, rows):
    """Quotes within fields, which are not those of the standard."""
    lines = "".join(f'{i},"{t}",{x}\n' for i, t, x in [*rows, ("odd", 'a "b" c', "p")])
    path.with_suffix(".csv").write_text("id,text,label\n" + lines, "utf-8")
    return path.with_suffix(".csv")


def write_tsv(path, rows):
    lines = "".join(f"{i}\t{t}\t{x}\n" for i, t, x in rows)
    path.with_suffix(".tsv").write_text("id\ttext\tlabel\n" + lines, "utf-8")
    return path.with_suffix(".tsv")


def write_jsonl(path, rows):
    lines = (json.dumps({"id": i, "text": t, "label": x}) for i, t, x in rows)
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    return path.with_suffix(".jsonl")


def write_parquet(path, rows):
    columns = dict(zip(("id", "text", "label"), map(list, zip(*rows, strict=True)), strict=True))
    pa.parquet.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=2)
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("write", [write_csv, write_odd_csv, write_tsv, write_jsonl, write_parquet])
def test_the_row_of_a_long_text_is_kept(tmp_path, write):
    rows = [("a", "fine", "p"), ("b", LONG, "q"), ("c", "x" * MOST, "p"), ("d", "y" * (MOST + 1), "q")]
    path = write(tmp_path / "t", rows)
    manifest = f"""
        name = "t"
        task = "multiclass"
        [reader]
        kind = "table"
        files = {{ train = "{path.name}" }}
        id = "id"
        text = "text"
        labels = "label"
    """
    dataset = load_dataset(parse_manifest(manifest, "t.toml"), tmp_path)
    assert dataset.ids[:4] == ["a", "b", "c", "d"]
    texts = [dataset.sources("text", row) for row in range(4)]
    assert texts == [("fine",), (LONG_SIZE,), ("x" * MOST,), (TooLong(MOST + 1),)]
    assert len(set(dataset.digests())) == len(dataset)
    with limited(replace(limits(), text_bytes=2 * MOST)):
        assert load_dataset(parse_manifest(manifest, "t.toml"), tmp_path).sources("text", 1) == (LONG,)


@pytest.mark.parametrize("write", [write_csv, write_odd_csv, write_tsv, write_jsonl, write_parquet])
@pytest.mark.parametrize("column", [0, 2])
def test_a_long_id_or_label_is_an_error(tmp_path, write, column):
    row = ["b", "fine", "q"]
    row[column] = 10 * LONG
    path = write(tmp_path / "t", [("a", "fine", "p"), tuple(row)])
    manifest = f"""
        name = "t"
        task = "multiclass"
        reader = {{ kind = "table", files = {{ train = "{path.name}" }}, id = "id", text = "text", labels = "label" }}
    """
    with pytest.raises(DataError) as caught:
        load_dataset(parse_manifest(manifest, "t.toml"), tmp_path)
    assert len(str(caught.value)) < 500


def test_any_csv_reads_the_same_with_long_fields(monkeypatch):
    """The reader of long fields follows the rules of the standard library's."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(["a", "é", ",", '"', '"', '""', '","', "\n", "\r", "\r\n", " "]) for _ in range(12))
        results = []
        for read in (csv_text._read_fast, csv_text._read_standard):
            try:
                results.append(list(read(io.BytesIO(text.encode()), ",", "a.csv")))
            except csv_text._NotStandardError:
                results.append(None)
        assert results[0] == results[1], repr(text)


def random_json(rng, depth=0):
    if depth < 3 and rng.random() < 0.6:
        values = [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if rng.random() < 0.5 else {f"k{i}": value for i, value in enumerate(values)}
    return rng.choice([0, -12.5, 10**12, True, None, 'a"\\', "é\u2028", "\ud83d\ude00", ""])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_json_in_pieces_is_that_of_the_whole(size):
    rng = random.Random(1)
    for _ in range(100):
        values = [random_json(rng) for _ in range(3)]
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        stream = JsonStream(iter([text[i : i + size] for i in range(0, len(text), size)]))
        assert list(stream.items()) == json.loads(text)
        stream.end()


def test_long_strings_in_json_are_cut(monkeypatch):
    monkeypatch.setattr("cachefuse.data.readers.json_stream.MOST_VALUE", 100)
    long = '\\"' * 10_000
    text = json.dumps([{"id": 1, "text": "x" * 50_000}, {"id": 2, "text": "\\" * 30_000}, {"id": 3, "text": "short"}])
    stream = JsonStream(iter([text[i : i + 999] for i in range(0, len(text), 999)]))
    assert list(stream.items()) == [
        {"id": 1, "text": TooLong(50_000)},
        {"id": 2, "text": TooLong(60_000)},
        {"id": 3, "text": "short"},
    ]
    stream = JsonStream(iter([f'["{long}", [', "0," * 20_000]))
    with pytest.raises(ValueError, match="characters"):
        list(stream.items())


BIG = 60_000_000
BOMBS = {
    "quoted.csv": lambda file: file.write(b'id,text\na,"' + b"y" * BIG + b'"\nb,z\n'),
    "endless.csv": lambda file: file.write(b'id,text\na,"' + b"y\n" * (BIG // 2)),
    "emoji.csv": lambda file: file.write(b"id,text\na," + "😀".encode() * (BIG // 4) + b"\nb,z\n"),
    "wide.csv": lambda file: file.write(b",".join(b"%d" % i for i in range(100_000)) + b"\n" + b"," * 99_999 + b"\n"),
    "quotes.csv": lambda file: file.write(b"a,b\n" + b'"x\n' * 200_000 + b'1,"q "x""\n'),
    "keys.jsonl": lambda file: file.writelines(b'{"id": "%d", "k%d": 1}\n' % (i, i) for i in range(50_000)),
    "long.jsonl": lambda file: file.write(b'{"id": "a", "text": "' + b"y" * BIG + b'"}\n{"id": "b", "text": "z"}\n'),
    "lists.jsonl": lambda file: file.write(b'{"id": ' + b"[" * 1_000_000),
    "empties.jsonl": lambda file: file.write(b'{"id": [' + b"[]," * (BIG // 3) + b"1]}\n"),
}


SLOW = ("endless.csv", "emoji.csv", "long.jsonl", "lists.jsonl", "empties.jsonl")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BOMBS])
def test_hostile_tables_take_little_memory_and_time(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        BOMBS[name](file)
    check_in_process(tmp_path / name)


@pytest.mark.slow
def test_a_text_of_200_mb_in_a_small_parquet_file(tmp_path):
    table = pa.table({"id": ["a", "b", "c"], "text": ["x", "y" * 200_000_000, "z"]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    del table
    check_in_process(tmp_path / "a.parquet")


def check_in_process(path):
    """Read a table in a process of its own, whose memory is limited, and whose time is too."""
    code = f"""
import resource
from pathlib import Path
import pyarrow.parquet
from cachefuse.data.readers.table import read_columns
from cachefuse.encoders import open_encoder
from cachefuse.errors import DataError
from cachefuse.extraction.pipeline import is_bad, prepare_source
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    columns = read_columns(Path({str(path)!r}), wanted=("id", "text"))
    assert columns.n_rows < 60_000
except DataError as error:
    assert len(str(error)) < 500
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 1_000_000_000


@pytest.mark.slow
def test_a_parquet_bomb_is_refused(tmp_path):
    text = "x" * MOST
    table = pa.table({"text": pa.array([text] * 1_000_000).dictionary_encode()})
    pa.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    with pytest.raises(DataError, match=naming("a.parquet 64")):
        read_columns(tmp_path / "a.parquet")


def test_long_hdf5_strings(tmp_path):
    from cachefuse.data.readers.hdf5_file import read_strings, read_texts

    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("t", data=["a", LONG, "b"])
        assert read_texts(data, "utf-8") == ["a", LONG_SIZE, "b"]
        with pytest.raises(DataError, match=naming("a.h5 t 1")):
            read_strings(data, "utf-8")


def test_long_sentences_of_pairs(tmp_path):
    (tmp_path / "a.tsv").write_text(
        f"sentence1\tsentence2\tscore\nx\t{LONG}\t1\n{LONG * 2000}\ty\t2\nx\ty\t3\n", "utf-8"
    )
    pairs = SentencePairsReader(files={"train": "a.tsv"}).read(tmp_path).modalities["text"].sources
    assert list(pairs) == [("x", LONG_SIZE), (TooLong(2000 * 1400), "y"), ("x", "y")]


def test_long_captions_of_flickr8k(tmp_path):
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images/a.jpg").touch()
    (tmp_path / "captions.txt").write_text(f"image,caption\na.jpg,x, y\na.jpg,{LONG}\na.jpg,{LONG * 2000}\n", "utf-8")
    texts = Flickr8kReader().read(tmp_path).modalities["text"][0]
    assert texts == ("x, y", LONG_SIZE, TooLong(2000 * 1400))


def test_long_captions_of_coco(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    captions = [{"image_id": 1, "caption": text} for text in ("fine", LONG, "x" * 100_000)]
    content = {"info": {"a": []}, "annotations": captions, "images": [{"id": 1, "file_name": "a.jpg"}]}
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(content))
    assert CocoCaptionsReader().read(tmp_path).modalities["text"][0] == ("fine", LONG_SIZE, TooLong(100_000))


def test_long_questions_of_vqa(tmp_path):
    (tmp_path / "test2015").mkdir()
    questions = [{"question_id": i, "image_id": 1, "question": text} for i, text in enumerate(("fine", LONG))]
    path = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    path.write_text(json.dumps({"questions": questions}))
    assert list(Vqa2Reader().read(tmp_path).modalities["text"].sources) == [("fine",), (LONG_SIZE,)]


def test_long_plots_of_mmimdb(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "split.json").write_text('{"train": ["1", "2"]}')
    for film, plot in (("1", "fine"), ("2", LONG)):
        content = json.dumps({"genres": ["Drama"], "plot": [plot, "short"]})
        (tmp_path / f"dataset/{film}.json").write_text(content)
    assert list(MmImdbReader().read(tmp_path).modalities["text"].sources) == [("short",), (LONG_SIZE,)]


def test_any_text_over_the_limit_is_a_bad_sample():
    """Also one that comes from Python, or from the command line."""
    tower = open_encoder("classic", "cpu")["text"]
    assert not is_bad(prepare_source(tower, "fine"))
    assert is_bad(prepare_source(tower, LONG))
    assert "1,400" in str(prepare_source(tower, LONG))
