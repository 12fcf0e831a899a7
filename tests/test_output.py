import os
import subprocess
import sys
import threading

import pytest

from cachefuse.errors import ConfigError
from cachefuse.output import check_output, write_output


def test_a_link_is_followed_and_its_target_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, second = tmp_path / "there/target.csv", tmp_path / "link.csv", tmp_path / "second.csv"
    link.symlink_to("there/target.csv")
    second.symlink_to("link.csv")
    for data in (b"new", b"again"):  # at first there is no target
        write_output(second, data)
        assert target.read_bytes() == data
    assert second.is_symlink()
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target.csv"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_written_to_and_stays(tmp_path, link):
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if link:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_output(path, b"x" * 100_000)
    reader.join()
    assert read == [b"x" * 100_000]
    assert pipe.is_fifo()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_a_pipe_whose_reader_stops_is_named(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: pipe.open("rb").close())
    reader.start()
    with pytest.raises(ConfigError, match=f"{pipe}.*reader"):
        write_output(pipe, bytes(1 << 20))
    reader.join()


@pytest.mark.skipif(sys.platform != "linux", reason="has no such files")
def test_a_stream_of_the_process_is_written_to(tmp_path):
    code = "import sys, pathlib; from cachefuse.output import write_output as w; w(pathlib.Path(sys.argv[1]), b'data')"
    done = subprocess.run([sys.executable, "-c", code, "/proc/self/fd/1"], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"data"
    with (tmp_path / "file").open("wb") as file:
        os.unlink(file.name)  # its link now leads to a name that is none
        subprocess.run([sys.executable, "-c", code, "/proc/self/fd/1"], stdout=file, check=True)
        assert os.fstat(file.fileno()).st_size == 4
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_folder_of_a_run_is_replaced(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_bytes(b"mine")
    (run / "report.html").symlink_to(outside)
    write_output(run / "report.html", b"page", own=run)
    assert outside.read_bytes() == b"mine"
    assert (run / "report.html").read_bytes() == b"page"
    assert not (run / "report.html").is_symlink()
    (tmp_path / "page.html").symlink_to(outside)
    write_output(tmp_path / "page.html", b"page", own=run)
    assert outside.read_bytes() == b"page"


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("gone/file")
    for path, why in ((tmp_path, "folder"), (tmp_path / "gone/file", "gone"), (tmp_path / "link", "gone")):
        with pytest.raises(ConfigError, match=f"cannot write {path}.*{why}"):
            check_output(path)
        with pytest.raises(ConfigError, match=f"cannot write {path}.*{why}"):
            write_output(path, b"")


def test_an_input_is_no_output(tmp_path):
    table, link, other = tmp_path / "table.csv", tmp_path / "link.csv", tmp_path / "other.csv"
    table.write_bytes(b"id\n")
    link.symlink_to("table.csv")
    for path in (table, link):
        with pytest.raises(ConfigError, match=f"cannot write {path}.*input {table}"):
            check_output(path, None, table)
    check_output(other, None, table)
    check_output(table, None, other)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="has no such file")
def test_stdout_is_written_to_even_if_it_is_a_file(tmp_path):
    script = (
        "from pathlib import Path; from cachefuse.output import write_output; write_output(Path('/dev/stdout'), b'x')"
    )
    kept = tmp_path / "kept"
    kept.write_bytes(b"before, ")
    with kept.open("ab") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
        file.write(b" after")
    assert kept.read_bytes() == b"before, x after"
