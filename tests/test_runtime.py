import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefuse.device import own_randomness, resolve_device, seed_everything
from cachefuse.errors import ConfigError
from cachefuse.files import slug, to_json, write_atomically
from cachefuse.workspace import Workspace


def test_workspace_paths(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.data("mine") == tmp_path / "data/mine"
    assert workspace.store("mine") == tmp_path / "cache/mine.zarr"
    assert workspace.runs == tmp_path / "runs"
    assert workspace.stores == []
    assert list(tmp_path.iterdir()) == []
    for name in ("b", "a"):
        workspace.store(name).mkdir(parents=True)
    assert workspace.stores == [workspace.store("a"), workspace.store("b")]
    assert Workspace().root == Path("workspace")


def test_device_on_a_machine_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == "cpu"
    assert resolve_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"^device '{name}' was asked for, but there is none here; use --device "):
            resolve_device(name)


def test_device_on_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"^device 'cuda:2' was asked for, but there is none here"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "CPU"])
def test_unknown_device(name):
    with pytest.raises(ConfigError, match=f"^unknown device '{name}'; choose from: auto, cpu, cuda, cuda:0$"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_unsupported_device(name):
    with pytest.raises(ConfigError, match=f"^device '{name}' is not supported; choose from: auto, cpu, cuda, cuda:0$"):
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
