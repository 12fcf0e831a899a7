import errno
import os
import shutil
from pathlib import Path

import pytest

from cachefuse.data import images
from cachefuse.data.digests import hash_parts
from cachefuse.data.images import FileImage


@pytest.fixture
def root(tmp_path):
    """A file of any bytes: none is decoded."""
    (tmp_path / "root/photos").mkdir(parents=True)
    (tmp_path / "root/photos/0").write_bytes(b"content 0")
    return tmp_path / "root"


def later(path):
    """Set a file's time as a later edit would, whatever the clock's grain."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def edit(path):
    path.write_bytes(b"CONTENT 0")
    later(path)


def replace(path):
    path.with_name("new").write_bytes(b"CONTENT 0")
    later(path.with_name("new"))
    path.with_name("new").replace(path)


def link(path, content):
    path.with_name("other").write_bytes(content)
    later(path.with_name("other"))
    path.unlink()
    path.symlink_to("other")


def remove(path, make=lambda path: None):
    path.unlink()
    make(path)


def keep_time(path, change):
    time = path.stat().st_mtime_ns
    change()
    os.utime(path, ns=(0, time))


@pytest.mark.parametrize(
    ("change", "stamp_changes", "digest_changes"),
    [
        (edit, True, True),
        (replace, True, True),
        (later, True, False),
        (lambda path: path.write_bytes(b"content 0, and more"), True, True),
        (lambda path: path.write_bytes(b""), True, True),
        (lambda path: link(path, b"CONTENT 0"), True, True),
        (lambda path: link(path, b"content 0"), True, False),
        (remove, True, True),
        (lambda path: remove(path, Path.mkdir), True, True),
        (lambda path: remove(path, os.mkfifo), True, True),
        (lambda path: remove(path, lambda path: path.symlink_to(path.name)), True, True),
        (lambda path: path.parent.rename(path.parents[1] / "away"), True, True),
        (lambda path: keep_time(path, lambda: path.write_bytes(b"longer than it was")), True, True),
        (lambda path: path.read_bytes(), False, False),
        (lambda path: (path.parent / "beside").write_bytes(b"x"), False, False),
    ],
)
def test_what_changes_a_file(root, change, stamp_changes, digest_changes):
    source = FileImage(root / "photos/0", root)
    fingerprint, digest = source.fingerprint(), source.digest()
    change(root / "photos/0")
    assert (source.fingerprint() != fingerprint) == stamp_changes
    assert (source.digest() != digest) == digest_changes


def test_an_empty_file_becomes_a_pipe(root):
    path = root / "photos/0"
    path.write_bytes(b"")
    source = FileImage(path, root)
    fingerprint, digest = source.fingerprint(), source.digest()
    keep_time(path, lambda: remove(path, os.mkfifo))
    assert source.fingerprint() != fingerprint
    assert source.digest() != digest


def deny(path, monkeypatch):
    path.chmod(0)
    if os.access(path, os.R_OK):  # a root user may read anything

        def refuse(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setattr(images, "open", refuse, raising=False)


def test_a_file_that_may_be_read_at_last(root, monkeypatch):
    source = FileImage(root / "photos/0", root)
    fingerprint, digest = source.fingerprint(), source.digest()
    with monkeypatch.context() as denied:
        deny(root / "photos/0", denied)
        assert source.fingerprint() != fingerprint
        assert source.digest() != digest
        assert source.digest() == hash_parts("unusable", "can't be read: Permission denied")
    (root / "photos/0").chmod(0o600)
    assert source.fingerprint() == fingerprint
    assert source.digest() == digest


def test_each_reason_has_a_digest_of_its_own(root, monkeypatch):
    os.mkfifo(root / "pipe")
    (root / "large").write_bytes(bytes(101))
    (root / "loop").symlink_to("loop")
    (root / "words").write_bytes(b"no such file")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    paths = ["none", "photos", "pipe", "large", "loop", "words", "photos/0", "photos/0/x", "../secret", "\0", "x" * 300]
    digests = {path: FileImage(root / path, root).digest() for path in paths}
    assert len(set(digests.values())) == len(paths)
    assert digests["none"] == hash_parts("unusable", "no such file")


@pytest.mark.parametrize("path", ["none", "photos", "photos/0/x", "../secret", "\ud800", "a\0b", "loop"])
def test_reasons_do_not_tell_where_a_file_lies(tmp_path, path):
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "a longer name"):
        (folder / "photos").mkdir(parents=True)
        (folder / "photos/0").touch()
        (folder / "loop").symlink_to("loop")
        digests.add(FileImage(folder / path, folder).digest())
    assert len(digests) == 1


def test_a_path_that_comes_to_lie_inside_the_root(root):
    (root.parent / "0").write_bytes(b"content 0")
    os.utime(root.parent / "0", ns=(0, (root / "photos/0").stat().st_mtime_ns))
    outside, inside = FileImage(root / "../0", root), FileImage(root / "photos/0", root)
    assert outside.fingerprint() != inside.fingerprint()
    assert outside.digest() == hash_parts("unusable", "lies outside the data folder") != inside.digest()


def test_files_of_one_name_in_two_folders(root):
    (root / "small").mkdir()
    shutil.copy2(root / "photos/0", root / "small/0")
    photo, small = FileImage(root / "photos/0", root), FileImage(root / "small/0", root)
    assert photo.fingerprint() != small.fingerprint()
    assert photo.digest() == small.digest() == FileImage(root / "photos/0").digest()
