"""What cachefuse/data/UNTRUSTED.md promises."""

import os
from dataclasses import replace

import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest, parse_manifest
from cachefuse.data.readers.table import read_columns
from cachefuse.errors import BadSampleError, DataError, ManifestError, MissingDataError
from cachefuse.limits import UNTRUSTED, limited, limits
from fixtures.messages import naming

MANIFEST = """
    name = "mine"
    task = "multiclass"
    [reader]
    kind = "table"
    files = { train = "train.csv" }
    id = "id"
    image = "{file}"
    text = "text"
    labels = "label"
"""
FOLDERS = 'name = "mine"\ntask = "multiclass"\nreader = { kind = "folder" }'


@pytest.fixture
def folder(tmp_path):
    """A data folder with an image, and a link to one outside of it."""
    for name in ("root/in.png", "outside/out.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    root = tmp_path / "root"
    (root / "link.png").symlink_to(tmp_path / "outside/out.png")
    (root / "train.csv").write_text("id,file,text,label\na,in.png,x,p\nb,link.png,y,q\n")
    return root


def load(root, manifest=MANIFEST):
    return load_dataset(parse_manifest(manifest, "mine.toml"), root)


def test_linked_images(folder):
    images = load(folder).modalities["image"]
    trusted = [image.digest() for (image,) in (images[0], images[1])]
    assert images[1][0].load().size == (4, 4)
    with limited(UNTRUSTED):
        assert images[0][0].digest() == trusted[0]
        with pytest.raises(BadSampleError, match="link"):
            images[1][0].load()
        assert images[1][0].digest() != trusted[1]


def test_linked_tables(folder, tmp_path):
    (folder / "train.csv").rename(tmp_path / "outside/train.csv")
    (folder / "train.csv").symlink_to(tmp_path / "outside/train.csv")
    assert len(load(folder)) == 2
    with limited(UNTRUSTED), pytest.raises(DataError, match=naming("train.csv untrusted")):
        load(folder)


def test_linked_folders(folder, tmp_path):
    (folder / "cat").mkdir()
    (folder / "in.png").rename(folder / "cat/in.png")
    (folder / "dog").symlink_to(tmp_path / "outside")
    (folder / "link.png").unlink()
    (tmp_path / "outside/back").symlink_to(folder)
    (tmp_path / "outside/round").symlink_to(tmp_path / "outside")
    dataset = load(folder, FOLDERS)
    assert dataset.ids == ["cat/in.png", "dog/out.png", "dog/round/out.png"][: len(dataset)]
    assert dataset.classes == ("cat", "dog")
    with limited(UNTRUSTED):
        dataset = load(folder, FOLDERS)
    assert dataset.ids == ["cat/in.png"]
    assert "dog" in dataset.notes[0]


@pytest.mark.parametrize("rules", [limits(), UNTRUSTED])
@pytest.mark.parametrize("path", ["../outside/out.png", "{tmp}/outside/out.png"])
def test_paths_out_of_the_folder_are_always_refused(folder, tmp_path, rules, path):
    (folder / "train.csv").write_text(f"id,file,text,label\na,{path.format(tmp=tmp_path)},x,p\n")
    with limited(rules), pytest.raises(BadSampleError, match="outside"):
        load(folder).modalities["image"][0][0].load()
    with pytest.raises(ManifestError, match="inside"):
        parse_manifest(MANIFEST.replace("train.csv", path.format(tmp=tmp_path)), "mine.toml")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, device, os.mkdir])
def test_what_is_no_regular_file_is_not_read(folder, make):
    for name in ("train.csv", "link.png"):
        (folder / name).unlink()
    (folder / "other.csv").write_text("id,file,text,label\na,link.png,x,p\n")
    for name in ("train.csv", "link.png", "mine.toml", "a.jsonl", "a.parquet"):
        make(folder / name)
    with pytest.raises(MissingDataError):
        load(folder)
    with pytest.raises(ManifestError, match=naming("mine.toml")):
        load_manifest(str(folder / "mine.toml"))
    for name in ("train.csv", "a.jsonl", "a.parquet"):
        with pytest.raises(OSError, match=r"file|directory"):
            read_columns(folder / name)
    with pytest.raises(BadSampleError):
        load(folder, MANIFEST.replace("train.csv", "other.csv")).modalities["image"][0][0].load()


@pytest.mark.parametrize("limit", [{"rows": 1}, {"columns": 3}, {"file_bytes": 10}])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_columns_and_sizes(folder, suffix, limit):
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.csv.read_csv(folder / "train.csv")
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    (folder / "train.jsonl").write_text('{"id": 1, "file": "", "text": "", "label": ""}\n' * 2)
    assert read_columns(folder / f"train.{suffix}").n_rows == 2
    number = next(iter(limit.values()))
    with limited(replace(UNTRUSTED, **limit)), pytest.raises((DataError, OSError), match=naming(f"train {number}")):
        read_columns(folder / f"train.{suffix}")


def test_its_limits_are_those_of_the_page():
    assert (UNTRUSTED.text_bytes, UNTRUSTED.rows, UNTRUSTED.columns) == (1 << 16, 1_000_000, 10_000)
    assert (UNTRUSTED.file_bytes, UNTRUSTED.outside_links, UNTRUSTED.memory) == (1 << 28, False, limits().memory)


@pytest.mark.parametrize("name", ["a\0", "x" * 5000])
@pytest.mark.parametrize("column", ["id", "label"])
def test_names_that_arrays_would_lose_are_refused(tmp_path, name, column):
    import json

    row = {"id": "b", "text": "x", "label": "q", column: name}
    lines = [json.dumps({"id": "a", "text": "x", "label": "a"}), json.dumps(row)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    manifest = MANIFEST.replace("train.csv", "train.jsonl").replace('image = "{file}"', "")
    with pytest.raises(DataError, match=naming(f"mine {column}")) as caught:
        load(tmp_path, manifest)
    assert len(str(caught.value)) < 500
