"""Registries are plain dictionaries from a name to an object, or to "module:attribute" where importing it is costly."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from cachefuse.errors import UnknownNameError

# Named here rather than beside their code, so that listing the choices does not import torch.
ACTIVATIONS = {"gelu": "torch.nn:GELU", "leaky_relu": "torch.nn:LeakyReLU", "relu": "torch.nn:ReLU"}
HEADS = {"gmlp": "cachefuse.heads:GatedMLP", "linear": "cachefuse.heads:Linear", "mlp": "cachefuse.heads:MLP"}
LOSSES = {
    "asl": "cachefuse.losses:asl",
    "bce": "cachefuse.losses:bce",
    "ce": "cachefuse.losses:cross_entropy",
    "focal": "cachefuse.losses:focal",
}
OPTIMIZERS = {
    "adam": "cachefuse.training.optim:adam",
    "adamw": "cachefuse.training.optim:adamw",
    "lbfgs": "cachefuse.training.optim:LBFGS",
    "sgd": "cachefuse.training.optim:NesterovSGD",
}
SCHEDULES = {
    "constant": "cachefuse.training.optim:constant",
    "cosine": "cachefuse.training.optim:cosine",
    "onecycle": "cachefuse.training.optim:onecycle",
}


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return ``table[name]``, importing it first if the entry is a "module:attribute" string.

    Raises UnknownNameError with the choices, closest first in a suggestion, if the name is not there.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownNameError(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(sorted(table))}")
    return resolve(table[name])


def resolve(entry: Any) -> Any:
    """Import what a "module:attribute" string names; anything else is returned as it is."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
