"""Modules that know no dataset: heads, losses, poolings, transformers. Naming them imports no torch."""

# Named here rather than beside their code, so that listing the choices does not import torch.
ACTIVATIONS = {"gelu": "torch.nn:GELU", "leaky_relu": "torch.nn:LeakyReLU", "relu": "torch.nn:ReLU"}
HEADS = {"gmlp": "cachefuse.nn.heads:GatedMLP", "linear": "cachefuse.nn.heads:Linear", "mlp": "cachefuse.nn.heads:MLP"}
LOSSES = {
    "asl": "cachefuse.nn.losses:asl",
    "bce": "cachefuse.nn.losses:bce",
    "ce": "cachefuse.nn.losses:cross_entropy",
    "focal": "cachefuse.nn.losses:focal",
}
POOLINGS = {
    "attention": "cachefuse.nn.pooling:AttentionPool",
    "max": "cachefuse.nn.pooling:MaxPool",
    "mean": "cachefuse.nn.pooling:MeanPool",
}
TARGETS = ("soft", "hard")  # of the contrastive loss
ATTENTION_HEADS = 4  # of the Deep Fusion Encoder's transformer block
