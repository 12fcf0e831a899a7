"""Modules by names that users choose."""

from torch import nn


class NamedModules(nn.ModuleDict):
    """Modules by any name, even the name of a method of ``nn.Module``, such as "values" or "type"."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module
