"""Modules by names that users choose."""

from typing import Any

from torch import nn


class NamedModules(nn.ModuleDict):
    """Modules by any name, even the name of a method of ``nn.Module``, such as "values" or "type"."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):  # such as ``training``, which is no module even where one has this name
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)
