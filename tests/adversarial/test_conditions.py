"""Odd surroundings: no locks, another clock, few file descriptors, another user, readers beside a writer, more rows."""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from adversarial import workspaces
from adversarial.forks import TESTS, Forks
from adversarial.judge import SAME, fault_of, left, leftovers, verdict
from adversarial.kills import append_rows
from adversarial.readers import result
from adversarial.test_faults import NOBODY, open_to_all
from adversarial.workspaces import QUICK, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture
def work(whole, tmp_path):
    return workspaces.copy(whole, tmp_path / "work")


@pytest.fixture
def unextracted(states, tmp_path):
    return workspaces.copy(states / "extract", tmp_path / "work")


def one_error(ended, *words):
    """Assert that a command ended with one clear line that has all of these words."""
    assert not fault_of(ended), ended
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == 1
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOSYS", "ENOLCK", "EOPNOTSUPP"]
)
@pytest.mark.parametrize("step", ["extract", "train-head", "sweep"])
def test_a_file_system_without_locks_is_used_or_named(forks, states, tmp_path, number, step):
    work = workspaces.copy(states / step, tmp_path / "work")
    ended = forks.run(*STEPS[step], cwd=work, conditions={"no_flock": number})
    assert not fault_of(ended), ended
    if ended.code:
        one_error(ended, "lock")
        ended = forks.run(*STEPS[step], cwd=work)
    assert ended.code == 0, ended
    assert not leftovers(work)


@pytest.mark.parametrize("seconds", [-10 * 365 * 86400, -3600, 10 * 365 * 86400])
def test_a_clock_that_moved_changes_no_result(forks, work, seconds):
    """The latest run is the one made last, whatever the clock says; the features are the same ones."""
    before = [result(forks, work, name)[1] for name in ("train-head", "predict")]
    ended = forks.run(*STEPS["extract tokens"], "--json", cwd=work, conditions={"clock": seconds})
    assert ended.code == 0, ended
    assert {each["computed"] for each in json.loads(ended.out)["features"]} == {0}
    assert [result(forks, work, name, conditions={"clock": seconds})[1] for name in ("train-head", "predict")] == before


@pytest.mark.parametrize("host", ["", "another.host"], ids=["this host", "another host"])
def test_a_stale_lock_with_a_used_process_id_refuses_nobody(forks, unextracted, host):
    """The files that a killed writer leaves name a process id that another process has now."""
    cache = unextracted / "workspace" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    about = {"pid": os.getpid(), "host": host or socket.gethostname(), "since": "2020-01-01 00:00:00+00:00"}
    (cache / ".mine.zarr.writer").write_text(json.dumps(about))
    (cache / ".mine.zarr.lock").touch()
    ended = forks.run(*STEPS["extract"], cwd=unextracted)
    assert ended.code == 0, ended


def test_a_second_writer_is_told_of_the_first(states, tmp_path, forks):
    work = workspaces.copy(states / "extract tokens", tmp_path / "work")
    with Forks() as others, stopped_writer(others, work):
        one_error(forks.run(*STEPS["extract tokens"], cwd=work), "process")
    assert forks.run(*STEPS["extract tokens"], cwd=work).code == 0


@contextlib.contextmanager
def stopped_writer(forks, work):
    """A writer that hardly moves in its work, and then is killed."""
    options = {"conditions": {"slow": 1}, "timeout": 60}
    thread = threading.Thread(target=forks.run, args=STEPS["extract tokens"], kwargs={"cwd": work, **options})
    thread.start()
    writer = work / "workspace" / "cache" / ".mine.zarr.writer"
    while thread.is_alive() and not writer.exists():
        thread.join(0.01)
    yield
    os.kill(json.loads(writer.read_text())["pid"], signal.SIGKILL)
    thread.join()


def test_readers_beside_a_writer_see_what_was_or_what_is(forks, states, tmp_path):
    """Eight readings while rows are appended: each is of the rows before, of those after, or refused in one line."""
    work = workspaces.copy(states / "align", tmp_path / "work")
    names = ("verify", "inspect", "train-head")
    right = {name: [result(forks, work, name)[1]] for name in names}
    append_rows(work)
    undisturbed = workspaces.copy(work, tmp_path / "undisturbed")
    assert forks.run(*STEPS["extract tokens"], cwd=undisturbed).code == 0
    with Forks() as others:
        ended = []
        thread = threading.Thread(
            target=lambda: ended.append(others.run(*STEPS["extract tokens"], cwd=work, conditions={"slow": 0.05}))
        )
        thread.start()
        seen = []
        while thread.is_alive() or len(seen) < 8:
            name = names[len(seen) % len(names)]
            seen.append((name, *result(forks, work, name)))
        thread.join()
    assert ended[0].code == 0, ended
    for name in names:
        right[name].append(result(forks, undisturbed, name)[1])
    for name, reading, value in seen:
        if name != "inspect" and not (name == "verify" and reading.code == 1 and not reading.err):
            found = verdict(reading, value, right[name])
            assert not fault_of(reading), reading
            assert found == SAME or "error: " in reading.err or "note: " in reading.err, found
    assert left(work)["runs"] == left(undisturbed)["runs"]


def test_a_run_deleted_while_it_predicts_is_named(forks, work):
    """At any of its reads: the run's folder goes while predict loads it."""
    expected = result(forks, work, "predict head")[1]
    for n in (0, 1, 2, 5, 20):
        copy = workspaces.copy(work, work.with_name(f"work {n}"))
        run = str(copy / "workspace" / "runs" / "mine-sum-linear-asl-1")
        ended, value = result(forks, copy, "predict head", conditions={"delete_at_read": [n, run]})
        assert not fault_of(ended), ended
        if ended.code:
            one_error(ended, "mine-sum-linear-asl-1")
        else:
            assert value == expected


def test_another_user_reads_a_workspace_that_may_not_be_written(forks, work):
    expected = {
        name: result(forks, work, name, warm=True)[1]
        for name in ("verify", "evaluate", "predict int8", "inspect", "runs")
    }
    before = left(work)
    open_to_all(work)
    for path in sorted((work / "workspace").rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (work / "workspace").chmod(0o555)
    try:
        for name, value in expected.items():
            ended, found = result(forks, work, name, conditions={"user": NOBODY})
            assert verdict(ended, found, [value]) == SAME, (name, ended)
        if os.geteuid() == 0 and open_to_others(sys.prefix) and open_to_others(TESTS):  # they import late
            for args in ((*STEPS["extract"][:-1], "hf:./bert"), ("train-head", "--dataset", "mine", *QUICK)):
                ended = forks.run(*args, cwd=work, conditions={"user": NOBODY})
                assert not fault_of(ended), ended
                assert ended.code in (0, 1), ended
    finally:
        for path in (work / "workspace", *(work / "workspace").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert left(work) == before


def open_to_others(folder):
    """Whether another user may look into a folder."""
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (Path(folder), *Path(folder).parents))


def test_many_encoders_need_few_file_descriptors(forks, states, tmp_path):
    """Thirty encoders, three views each, in a process that may open 256 files."""
    work = workspaces.copy(states / "extract", tmp_path / "work")
    encoders = []
    for n in range(15):
        for name in ("bert", "vit"):
            workspaces.copy(work / name, work / f"{name}{n}")
            encoders += ["--encoder", f"hf:./{name}{n}"]
    few = {"conditions": {"files": 256}, "timeout": 300}
    ended = forks.run("extract", "--dataset", "./mine.toml", *encoders, "--views", "pooled,tokens,ids", cwd=work, **few)
    assert ended.code == 0, ended
    for args in (("verify",), ("inspect",), ("train-head", "--dataset", "mine", *QUICK), ("evaluate",), ("predict",)):
        ended = forks.run(*args, cwd=work, **few)
        assert ended.code == 0, (args, ended)


@pytest.mark.parametrize("n", [4_000, 20_000, 1_000_000])  # what it prints goes to a file too
def test_a_file_that_may_not_grow_is_named(forks, unextracted, n):
    """EFBIG, at any size of a file."""
    ended = forks.run(*STEPS["extract tokens"], cwd=unextracted, conditions={"file_bytes": n})
    if ended.code:
        one_error(ended, "/")
    ended = forks.run(*STEPS["extract tokens"], cwd=unextracted)
    assert ended.code == 0, ended
    assert not leftovers(unextracted)


def test_four_times_as_many_rows_take_four_times_as_long(forks, tmp_path):
    """Reading, extracting, training and predicting: time is linear in rows, and memory does not follow the square."""
    taken = {}
    for n in (20_000, 80_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        rows = [(f"r{i}", f"{workspaces.WORDS[i % 10]} circle {i % 97}", workspaces.WORDS[i % 5 + 1]) for i in range(n)]
        (folder / "train.csv").write_text("\n".join(["id,text,labels", *map(",".join, rows)]) + "\n")
        (folder / "test.csv").write_text("id,text\nx,a red circle\n")
        text = workspaces.TABLE.format(name="mine").replace('image = "images/{id}.png"\n', "")
        (folder / "mine.toml").write_text(text)
        for args in (
            ("extract", "--dataset", "./mine.toml", "--encoder", "classic"),
            ("train-head", "--head", "linear", "--epochs", "2"),
            ("evaluate", "--split", "train", "--no-intervals"),
            ("predict", "--split", "train"),
            ("verify",),
            ("inspect",),
        ):
            ended = forks.run(*args, cwd=folder, timeout=600, memory=4_000_000_000, warm=n == 20_000)
            assert ended.code == 0, (args, ended)
            taken[n, args[0]] = ended.seconds, ended.peak
    for command in ("extract", "train-head", "evaluate", "predict", "verify", "inspect"):
        small, large = taken[20_000, command], taken[80_000, command]
        both = [f"{seconds:.1f} s and {peak / 1e6:,.0f} MB" for seconds, peak in (small, large)]
        print(f"{command}: {' then '.join(both)}")
        assert large[0] < 6 * small[0] + 2, command
        assert large[1] < 6 * small[1] + 50_000_000, command
