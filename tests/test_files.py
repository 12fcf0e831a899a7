import errno
import json
import math
import os
import re

import numpy as np
import pytest

from cachefuse.files import read_bounded, slug, to_json, write_atomically


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("clip:ViT-B-32@laion2b", "clip-ViT-B-32-laion2b"),
        ("hf:./folder", "hf-.-folder"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("a b\0c\n", "a-b-c"),
        ("été", "t"),
    ],
)
def test_slug_is_one_safe_folder_name(text, name):
    assert slug(text) == name


def test_write_atomically(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, b"one")

    def no_space(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_in_order_and_has_no_nan():
    value = {"b": 1, "a": [1.5, math.nan, (math.inf, -math.inf)], 3: {"ü": None, "np": np.float64("nan")}}
    text = to_json(value)
    assert json.loads(text) == {"b": 1, "a": [1.5, None, [None, None]], "3": {"ü": None, "np": None}}
    assert text.index('"b"') < text.index('"a"')
    assert "ü" in text


def test_json_has_the_numbers_of_numpy():
    value = {"n": np.int64(3), "x": (np.float32(0.5), np.float16("inf")), "yes": True}
    assert json.loads(to_json(value)) == {"n": 3, "x": [0.5, None], "yes": True}


def test_read_bounded_reads_a_regular_file_of_at_most_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(file)
    assert read_bounded(file, 5) == read_bounded(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than the limit of 4 bytes") as caught:
        read_bounded(file, 4)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(file)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_read_bounded_never_waits_and_never_reads_without_end(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        read_bounded(path, 100)
    assert str(caught.value.filename) == str(path)
