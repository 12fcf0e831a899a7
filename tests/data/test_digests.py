import hashlib
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from cachefuse.data import dataset as module
from cachefuse.data import images
from cachefuse.data.dataset import Dataset, load_dataset
from cachefuse.data.digests import hash_parts
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from fixtures.columns import columns, images_of, texts_of

MANIFEST = """
name = "mine"
task = "multiclass"

[reader]
kind = "table"
files = { train = "train.csv" }
id = "id"
image = "photos/{id}"
text = "text"
labels = "label"
"""


@pytest.fixture
def root(tmp_path):
    """Six rows whose images are any bytes: none is decoded."""
    folder = tmp_path / "root"
    (folder / "photos").mkdir(parents=True)
    for i in range(6):
        (folder / f"photos/{i}").write_bytes(b"content %d" % i)
    (folder / "train.csv").write_text("id,text,label\n" + "".join(f"{i},text {i},{'ab'[i % 2]}\n" for i in range(6)))
    return folder


def later(path):
    """Set a file's time as a later edit would, whatever the clock's grain."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def load(folder):
    return load_dataset(parse_manifest(MANIFEST, "mine.toml"), folder)


def make_dataset(sources=None, texts=None):
    n = len(sources if sources is not None else texts)
    manifest = parse_manifest(MANIFEST, "mine.toml")
    others = {"ids": [str(i) for i in range(n)], "splits": np.array(["train"] * n), "targets": np.zeros(n, np.int32)}
    return Dataset(manifest, ("a", "b"), modalities=columns(sources, texts), **others)


class Source:
    """An image that tells who hashes it."""

    def __init__(self, number, on_digest=lambda number: None):
        self.number = number
        self.on_digest = on_digest

    def fingerprint(self):
        return f"stamp {self.number}"

    def digest(self):
        self.on_digest(self.number)
        return f"digest {self.number}"


def test_hashes_are_the_same_on_every_machine():
    assert hash_parts("größer", b"\0\xff", "") == "6ddca6203b6b4190"
    framed = b"8:" + "größer".encode() + b"2:\0\xff" + b"0:"
    assert hashlib.blake2b(framed, digest_size=8).hexdigest() == "6ddca6203b6b4190"


def test_the_borders_of_parts_count():
    parts = [("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("", "a", "b"), ("a", "", "b"), ("a:b",), ("1:a1:b",)]
    parts += [(), ("",), ("", ""), ("0:",), ("0:0:",), ("\0",), ("a\0b",), ("a", "b\0")]
    assert len({hash_parts(*some) for some in parts}) == len(parts)


def test_every_text_counts_exactly():
    texts = [("a", "b"), ("ab",), ("b", "a"), ("a",), ("a", "b", ""), ("a ", "b"), ("a\0b",), ("A", "b"), (), ("",)]
    texts += [("é",), ("e\u0301",), ("\ud800",), ("?",), ("\udfff",), ("\U0001f600",), ("\ud83d\ude00",)]
    dataset = make_dataset(texts=texts)
    assert len(set(dataset.digests())) == len(set(dataset.fingerprints())) == len(texts)


def test_no_text_stands_for_an_image():
    (digest,), (fingerprint,) = make_dataset([Source(1)]).digests(), make_dataset([Source(1)]).fingerprints()
    faked = [(f"image:{Source(1).digest()}",), (f"image:{Source(1).fingerprint()}",), ("", "image:digest 1")]
    faked += [(Source(1).digest(),), (), ("",), ("10:image:dige",)]
    dataset = make_dataset(texts=faked)
    assert {digest, fingerprint}.isdisjoint([*dataset.digests(), *dataset.fingerprints()])
    assert make_dataset([None], [("x",)]).digests() == make_dataset(texts=[("x",)]).digests() != [digest]


def test_neither_name_nor_place_nor_time_is_in_the_digests(root, tmp_path):
    digests, fingerprints = load(root).digests(), load(root).fingerprints()
    assert len(set(digests)) == len(set(fingerprints)) == 6
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy)
    assert load(tmp_path / "copy").digests() == digests
    root.rename(tmp_path / "moved")
    moved = load(tmp_path / "moved")
    assert (moved.digests(), moved.fingerprints()) == (digests, fingerprints)
    renamed = [
        FileImage(source.path.rename(source.path.with_name(f"new {i}"))) for i, source in enumerate(images_of(moved))
    ]
    assert make_dataset(renamed, texts_of(moved)).digests() == digests


def test_rows_whose_text_or_image_changed(root):
    dataset = load(root)
    digests, fingerprints = dataset.digests(), dataset.fingerprints()
    text = (root / "train.csv").read_text()
    (root / "train.csv").write_text(text.replace("text 1", "another").replace("2,text 2,a", "2,text 2,b") + "6,x,a\n")
    (root / "photos/3").write_bytes(b"CONTENT 3")
    later(root / "photos/3")
    (root / "photos/4").unlink()
    later(root / "photos/5")
    changed = load(root)
    assert [i for i in range(6) if changed.fingerprints()[i] != fingerprints[i]] == [1, 3, 4, 5]
    assert [i for i in range(6) if changed.digests()[i] != digests[i]] == [1, 3, 4]
    assert dataset.digests()[3] == changed.digests()[3]  # noticed by a dataset that was read before, too
    assert len(changed.digests()) == 7


@pytest.mark.parametrize("rows", [[], [5], [4, 0, 4], range(1, 6, 2), np.array([3, 2]), (0,)])
def test_some_rows(root, rows):
    dataset = load(root)
    assert dataset.digests(rows) == [dataset.digests()[row] for row in rows]


def test_only_the_given_rows_are_hashed():
    hashed = []
    sources = [Source(i, hashed.append) for i in range(100)]
    dataset = make_dataset(sources)
    dataset.digests([7, 70])
    assert sorted(hashed) == [7, 70]
    dataset.fingerprints()
    assert len(hashed) == 2


def test_an_image_that_samples_share_is_hashed_once():
    hashed = []
    sources = [Source(i, hashed.append) for i in range(5)]
    shared = [sources[i] for i in (0, 0, 3, 3, 3, 0, 4)] + [None]
    texts = [(f"text {i}",) for i in range(8)]
    alone = make_dataset(shared, texts)
    together = replace(alone, modalities=columns(shared, texts, shared=True))
    assert alone.digests() == together.digests()
    assert alone.fingerprints() == together.fingerprints()
    assert sorted(hashed) == sorted([0, 0, 3, 3, 3, 0, 4, 0, 3, 4])
    assert alone.modalities["image"].rows is None
    assert together.modalities["image"].rows.tolist() == [0, 0, 1, 1, 1, 0, 2, 3]


def test_threads_give_the_digests_in_order(monkeypatch):
    monkeypatch.setattr(module, "n_cores", lambda: 8)
    monkeypatch.setattr(module, "BATCH", 4)
    meeting = threading.Barrier(8, timeout=60)  # passed only if eight threads hash at once
    sources = [Source(i, lambda number: number % 4 == 0 and number < 32 and meeting.wait()) for i in range(1000)]
    expected = [hash_parts(f"image:digest {i}") for i in range(1000)]
    assert make_dataset(sources).digests() == expected
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("digest")]


def test_few_rows_are_in_flight(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "WINDOW", 20)
    progress, ahead = [(0, 0)], []
    sources = [Source(i, lambda number: ahead.append(number - progress[-1][0])) for i in range(150)]
    make_dataset(sources).digests(on_progress=lambda done, total: progress.append((done, total)))
    assert max(ahead) <= 20
    assert progress[1:] == [(done, 150) for done in (*range(4, 150, 4), 150)]


def test_progress():
    calls = []
    make_dataset(texts=[("x",)] * 10_000).digests(range(9000), lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (9000, 9000)
    assert 100 < len(calls) < 1000
    make_dataset([Source(1)]).digests([], lambda done, total: pytest.fail("no row, no progress"))


@pytest.mark.parametrize("code", sorted(images.FAILURES))
def test_a_failing_machine_is_not_a_digest(root, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    dataset = load(root)
    with monkeypatch.context() as failing:
        failing.setattr(images, "open", fail, raising=False)
        with pytest.raises(OSError, match=os.strerror(code)):
            dataset.digests()
    with monkeypatch.context() as failing:
        failing.setattr(os, "stat", fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            images_of(dataset)[0].fingerprint()
        with pytest.raises(OSError, match=os.strerror(code)):
            images_of(dataset)[0].digest()
    assert len(set(dataset.digests())) == 6


@pytest.mark.parametrize("where", ["digest", "progress"])
def test_an_interruption_leaves_the_rest_unhashed(where):
    hashed = []

    def interrupt(*_):
        raise KeyboardInterrupt

    sources = [Source(i, hashed.append) for i in range(100_000)]
    if where == "digest":
        sources[40].on_digest = interrupt
    with pytest.raises(KeyboardInterrupt):
        make_dataset(sources).digests(on_progress=interrupt if where == "progress" else lambda done, total: None)
    assert len(hashed) <= module.WINDOW
