"""The base class of fusions: features of any number of modalities to logits; any row may lack any modality.

Features have names such as "image_tokens": see ``feature_name``. Their specs describe them; no name is parsed.
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
from cachefuse.printable import listed
from cachefuse.registry import Options

# (width, classes) -> a head from (B, width) to (B, classes). For T tokens side by side, n_tokens=T is given too.
HeadBuilder = Callable[..., nn.Module]


class Model(nn.Module):
    """Map features and presence masks to logits (B, C) and to a loss."""

    weighs: bool = False  # whether the model has ``weights``: the weight of each modality in each row

    def objective(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor, loss: Loss) -> Tensor:
        """Return the loss of a batch. A model may compute it without all the logits."""
        logits = self(features, present)
        return loss(logits if logits.dtype == torch.float64 else logits.float(), targets)


class Fusion(Model):
    """Map features and presence masks to logits (B, C).

    Pooled features are (B, D) with presence (B,) bool. Tokens are (B, T, D) and ids (B, T), both with a mask (B, T)
    bool: True for real tokens, False for padding and for rows that lack the modality. The argument ``specs`` lists the
    available features by name. The attribute ``specs`` holds the features in use, by modality in alphabetical order:
    the order of the argument makes no difference. Keyword-only arguments of the constructor are the fusion's options,
    each with its help: ``depth: Annotated[int, "transformer blocks"] = 2``. Raises ConfigError if a feature is missing.
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...] | None] = None  # None: all available ones
    parts: ClassVar[tuple[str, ...]] = ()  # the parts that an ablation can leave out
    linear: ClassVar[bool] = False  # whether all weights outside the heads are in linear layers
    mixed_precision: ClassVar[bool] = False  # whether bfloat16 on CUDA makes it faster, as for transformers
    stages: ClassVar[tuple[str, ...]] = ()  # the stages of its training, in order
    optional_views: ClassVar[tuple[str, ...]] = ()  # views that are read only where there are any
    solved: ClassVar[bool] = False  # whether ``solve`` computes the weights, without a head and an optimizer
    solver: ClassVar[str] = ""  # if so: what stands for the head in names
    per_task: ClassVar[bool] = False  # whether it takes ``tasks``, {name: classes}, and has parts for each task
    defaults: ClassVar[Options] = {}  # training settings of its own

    def __init__(
        self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder, options: Options | None = None
    ):
        """``options`` holds the options that decide which views are read."""
        super().__init__()
        used = modalities_of(specs.values()) if self.modalities is None else self.modalities
        views = {(feature_name(m, view), m): view for m in used for view in self.views(m, options or {})}
        there = [(name, m) for name, m in views if name in specs and specs[name].modality == m]
        missing = [name for (name, m), v in views.items() if (name, m) not in there and v not in self.optional_views]
        names = [name for name, _ in there]
        if missing or not names:
            raise ConfigError(
                f"fusion {self.name!r} needs {' and '.join(missing) or 'some'} features; "
                f"this store has: {listed(sorted(specs)) or 'none'}"
            )
        self.specs = {name: specs[name] for name in names}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        """Return the views of a modality that the fusion reads with these options."""
        return (POOLED,)

    @classmethod
    def options(cls) -> Options:
        """Return the options with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        others = ("tasks", "ablate")  # the dataset gives tasks; ablate is a training setting
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others}

    @classmethod
    def resolve_options(cls, options: Options, origins: Mapping[str, Origin], classes: Sequence[str]) -> Options:
        """Return the options, completed with those that depend on files, classes or the features' encoders."""
        return dict(options)

    @classmethod
    def is_generative(cls, options: Options) -> bool:
        """Return whether the fusion writes class names with these options. Its logits are then log-probabilities."""
        return False

    def initialize(self) -> None:
        """Load pretrained weights, if the fusion has any, before training."""

    def trained_in(self, stage: str) -> Iterable[nn.Parameter]:
        """Return the parameters that one of the ``stages`` trains; the others are frozen."""
        return self.parameters()

    def weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return the weight of each modality in each row, (B, M) in alphabetical order; (B, K, M) for K tasks.

        Only fusions with ``weighs`` have it.
        """
        raise NotImplementedError(f"fusion {self.name!r} has no weights of modalities")

    def unimodal_heads(self) -> "dict[str, nn.Module]":
        """Return the heads that the staged scheme trains first, each alone on the labels; {} for a single head.

        Each head maps features and presence masks to logits (B, C), as the fusion does.
        """
        return {}


def joint_width(specs: Mapping[str, FeatureSpec]) -> int:
    """Return the width of joined features: see ``join``."""
    return sum(spec.width for spec in specs.values())


def joint_head(specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder) -> nn.Module:
    """Build a head on joined features. A head on one modality's flat tokens gets their number ``n_tokens``."""
    first, *others = specs.values()
    tokens = {"n_tokens": first.n_tokens} if first.n_tokens and not others else {}
    return head(joint_width(specs), classes, **tokens)


def join(features: Mapping[str, Tensor], present: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return [x_1; ...; x_M] of the named modalities, (B, D_1 + ... + D_M), with 0 in absent rows."""
    first, *others = [zero_absent(features[m], present[m]) for m in names]
    # torch.cat would copy a single feature, which takes as long as a linear head's product.
    return torch.cat([first, *others], dim=-1) if others else first
