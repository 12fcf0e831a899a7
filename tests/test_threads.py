"""The number of threads follows what is idle, unless a person fixes it."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from cachefuse import threads
from cachefuse.errors import ConfigError
from cachefuse.fusion.base import Model
from cachefuse.threads import adapt_threads, fixed_threads, idle_threads, n_cores, n_idle_cores, same_threads
from cachefuse.training.batches import Batches
from cachefuse.training.loop import Optimization, fit
from fixtures.messages import naming


@pytest.fixture(autouse=True)
def by_what_is_idle(monkeypatch):
    """As a person finds it: nothing is fixed, and nobody has looked yet; torch would take two threads."""
    for name in ("CACHEFUSE_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads.set_threads(None)
    monkeypatch.setattr(threads, "_last", None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    threads.set_threads(None)


@pytest.fixture
def allow(monkeypatch, tmp_path):
    """Return ``allow(cores, quota)``: this process may use so many cores, and so many cores' time."""

    def allow(cores, quota=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        (tmp_path / "own").write_text("0::/\n")
        if quota:
            (tmp_path / "cpu.max").write_text(f"{quota * 100_000} 100000")
        monkeypatch.setattr(threads, "CGROUPS", tmp_path)
        monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "own")

    return allow


@pytest.fixture
def idle(monkeypatch):
    """Return a list of the numbers of idle cores to find, one look after another; the last one stays."""
    numbers = []
    monkeypatch.setattr(threads, "n_cores", lambda: 8)
    monkeypatch.setattr(threads, "n_idle_cores", lambda oldest_look: numbers.pop(0) if len(numbers) > 1 else numbers[0])
    return numbers


class TestFixed:
    def test_by_nobody(self):
        assert fixed_threads() is None

    def test_by_the_environment(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert fixed_threads() == 2  # what torch has
        monkeypatch.setenv("CACHEFUSE_THREADS", "5")
        assert fixed_threads() == 5
        monkeypatch.setenv("CACHEFUSE_THREADS", "")
        assert fixed_threads() == 2

    def test_by_a_call(self, monkeypatch):
        monkeypatch.setenv("CACHEFUSE_THREADS", "5")
        threads.set_threads(3)
        assert fixed_threads() == 3
        threads.set_threads(None)
        assert fixed_threads() == 5

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "100000", "99999999999999999999"])
    def test_no_number(self, monkeypatch, value):
        monkeypatch.setenv("CACHEFUSE_THREADS", value)
        with pytest.raises(ConfigError, match=naming(f"CACHEFUSE_THREADS 1 512 {value}")):
            fixed_threads()

    @pytest.mark.parametrize("value", [0, 2.7, math.inf, []])
    def test_none_at_all(self, value):
        with pytest.raises(ConfigError, match=naming("threads 1 512")):
            threads.set_threads(value)

    def test_is_more_than_what_is_idle(self, idle):
        idle[:] = [1]
        threads.set_threads(4)
        with idle_threads():
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 2


class TestIdle:
    def test_for_a_block(self, idle):
        idle[:] = [1, 2, 1]
        with idle_threads():
            assert torch.get_num_threads() == 1
            assert adapt_threads() == torch.get_num_threads() == 2
            assert adapt_threads() == torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2

    def test_no_more_than_torch_would_take(self, idle):
        idle[:] = [8]
        with idle_threads():
            assert torch.get_num_threads() == 2

    def test_a_block_in_a_block_changes_nothing(self, idle):
        idle[:] = [1, 2]
        with idle_threads():
            with idle_threads():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
            assert adapt_threads() == 2

    def test_after_an_error(self, idle):
        idle[:] = [1]
        for _ in range(2):
            with pytest.raises(ConfigError), idle_threads():
                raise ConfigError
            assert torch.get_num_threads() == 2

    def test_what_is_compared_takes_the_same(self, idle):
        idle[:] = [1, 2]
        with same_threads():
            assert adapt_threads() == 1
        with idle_threads():
            assert torch.get_num_threads() == 2

    def test_epochs_say_theirs(self, idle):
        idle[:] = [2, 1, 2, 1, 2]
        history = fit(*small_training(), epochs=3)
        assert [epoch.threads for epoch in history.epochs] == [1, 2, 1]
        assert torch.get_num_threads() == 2


class TestPythonThreads:
    def test_a_new_one_has_the_usual_number_afterwards(self, idle):
        idle[:] = [1, 2]

        def work():
            with idle_threads():
                first = torch.get_num_threads()
            return first, torch.get_num_threads()

        with ThreadPoolExecutor(1) as pool:
            with idle_threads():
                assert pool.submit(work).result() == (2, 2)
            idle[:] = [2]
            assert pool.submit(work).result() == (2, 2)
        assert torch.get_num_threads() == 2

    def test_what_is_compared_in_two_at_once(self, idle):
        idle[:] = [1]
        meeting = threading.Barrier(2, timeout=60)

        def work(first):
            with same_threads():
                meeting.wait()
                if first:
                    meeting.wait()
            if not first:
                meeting.wait()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, [True, False]))
        assert fixed_threads() is None


def small_training():
    """Return what ``fit`` takes: a linear model, loss, batches of 4 rows and an optimizer."""
    import numpy as np

    from cachefuse.feature_spec import pooled_specs
    from cachefuse.training.feature_table import FeatureTable

    class Linear(Model):
        def __init__(self):
            super().__init__()
            self.specs = pooled_specs({"image": 3})
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, features, present):
            return self.layer(features["image"])

    n = 8
    table = FeatureTable(
        features={"image": torch.randn(n, 3)},
        specs=pooled_specs({"image": 3}),
        present={"image": torch.ones(n, dtype=torch.bool)},
        targets=torch.ones(n, 2, dtype=torch.uint8),
        labelled=np.ones(n, bool),
        splits=np.array(["train"] * n),
    )
    model = Linear()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return (
        model,
        lambda logits, targets: loss(logits, targets.float()),
        Batches(table, torch.arange(n), 4, torch.Generator()),
        Optimization(torch.optim.SGD(model.parameters(), 0.1)),
    )


class TestLooking:
    """What a look makes of the times that the system counts."""

    @pytest.fixture
    def system(self, monkeypatch):
        """The system's counters: seconds now, and the seconds that others had; sleep takes no time."""
        system = SimpleNamespace(now=100.0, others=50.0)
        times = SimpleNamespace(user=0.0, system=0.0)
        monkeypatch.setattr(time, "monotonic", lambda: system.now)
        monkeypatch.setattr(time, "sleep", lambda seconds: setattr(system, "now", system.now + seconds))
        monkeypatch.setattr(os, "times", lambda: times)
        monkeypatch.setattr("psutil.cpu_times", lambda percpu: [SimpleNamespace(user=system.others, system=0.0)])
        return system

    def look(self, system, busy):
        """Return the idle cores where others had ``busy`` cores' time, in each of some intervals of a second."""
        n_idle_cores()
        found = []
        for had in busy:
            system.now, system.others = system.now + 1, system.others + had
            found.append(n_idle_cores())
        return found

    def test_others_take_cores(self, system, allow):
        allow(4)
        assert self.look(system, [0, 0.2, 0.5, 1, 2, 3, 4, 9, 0]) == [4, 4, 3, 3, 2, 1, 1, 1, 4]

    def test_a_quota_is_less_than_what_is_idle(self, system, allow):
        allow(64, quota=4)
        assert self.look(system, [30, 62, 63]) == [4, 2, 1]

    @pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, NotImplementedError, ValueError])
    def test_where_the_load_can_not_be_seen(self, monkeypatch, error):
        def refuse(**options):
            raise error("no")

        monkeypatch.setattr("psutil.cpu_times", refuse)
        assert n_idle_cores() == n_cores()

    def test_time_that_the_system_counts_late(self, system, allow):
        """Own time is counted more finely, so that others may seem to have had less than none."""
        allow(4)
        assert self.look(system, [-0.3, 0.0]) == [4, 4]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # what it warns of is what is tried
    def test_a_process_forked_while_a_thread_looks(self, monkeypatch):
        looking = threading.Event()

        def sleep(seconds):
            looking.set()
            forked.wait(60)

        forked = threading.Event()
        monkeypatch.setattr(time, "sleep", sleep)
        thread = threading.Thread(target=n_idle_cores, args=(1.0,))
        thread.start()
        assert looking.wait(60)
        child = os.fork()
        forked.set()
        if not child:
            signal.alarm(60)  # ends a child that waits for the thread, which it does not have
            n_idle_cores(0.0)
            os._exit(0)
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_an_old_look_says_nothing_of_now(self, system, allow, monkeypatch):
        def sleep(seconds):
            """Others have two cores."""
            system.now, system.others = system.now + seconds, system.others + 2 * seconds

        allow(4)
        n_idle_cores()
        system.now, system.others = system.now + 900, system.others + 3600
        monkeypatch.setattr(time, "sleep", sleep)
        assert n_idle_cores(oldest_look=1.0) == 2

    def test_a_look_a_moment_ago_is_kept(self, system, allow):
        allow(4)
        assert self.look(system, [2]) == [2]
        system.now, system.others = system.now + 0.05, system.others + 9
        assert n_idle_cores() == 2

    def test_at_this_machine(self):
        assert 1 <= n_idle_cores() <= n_cores() <= os.cpu_count()

    def test_beside_busy_processes(self):
        """However busy the machine is otherwise, none of these cores is idle."""
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])  # they end with the test
            for _ in range(n_cores() + 2)
        ]
        try:
            time.sleep(0.5)
            found = [n_idle_cores(oldest_look=0) for _ in range(3)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        assert sorted(found)[1] == 1


class TestCores:
    @pytest.mark.parametrize(
        ("files", "group", "cores"),
        [
            ({}, "0::/\n", 8),
            ({"cpu.max": "max 100000"}, "0::/\n", 8),
            ({"cpu.max": "250000 100000"}, "0::/\n", 2),
            ({"cpu.max": "50000 100000"}, "0::/\n", 1),
            ({"cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 3),
            ({"cpu.max": "400000 100000", "other/cpu.max": "100000 100000"}, "0::/a\n", 4),
            ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/x\n0::/\n", 3),
            ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", 8),
            ({"cpu.max": "what"}, "0::/\n", 8),
            ({"cpu.max": ""}, "0::/\n", 8),
            ({"cpu.max": "1 2 3"}, "0::/\n", 8),
            ({"cpu.max": "300000 100000"}, "0::/../..\n", 3),
            ({"cpu.max": "300000 100000"}, "\0\n0::/\0\n", 3),
            (
                {"cpu/docker/x/cpu.cfs_quota_us": "200000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
                "9:memory:/y\n4:cpu,cpuacct:/docker/x\n",
                2,
            ),
        ],
    )
    def test_of_a_container(self, tmp_path, allow, files, group, cores):
        allow(8)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "own").write_text(group)
        assert n_cores() == cores

    def test_without_control_groups(self, tmp_path, monkeypatch):
        monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "missing")
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        assert n_cores() == os.cpu_count()

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
    def test_of_a_process_that_is_pinned(self):
        core = min(os.sched_getaffinity(0))
        code = f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        code += "from cachefuse.threads import *; print(n_cores(), n_idle_cores())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["1", "1"]
