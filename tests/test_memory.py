import threading
import time

import pytest

from cachefuse import memory
from cachefuse.errors import BadSampleError
from cachefuse.limits import Limits, limited
from fixtures.messages import naming


@pytest.fixture(autouse=True)
def small():
    with limited(Limits(memory=100)):
        yield
    assert memory.budget().used == 0


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_sample_holds_its_need_until_its_end():
    with memory.one_sample():
        with memory.one_sample():
            memory.reserve(60)
        assert memory.budget().used == 60
        memory.reserve(80)  # in place of the 60
        assert memory.budget().used == 80
    assert memory.budget().used == 0


def test_an_error_gives_everything_back():
    def work():
        with memory.one_sample():
            memory.reserve(60)
            memory.reserve_now(101)

    with pytest.raises(BadSampleError):
        work()
    assert memory.budget().used == 0


def test_what_does_not_fit_waits_in_its_order():
    done = []

    def take(name, n_bytes):
        with memory.one_sample():
            memory.reserve(n_bytes)
            done.append(name)

    with memory.one_sample():
        memory.reserve(60)
        threads = [in_thread(lambda: take("large", 100))]
        wait_for(lambda: len(memory.budget()._waiting) == 1)
        threads.append(in_thread(lambda: take("small", 40)))  # would fit, but the large one came first
        wait_for(lambda: len(memory.budget()._waiting) == 2)
        assert not memory.reserve_now(61)
        assert done == []
    for thread in threads:
        thread.join(20)
    assert done == ["large", "small"]


def test_many_threads_never_hold_more_than_the_limit():
    most = []

    def work(seed):
        for i in range(50):
            with memory.one_sample():
                if not memory.reserve_now((seed * 7 + i) % 50):
                    memory.reserve((seed * 13 + i * 3) % 100)
                most.append(memory.budget().used)

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(8)]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert max(most) <= 100


def test_more_than_the_limit_would_wait_for_ever():
    with memory.one_sample(), pytest.raises(BadSampleError, match=naming("101 B memory --memory")):
        memory.reserve(101)


def test_reserving_outside_of_a_sample_would_never_be_given_back():
    with pytest.raises(RuntimeError, match="one_sample"):
        memory.reserve(1)
