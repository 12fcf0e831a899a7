"""Modules by any name, also by the names of what every module of torch has."""

import copy

import pytest
import torch
from torch import nn

from cachefuse.nn.named import NamedModules

NAMES = sorted({*dir(NamedModules()), *vars(NamedModules()), "image", "user_ids", "a b", "ü"})


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_any_name_works_as_any_other(name):
    torch.manual_seed(0)
    modules = NamedModules({name: nn.Dropout(0.5), "other": nn.Linear(2, 1)})
    assert list(modules) == [name, "other"]
    assert isinstance(modules[name], nn.Dropout)
    for mode in (True, False):
        modules.train(mode)
        assert [modules.training, modules[name].training] == [mode, mode]
    modules = NamedModules({name: nn.Linear(2, 1)})
    assert list(modules.state_dict()) == [f"{name}.weight", f"{name}.bias"]
    twin = copy.deepcopy(modules).eval().requires_grad_(False).double()
    assert twin[name].weight.dtype == torch.float64
    twin.load_state_dict({key: value + 1 for key, value in modules.state_dict().items()})
    x = torch.ones(3, 2)
    torch.testing.assert_close(twin.float()[name](x), modules[name](x) + 3)
    assert [key for key, _ in modules.named_parameters()] == list(modules.state_dict())
