"""Errors of the system end a command with one line that names the file and says what to do."""

import errno
import gc
import os
import sys
import warnings

import pytest

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.files import write_atomically
from cachefuse_cli.shared import render
from cachefuse_cli.shared.console import safe_streams

if sys.platform != "win32":
    import resource


@pytest.fixture
def small_files():
    """Let no file become larger than some bytes: a real EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_file_that_may_not_grow_is_named(shapes, store_path, toy, tools, small_files):
    dataset = tools.make_dataset(shapes, images=[tools.FakeImage(i) for i in range(64)])
    extract(dataset, ["toy"], store_path, device="cpu", views=("pooled",))
    small_files(100)
    with pytest.raises(OSError, match="File too large") as caught:
        extract(dataset, ["toy"], store_path, device="cpu", views=("tokens",))
    assert str(store_path) in str(caught.value.filename)
    with pytest.raises(OSError, match="File too large") as caught:
        write_atomically(store_path.with_name("run.json"), bytes(1000))
    assert caught.value.filename == str(store_path.with_name("run.json"))
    small_files(resource.RLIM_INFINITY)
    extract(dataset, ["toy"], store_path, device="cpu", views=("tokens",))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/data/a.png"), ["/data/a.png", "Input/output error"]),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/w/shard"), ["/w/shard", "ulimit -f"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/shard"), ["/w/shard", "free some space"]),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), ["/tmp", "TMPDIR"]),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ["memory", "--memory"]),
        (MemoryError(), ["memory", "--batch-size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["memory", "--batch-size"]),
        (ImportError("libx.so: failed to map segment from shared object"), ["memory", "ulimit -v"]),
        (RuntimeError("can't start new thread"), ["threads", "ulimit -u"]),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), ["threads", "ulimit -u"]),
        (CacheError("no memory of it"), ["no memory of it"]),
    ],
)
def test_the_line_says_where_and_what_to_do(capsys, error, words):
    error.add_note("while preparing the image of sample 7 (/data/a.png)")
    render.error(error)
    first, second = capsys.readouterr().err.splitlines()
    assert all(word in first for word in words)
    assert "sample 7" in second


@pytest.mark.filterwarnings("always")
def test_what_an_error_left_unfinished_has_no_line(capsys):
    async def unfinished():
        pass

    with safe_streams():
        waiting = unfinished()
        del waiting
        gc.collect()
        warnings.warn("another warning", stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("UserWarning: another warning")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("something else"), False),
        (OSError(errno.EIO, "x"), False),
        (BlockingIOError(errno.EAGAIN, "x"), True),
    ],
)
def test_out_of_threads(error, expected):
    assert render.out_of_threads(error) is expected
