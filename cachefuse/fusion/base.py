"""What a fusion is: any number of modalities' features, some absent in some rows, to logits.

Features go by name ("image", "image_tokens"): see ``feature_name``. What they are, their specs say; no name is parsed.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cachefuse.encoders.base import Origin
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import POOLED, FeatureSpec, feature_name, modalities_of
from cachefuse.nn.losses import Loss
from cachefuse.nn.masking import zero_absent
from cachefuse.registry import Options

# (width, classes) -> a head from (B, width) to (B, classes); a width of tokens side by side comes with n_tokens=T.
HeadBuilder = Callable[..., nn.Module]


class Model(nn.Module):
    """From features and what is present of them to logits (B, C), and to what training makes small."""

    weighs: bool = False  # whether it has ``weights`` to show: how much each modality counts in each row

    def objective(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor, loss: Loss) -> Tensor:
        """Return the loss of a batch; a model may have a shorter way to it than by all its logits."""
        return loss(self(features, present).float(), targets)


class Fusion(Model):
    """From features and what is present of them to logits (B, C).

    Pooled features are (B, D) with presence (B,) bool; tokens are (B, T, D), ids (B, T), both with a mask (B, T) bool
    of what is neither padding nor of a row that lacks the modality. ``specs`` say which are at hand, by name. The
    attribute ``specs`` keeps those in use, by modality in alphabetical order, so that a model does not depend on the
    order they are listed in. Keyword-only arguments of a constructor are the fusion's options; each says what it is,
    ``depth: Annotated[int, "transformer blocks"] = 2``. Raises ConfigError if a modality needed is not there.
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...] | None] = None  # None: all that are given
    parts: ClassVar[tuple[str, ...]] = ()  # that can be left out, to see what they are good for
    linear: ClassVar[bool] = False  # whether all weights but the heads' are in linear layers
    mixed_precision: ClassVar[bool] = False  # whether it is worth bfloat16 on CUDA, as transformers are
    stages: ClassVar[tuple[str, ...]] = ()  # in which it can be trained, in their order
    per_task: ClassVar[bool] = False  # whether it takes ``tasks``, {name: classes}, to have parts for each of several
    defaults: ClassVar[Options] = {}  # settings of a training that differ from those of the others

    def __init__(
        self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder, options: Options | None = None
    ):
        """``options`` are those that decide on the views to read."""
        super().__init__()
        used = modalities_of(specs.values()) if self.modalities is None else self.modalities
        names = {feature_name(m, view): m for m in used for view in self.views(m, options or {})}
        missing = [name for name, m in names.items() if name not in specs or specs[name].modality != m]
        if missing or not names:
            raise ConfigError(
                f"fusion {self.name!r} needs {' and '.join(missing) or 'some'} features; "
                f"this store has: {', '.join(sorted(specs)) or 'none'}"
            )
        self.specs = {name: specs[name] for name in names}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        """Return the views that are read of a modality, with such options."""
        return (POOLED,)

    @classmethod
    def options(cls) -> Options:
        """Return the options with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        others = ("tasks", "ablate")  # which have settings of their own, or are the dataset's
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others}

    @classmethod
    def resolve_options(cls, options: Options, origins: Mapping[str, Origin], classes: Sequence[str]) -> Options:
        """Return options with those filled in that depend on files, the classes, or where features are from."""
        return dict(options)

    @classmethod
    def is_generative(cls, options: Options) -> bool:
        """Return whether it writes the classes' names, with such options: its logits are then log-probabilities."""
        return False

    def initialize(self) -> None:
        """Take pretrained weights, where there are any, before training."""

    def trained_in(self, stage: str) -> Iterable[nn.Parameter]:
        """Return the parameters that one of its ``stages`` trains; the others are frozen in it."""
        return self.parameters()

    def weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return how much each modality counts in each row, (B, M) in alphabetical order; of K tasks (B, K, M).

        For a fusion that says so by ``weighs``.
        """
        raise NotImplementedError(f"fusion {self.name!r} does not weigh modalities")

    def unimodal_heads(self) -> "dict[str, nn.Module]":
        """Return the heads that the staged scheme trains first, each alone against the labels; none if there is one.

        Each is a module from features and presence to logits (B, C), as the fusion is.
        """
        return {}


def joint_width(specs: Mapping[str, FeatureSpec]) -> int:
    """Return the width of what ``join`` makes of features."""
    return sum(spec.width for spec in specs.values())


def joint_head(specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder) -> nn.Module:
    """Build a head on what ``join`` makes of features; that of one modality's flat tokens is told how many they are."""
    first, *others = specs.values()
    tokens = {"n_tokens": first.n_tokens} if first.n_tokens and not others else {}
    return head(joint_width(specs), classes, **tokens)


def join(features: Mapping[str, Tensor], present: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return [x_1; ...; x_M] of the named modalities, (B, D_1 + ... + D_M), with absent rows of each set to 0."""
    first, *others = [zero_absent(features[m], present[m]) for m in names]
    # To concatenate one would copy it, and that takes as long as a linear head's product.
    return torch.cat([first, *others], dim=-1) if others else first
