"""Build a model that a configuration describes, but only one that its weights can fill.

A configuration of 200,000 layers, or of 10^12 tokens, would take minutes or all memory before any weight is compared.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registries
from torch.utils._python_dispatch import TorchDispatchMode

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.model_files import Weights
from cachefuse.errors import EncoderError

# A model may have more than its file: a decoder or a pooler that is not used, and tensors that share their numbers.
TIMES = 4
MORE_TENSORS, MORE_MODULES, MORE_ELEMENTS = 1_000, 20_000, 1 << 27


class _Counter:
    """Counts what a thread's model has so far. Raises EncoderError as soon as its weights cannot fill it."""

    def __init__(self, spec: EncoderSpec, weights: Weights):
        self.spec, self.weights, self.thread = spec, weights, threading.get_ident()
        self.tensors = self.elements = self.modules = 0

    def on_tensor(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != self.thread:
            return
        if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
            return  # a value for what has been counted
        self.tensors += 1
        self.elements += tensor.numel()
        stored = self.weights
        self._check(self.tensors, TIMES * len(stored.shapes) + MORE_TENSORS, f"{len(stored.shapes):,} tensors")
        self.check_elements(self.elements)

    def on_module(self, module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is not None and threading.get_ident() == self.thread:
            self.modules += 1
            n = len(self.weights.shapes)
            self._check(self.modules, 10 * TIMES * n + MORE_MODULES, f"{n:,} tensors")

    def check_elements(self, elements: int) -> None:
        n = self.weights.n_elements
        self._check(elements, TIMES * n + MORE_ELEMENTS, f"{n:,} numbers")

    def _check(self, count: int, most: int, has: str) -> None:
        if count > most:
            raise EncoderError(
                f"cannot open {self.spec}: its configuration is of a much larger model than its weights, which have "
                f"{has}; put the configuration of the weights there"
            )


class _Sizes(TorchDispatchMode):
    """Refuses a tensor that is larger than the whole model may be before it takes any memory."""

    def __init__(self, counter: _Counter):
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        if isinstance(size, list | tuple) and all(type(n) is int for n in size):  # of empty, zeros, randn ...
            self.counter.check_elements(math.prod(size))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.counter.check_elements(out.numel())
        return out


@contextmanager
def no_larger_than(spec: EncoderSpec, weights: Weights) -> Iterator[None]:
    """Raise EncoderError as soon as a model that is built here has much more than the weights."""
    counter = _Counter(spec, weights)
    with ExitStack() as stack:
        for register, hook in (
            (registries.register_module_parameter_registration_hook, counter.on_tensor),
            (registries.register_module_buffer_registration_hook, counter.on_tensor),
            (registries.register_module_module_registration_hook, counter.on_module),
        ):
            stack.callback(register(hook).remove)
        stack.enter_context(_Sizes(counter))
        yield


def check_floats(spec: EncoderSpec, weights: Weights, model: nn.Module) -> None:
    """Raise EncoderError if integers are stored where a model has floats: libraries cast them, without any scale.

    Names are compared from their ends, since files and models may have prefixes.
    """
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    ends = {end for name in floats for end in _ends(name)}
    for name, dtype in weights.integers.items():
        if name in ends or not floats.isdisjoint(_ends(name)):
            raise EncoderError(
                f"cannot open {spec}: {name} is stored as integers ({dtype}), and the model has floats there; "
                f"quantised weights are not read: put the weights in float16 or float32 there"
            )


def _ends(name: str) -> list[str]:
    """Return a name without its first 0, 1, 2, ... parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
