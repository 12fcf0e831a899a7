"""What a fusion is: any number of modalities' features, some absent in some rows, to logits."""

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError

HeadBuilder = Callable[[int, int], nn.Module]  # (width, classes) -> a head from (B, width) to (B, classes)


class Fusion(nn.Module):
    """From features {modality: (B, D_m)} and present {modality: (B,) bool} to logits (B, C).

    ``widths`` are the D_m at hand by modality; the attribute ``widths`` keeps those in use, in alphabetical order, so
    that a model does not depend on the order they are listed in. Raises ConfigError if a modality needed is not there.
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...] | None] = None  # None: all that are given

    def __init__(self, widths: dict[str, int], classes: int, head: HeadBuilder):
        super().__init__()
        used = sorted(widths) if self.modalities is None else self.modalities
        missing = [modality for modality in used if modality not in widths]
        if missing or not used:
            raise ConfigError(
                f"fusion {self.name!r} needs {' and '.join(missing) or 'some'} features; "
                f"this store has: {', '.join(sorted(widths)) or 'none'}"
            )
        self.widths = {modality: widths[modality] for modality in used}

    def alone(self) -> "dict[str, nn.Module]":
        """Return the heads that the staged scheme trains first, each alone against the labels; none if there is one.

        Each is a module from features and presence to logits (B, C), as the fusion is.
        """
        return {}


def joint_width(widths: Mapping[str, int]) -> int:
    """Return the width of what ``join`` makes of features; that of one modality alone, which may know its tokens."""
    first, *others = widths.values()
    return first + sum(others) if others else first


def join(features: Mapping[str, Tensor], present: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return [x_1; ...; x_M] of the named modalities, (B, D_1 + ... + D_M), with absent rows of each set to 0."""
    first, *others = [zero_absent(features[m], present[m]) for m in names]
    # To concatenate one would copy it, and that takes as long as a linear head's product.
    return torch.cat([first, *others], dim=-1) if others else first


def zero_absent(x: Tensor, present: Tensor) -> Tensor:
    """Set the absent rows of ``x`` (..., B, D) to 0; ``present`` is (B,) bool."""
    if present.device.type == "cpu" and present.all():  # a copy less; on a GPU to ask would be to wait
        return x
    # Filled, not multiplied: whatever an absent row holds, NaN included, stays out of the logits and the gradients.
    return x.masked_fill(~present.unsqueeze(-1), 0)
