"""Hostile raw data: tables, JSON, batches of CIFAR and HDF5 files, with texts that hurt and bytes that were changed."""

import csv
import io
import json
import random
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from adversarial.images import MUTATIONS

TABLE = """
name = "{name}"
task = "multilabel"
min_labels = 0
[reader]
kind = "table"
files = {{ train = "train.{suffix}" }}
id = "id"
text = "text"
labels = "labels"
separator = " "
"""
HDF5 = """
name = "{name}"
task = "multiclass"
[reader]
kind = "hdf5"
files = {{ train = "train.h5" }}
image = "pixels"
text = "caption"
labels = "label"
"""


def hostile_text(rng) -> str:
    """Return a text that is hard to read, to tokenize or to show."""
    kinds = (
        lambda: "",
        lambda: " \t\n",
        lambda: "a red circle",
        lambda: "word " * rng.choice((1, 100, 300_000)),
        lambda: "x" * rng.choice((10, 1000, 2_000_000)),
        lambda: "\0" * rng.choice((1, 1000)),
        lambda: "a\0b",
        lambda: "\ud800 lone",
        lambda: "\udfff" * 9,
        lambda: "\u202eright to left\u2066",
        lambda: "e" + "\u0301" * rng.choice((5, 100_000)),
        lambda: "\x1b[31mred\x1b]0;title\x07",
        lambda: "\x9b31m",
        lambda: "\ufeff\u200b\u2060",
        lambda: "\U0010ffff\ufffe",
        lambda: "=cmd|' /C calc'!A0",
        lambda: "[bold]x[/] {0} %s",
        lambda: '"',
        lambda: "\r",
        lambda: "\u2028\u2029\x85",
        lambda: "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.choice((5, 5000)))),
        lambda: "\U0001f468\u200d" * 500,
        lambda: "https://" + "a/" * 5000,
        lambda: "\u0e01\u0e33" * 2000,
        lambda: "1" * 5000,
        lambda: "-inf nan 1e999",
    )
    return rng.choice(kinds)()


def rows_of(rng):
    n = rng.choice((0, 1, 5, 40))
    return [(str(i), hostile_text(rng), rng.choice(("a b", "a", "", "\x1b[1mb", "=a"))) for i in range(n)]


def write_csv(folder, rng):
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)))
    writer.writerow(["id", "text", "labels"])
    writer.writerows(rows_of(rng))
    if rng.random() < 0.05:
        buffer = io.StringIO(",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join("1" * 100_000) + "\n")
    return "train.csv", buffer.getvalue().encode("utf-8", "surrogatepass"), TABLE.format(name="hostile", suffix="csv")


def write_jsonl(folder, rng):
    lines = [
        json.dumps({"id": i, "text": text, "labels": labels}, ensure_ascii=rng.random() < 0.5)
        for i, text, labels in rows_of(rng)
    ]
    odd = (
        "[]",
        "null",
        "7",
        '{"id": NaN}',
        "{",
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + "}",
        '{"id": {"a": [1]}}',
        '{"id": "x", "id": "y"}',
    )
    if rng.random() < 0.2:
        lines.append(rng.choice(odd))
    return (
        "train.jsonl",
        "\n".join(lines).encode("utf-8", "surrogatepass"),
        TABLE.format(name="hostile", suffix="jsonl"),
    )


def write_parquet(folder, rng):
    rows = rows_of(rng)
    texts = [text.encode("utf-8", "replace").decode() for _, text, _ in rows]
    table = pa.table({"id": [row[0] for row in rows], "text": texts, "labels": [row[2] for row in rows]})
    if rng.random() < 0.05:
        table = pa.table({"id": ["0"], "text": ["y" * 50_000_000], "labels": ["a"]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=rng.choice(("none", "snappy", "zstd", "gzip")))
    return "train.parquet", buffer.getvalue(), TABLE.format(name="hostile", suffix="parquet")


def write_hdf5(folder, rng):
    n, buffer = rng.choice((1, 4)), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["pixels"] = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (n, 6, 5, 3), np.uint8)
        file["caption"] = np.array([f"caption {i}" for i in range(n)], "S20")
        file["label"] = np.arange(n)
        if rng.random() < 0.3:
            del file[rng.choice(("pixels", "caption", "label"))]
            name = rng.choice(("pixels", "caption", "label", "more"))
            file.pop(name, None)
            file[name] = rng.choice((np.zeros((n, 2)), np.zeros(0), np.array([b"x" * 9] * n)))
    return "train.h5", buffer.getvalue(), HDF5.format(name="hostile")


def write_cifar(folder, rng):
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(bytes([rng.randrange(10)]) + rng.randbytes(3072))
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    name = rng.choice(("data_batch_1.bin", "test_batch.bin", "batches.meta.txt"))
    return name, (folder / name).read_bytes(), "cifar10"


def photographs(folder, name, keys):
    (folder / name).mkdir(parents=True)
    for key in keys:
        Image.new("RGB", (4, 3), (key, 0, 0)).save(
            folder / name / (f"COCO_{name}_{key:012d}.jpg" if "201" in name else f"{key:012d}.jpg")
        )


def write_vqa(folder, rng):
    photographs(folder, "train2014", (9, 25))
    questions = [{"image_id": i, "question": hostile_text(rng), "question_id": 1000 + i} for i in (9, 25)]
    answers = [
        {
            "image_id": i,
            "question_id": 1000 + i,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": rng.choice(("yes", hostile_text(rng)))} for _ in range(10)],
        }
        for i in (9, 25)
    ]
    files = {
        "v2_OpenEnded_mscoco_train2014_questions.json": json.dumps({"questions": questions}),
        "v2_mscoco_train2014_annotations.json": json.dumps({"annotations": answers}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    name = rng.choice(list(files))
    return name, files[name].encode(), "vqa2"


def write_coco(folder, rng):
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for key in (9, 25):
        Image.new("RGB", (4, 3), (key, 0, 0)).save(folder / "train2017" / f"{key:012d}.jpg")
    content = {
        "images": [
            {"id": key, "file_name": rng.choice((f"{key:012d}.jpg", "../x.jpg", "\x1b.jpg"))} for key in (9, 25)
        ],
        "annotations": [{"image_id": key, "id": key, "caption": hostile_text(rng)} for key in (9, 25)],
    }
    return "annotations/captions_train2017.json", json.dumps(content).encode(), "coco_captions"


KINDS = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "hdf5": write_hdf5,
    "cifar": write_cifar,
    "vqa": write_vqa,
    "coco": write_coco,
}


def write_dataset(folder: Path, seed: int) -> tuple[str, str]:
    """Write hostile raw data; return what it is and its manifest: a built-in dataset's name or a file's."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    kind = rng.choice(list(KINDS))
    name, data, manifest = KINDS[kind](folder, rng)
    mutation = "as made" if rng.random() < 0.4 else rng.choice(list(MUTATIONS))
    if mutation in ("two joined", "checksums mended"):
        mutation = "bytes changed"
    (folder / name).write_bytes(MUTATIONS[mutation](data, rng))
    if "\n" in manifest:
        (folder / "hostile.toml").write_text(manifest)
        manifest = str(folder / "hostile.toml")
    return f"{kind}, {mutation} (seed {seed})", manifest
