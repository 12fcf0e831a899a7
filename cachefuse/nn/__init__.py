"""Modules that know no dataset: heads, losses, poolings, transformers. Naming them imports no torch."""

from cachefuse.registry import Registry

# Named here rather than beside their code, so that listing the choices does not import torch.
ACTIVATIONS = Registry(
    "activation",
    "cachefuse.activations",
    {"gelu": "torch.nn:GELU", "leaky_relu": "torch.nn:LeakyReLU", "relu": "torch.nn:ReLU"},
    base="torch.nn:Module",
)
HEADS = Registry(
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
LOSSES = Registry(
    "loss",
    "cachefuse.losses",
    {
        "asl": "cachefuse.nn.losses:asl",
        "bce": "cachefuse.nn.losses:bce",
        "ce": "cachefuse.nn.losses:cross_entropy",
        "focal": "cachefuse.nn.losses:focal",
    },
    takes="logits, targets, *, reduction",
)
POOLINGS = Registry(
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
TARGETS = ("soft", "hard")  # of the contrastive loss
ATTENTION_HEADS = 4  # of the Deep Fusion Encoder's transformer block
