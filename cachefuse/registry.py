"""Registries are plain dictionaries from a name to an object, or to "module:attribute" where importing it is costly."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from cachefuse.errors import UnknownNameError

# What a store has of a modality: a vector a sample, vectors of its tokens, or their numbers; and as a training may read
# tokens, side by side in place of a vector.
POOLED, TOKENS, IDS, FLAT = "pooled", "tokens", "ids", "flat"

# Named here rather than beside their code, so that listing the choices does not import torch.
ACTIVATIONS = {"gelu": "torch.nn:GELU", "leaky_relu": "torch.nn:LeakyReLU", "relu": "torch.nn:ReLU"}
HEADS = {"gmlp": "cachefuse.heads:GatedMLP", "linear": "cachefuse.heads:Linear", "mlp": "cachefuse.heads:MLP"}
LOSSES = {
    "asl": "cachefuse.losses:asl",
    "bce": "cachefuse.losses:bce",
    "ce": "cachefuse.losses:cross_entropy",
    "focal": "cachefuse.losses:focal",
}
METHODS = {"dfe": "cachefuse.fusion.dfe:DeepFusionEncoder", "projection": "cachefuse.fusion.dfe:ProjectionEncoder"}
OPERATIONS = {
    "add": "cachefuse.fusion.dfe:Add",
    "additive-attention": "cachefuse.fusion.dfe:AdditiveAttention",
    "concat": "cachefuse.fusion.dfe:Concat",
    "dot-attention": "cachefuse.fusion.dfe:DotAttention",
    "mul": "cachefuse.fusion.dfe:Multiply",
}
POOLINGS = {
    "attention": "cachefuse.fusion.pooling:AttentionPool",
    "max": "cachefuse.fusion.pooling:MaxPool",
    "mean": "cachefuse.fusion.pooling:MeanPool",
}
TARGETS = ("soft", "hard")  # of the contrastive loss
ATTENTION_HEADS = 4  # of the Deep Fusion Encoder's transformer block
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
MEAN = "mean"  # of several tasks' main metrics
METRIC_TITLES = {
    "micro_f1": "micro-F1", "macro_f1": "macro-F1", "samples_f1": "samples-F1", "weighted_f1": "weighted-F1",
    "macro_ap": "macro-AP", "micro_ap": "micro-AP", "accuracy": "accuracy", "exact_match": "exact match",
    "top5_accuracy": "top-5 accuracy", "recall_at_p90": "R@P90", "calibration_error": "ECE",
    "top_calibration_error": "ECE (top)", "vqa_accuracy": "VQA accuracy",
}  # fmt: skip


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


def metric_title(name: str) -> str:
    """Return what tables call a metric; that of one of several tasks begins with its name."""
    task, _, metric = name.rpartition(".")
    return f"{task} {METRIC_TITLES.get(metric, metric)}".lstrip()
