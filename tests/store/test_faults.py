"""Full disks, files that are gone, cut short or may not be written: each is named, and nothing wrong is read."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.store.format import read_lines
from cachefuse.store.shard import ShardWriter
from cachefuse.store.store import FeatureStore
from fixtures.messages import naming

VIEWS = [("image", "pooled"), ("image", "tokens"), ("text", "pooled"), ("text", "tokens"), ("text", "ids")]


def make(dataset, store_path, dtype="float16", **options):
    options = {"views": ("pooled", "tokens", "ids"), "batch_size": 16, **options}
    return extract(dataset, ["toy"], store_path, device="cpu", dtype=dtype, **options)


def read_views(store_path):
    store = FeatureStore(store_path)
    return [row.tobytes() for modality, view in VIEWS for row in store.open_features("toy", modality).read(view)]


def arrays(files):
    """A store's files but its journals, which may have lines twice."""
    return {name: data for name, data in files.items() if not name.endswith("journal.jsonl")}


# A full disk


class FullDisk:
    """Lets so many calls that write pass, and fails the next."""

    def __init__(self, monkeypatch, n_calls):
        self.left = n_calls
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, real):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_disk_that_is_full_at_any_moment_costs_nothing_but_time(shapes, store_path, toy, tools, monkeypatch, dtype):
    undisturbed = store_path.with_name("undisturbed.zarr")
    make(shapes, undisturbed, dtype)
    expected = arrays(tools.files(undisturbed))
    with monkeypatch.context() as patch:
        counter = FullDisk(patch, 10**9)
        make(shapes, store_path, dtype)
    n_calls = 10**9 - counter.left
    for n in random.Random(0).sample(range(n_calls), 8):
        shutil.rmtree(store_path)
        with monkeypatch.context() as patch:
            FullDisk(patch, n)
            with pytest.raises(OSError, match="No space left on device"):
                make(shapes, store_path, dtype)
        assert not list(store_path.rglob(".*.partial"))
        make(shapes, store_path, dtype)
        assert arrays(tools.files(store_path)) == expected


def test_a_shard_that_can_t_be_opened_leaves_nothing_of_those_beside_it(shapes, store_path, toy, monkeypatch):
    real = ShardWriter.__init__

    def full(shard, temporary):
        if temporary.parent.name == "scales":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(shard, temporary)

    monkeypatch.setattr(ShardWriter, "__init__", full)
    with pytest.raises(OSError, match="No space left on device"):
        make(shapes, store_path, "int8")
    assert not list(store_path.rglob(".*.partial"))


# Files that are gone or cut short

KINDS = {  # file -> its view
    "pooled/c/0/0": "pooled",
    "tokens/block-000000/c/0/0": "tokens",
    "scales/block-000000/c/0": "tokens",
    "offsets/c/0/0": "tokens",
    "ids/block-000000/c/0": "ids",
    "ids_offsets/c/0/0": "ids",
}


@pytest.fixture
def quantised(shapes, store_path, toy, made_once):
    return shutil.copytree(made_once("small.zarr", lambda path: make(shapes, path, "int8")), store_path)


@pytest.mark.parametrize(("name", "view"), KINDS.items())
@pytest.mark.parametrize("left", [None, 0, 0.5, 0.99])
@pytest.mark.one_in(3)
def test_a_file_that_is_gone_or_cut_short_is_named_and_made_again(shapes, quantised, toy, tools, name, view, left):
    before, values = arrays(tools.files(quantised)), read_views(quantised)
    file = quantised / "features" / "toy" / "text" / name
    if left is None:
        file.unlink()
    else:
        os.truncate(file, int(left * file.stat().st_size))
    with pytest.raises(CacheError, match=naming(f"toy text {view} 16 80 block 0")):
        FeatureStore(quantised).open_features("toy", "text").read(view)
    assert make(shapes, quantised, "int8").computed == {("toy", "image"): 0, ("toy", "text"): 64}
    assert arrays(tools.files(quantised)) == before
    assert read_views(quantised) == values


@pytest.mark.parametrize(("name", "view"), [kind for kind in KINDS.items() if "offsets" not in kind[0]])
def test_a_changed_byte_is_found_when_its_block_is_first_read(shapes, quantised, toy, name, view):
    with (quantised / "features" / "toy" / "text" / name).open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 16]))
    rows = FeatureStore(quantised).open_features("toy", "text").rows(view)
    with pytest.raises(CacheError, match=naming(f"toy text {view} block 0 --repair")):
        rows[3]
    assert len(rows[70]) > 0


def test_a_journal_cut_at_any_byte_costs_at_most_its_last_line(shapes, store_path, toy):
    make(shapes, store_path, views=("pooled",))
    journal = store_path / "features" / "toy" / "image" / "journal.jsonl"
    data = journal.read_bytes()
    first = data.index(b"\n")
    for n in range(len(data)):
        journal.write_bytes(data[:n])
        features = FeatureStore(store_path).open_features("toy", "image")
        expected = 80 if n >= len(data) - 1 else 64 if n >= first else 0  # a line break is not missed
        assert 80 - len(features.missing_rows("pooled")) == expected
        if expected < 80:
            with pytest.raises(CacheError, match=naming(f"{expected} 80")):
                features.read()


def test_a_journal_line_changed_to_say_something_else_is_passed_over(shapes, store_path, toy):
    make(shapes, store_path, views=("pooled",))
    journal = store_path / "features" / "toy" / "image" / "journal.jsonl"
    first, second = [json.loads(line) for line in journal.read_bytes().splitlines()]
    for change in ({"block": 1}, {"rows": 16}, {"view": "tokens"}, {"checksum": 1}, {"more": True}):
        journal.write_text(f"{json.dumps({**first, **change})}\n{json.dumps(second)}\n[]\n7\nnull\n")
        assert [line["block"] for line in read_lines(journal)] == [1]


METADATA = [
    "zarr.json",
    "samples/zarr.json",
    "samples/id/zarr.json",
    "samples/present/image/zarr.json",
    "features/zarr.json",
    "features/toy/image/zarr.json",
    "features/toy/image/pooled/zarr.json",
    "features/toy/text/tokens/block-000000/zarr.json",
    "features/toy/text/offsets/zarr.json",
]


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("left", [None, pytest.param(0, marks=pytest.mark.slow), 0.5])
@pytest.mark.one_in(3)
def test_metadata_that_is_gone_or_cut_short_is_never_read_as_something_else(shapes, store_path, toy, name, left):
    make(shapes, store_path)
    store = FeatureStore(store_path)
    expected = [store.ids.tolist(), store.present("image").tolist(), read_views(store_path)]
    file = store_path / name
    if left is None:
        file.unlink()
    else:
        os.truncate(file, int(left * file.stat().st_size))

    def read():
        store = FeatureStore(store_path)
        if store.open_features("toy", "image") is None:
            raise CacheError("the features are gone")
        return [store.ids.tolist(), store.present("image").tolist(), read_views(store_path)]

    with suppress(CacheError):
        assert read() == expected
    if name == "features/toy/image/zarr.json":
        with pytest.raises(CacheError, match="delete"):  # what can't be mended says how to begin anew
            make(shapes, store_path)
    else:
        make(shapes, store_path)
        assert read() == expected


def test_the_journal_of_other_features_is_not_believed(shapes, store_path, toy):
    make(shapes, store_path)
    text = FeatureStore(store_path).open_features("toy", "text")
    line = text.written("pooled", 0)
    text.note_written("pooled", 0, replace(line, long={}))
    shutil.copyfile(text.path / "journal.jsonl", store_path / "features" / "toy" / "image" / "journal.jsonl")
    image = FeatureStore(store_path).open_features("toy", "image")
    assert image.long_texts() is None
    with pytest.raises(CacheError):
        image.read()


# A folder that may not be written

READ_AND_EXTRACT = """
import os, sys
from pathlib import Path
from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest

store, mine, manifest = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_text()
dataset = load_dataset(parse_manifest(manifest, "small.toml"), Path("nowhere"))

def read(store):
    features = FeatureStore(store).open_features("classic", "image")
    print(features.read().astype(float).sum())
    extract(dataset, ["classic"], store, device="cpu")

read_everything_once = extract(dataset, ["classic"], mine, device="cpu"), read(mine)  # Python's own files too
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    read(store)
except OSError as error:
    print(type(error).__name__, "|", error)
"""


@pytest.mark.slow
def test_a_store_that_may_not_be_written_is_read_and_left_as_it_is(shapes, tmp_path, tools):
    store = tmp_path / "cache" / "small.zarr"
    extract(shapes, ["classic"], store, device="cpu")
    (tmp_path / "small.toml").write_text(tools.SHAPES.format(train=60, test=20))
    before = tools.files(store.parent)
    folders = [path for path in (tmp_path, *tmp_path.parents) if path.stat().st_uid == os.geteuid()]
    closed = [(path, path.stat().st_mode) for path in folders if path.stat().st_mode & 0o055 != 0o055]
    for path in (store.parent, *store.parent.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for path, mode in closed:
            path.chmod(mode | 0o055)
        done = subprocess.run(
            [sys.executable, "-c", READ_AND_EXTRACT, store, tmp_path / "mine.zarr", tmp_path / "small.toml"],
            capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        for path, mode in closed:
            path.chmod(mode)
        for path in (store.parent, *store.parent.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    mine, theirs, error = done.stdout.splitlines()
    assert theirs == mine
    assert error.startswith("PermissionError | [Errno 13] Permission denied: ")
    assert tools.files(store.parent) == before
