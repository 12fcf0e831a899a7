import random

import numpy as np
import pytest
import torch

from cachefuse.device import own_randomness, resolve_device, seed_everything
from cachefuse.errors import ConfigError
from fixtures.messages import naming


def test_device_on_a_machine_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == "cpu"
    assert resolve_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=naming(f"device {name} --device")):
            resolve_device(name)


def test_device_on_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=naming("device cuda:2")):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "CPU"])
def test_unknown_device(name):
    with pytest.raises(ConfigError, match=naming(f"device {name} auto cpu cuda cuda:0")):
        resolve_device(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_unsupported_device(name):
    with pytest.raises(ConfigError, match=naming(f"device {name} auto cpu cuda cuda:0")):
        resolve_device(name)


@pytest.mark.parametrize("seed", [0, 2**40, -1])
def test_the_same_seed_gives_the_same_numbers(seed):
    def draw():
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw()
    assert draw() == first
    seed_everything(seed + 1)
    assert random.random() != first[0]


def test_random_state_is_given_back_after_an_error_too():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(1)
    expected = draw()
    seed_everything(1)
    drawn = []

    @own_randomness()
    def fail():
        seed_everything(2)
        drawn.append(draw())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert drawn[0] != expected
    assert draw() == expected
