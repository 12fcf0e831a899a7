"""Modules that do not depend on a dataset: heads, losses, poolings, transformers. The registries import no torch."""

from typing import TYPE_CHECKING, Protocol

from cachefuse.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class HeadClass(Protocol):
    """A head's class, or a function with the same attribute that builds it."""

    default_layers: tuple[int, ...]

    def __call__(
        self, width: int, classes: int, *, layers: tuple[int, ...], activation: str, dropout: float
    ) -> "nn.Module": ...


# The registries are apart from the code: listing the choices must not import torch.
ACTIVATIONS: "Registry[type[nn.Module]]" = Registry(
    "activation",
    "cachefuse.activations",
    {"gelu": "torch.nn:GELU", "leaky_relu": "torch.nn:LeakyReLU", "relu": "torch.nn:ReLU"},
    base="torch.nn:Module",
)
HEADS: "Registry[HeadClass]" = Registry(
    "head",
    "cachefuse.heads",
    {
        "gmlp": "cachefuse.nn.heads:GatedMLP",
        "linear": "cachefuse.nn.heads:Linear",
        "mlp": "cachefuse.nn.heads:MLP",
    },
    base="torch.nn:Module",
    has=("default_layers",),
    takes="width, classes, *, layers, activation, dropout",
)
LOSSES: "Registry[Callable[..., Tensor]]" = Registry(
    "loss",
    "cachefuse.losses",
    {
        "asl": "cachefuse.nn.losses:asl",
        "bce": "cachefuse.nn.losses:bce",
        "ce": "cachefuse.nn.losses:cross_entropy",
        "focal": "cachefuse.nn.losses:focal",
    },
    takes="logits, targets, *, reduction",
    probe="cachefuse.nn.losses:probe_loss",
)
POOLINGS: "Registry[type[nn.Module]]" = Registry(
    "pooling",
    "cachefuse.poolings",
    {
        "attention": "cachefuse.nn.pooling:AttentionPool",
        "max": "cachefuse.nn.pooling:MaxPool",
        "mean": "cachefuse.nn.pooling:MeanPool",
    },
    base="torch.nn:Module",
    takes="width, n_tokens",
)
TARGETS = ("soft", "hard", "printed")  # of the contrastive loss
ATTENTION_HEADS = 4  # of the Deep Fusion Encoder's transformer block
