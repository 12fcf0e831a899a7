"""Models of one structure trained together: their weights lie in one tensor, their first layers are one GEMM.

H heads that read the same batch are one matrix product with weights (H * C, D), which is far less work for a processor
than H thin ones. Each model comes out as it would alone, but for rounding.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.device import own_randomness
from cachefuse.errors import ConfigError, TrainingError
from cachefuse.files import JsonObject
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.losses import Loss
from cachefuse.training.build import build_model, build_stage, training_loss, training_stages, untrained_model
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.feature_table import PIECE_ROWS
from cachefuse.training.inference import CHECKED_ROWS, predict_logits, spread
from cachefuse.training.loop import DIVERGED, check_learnt, fit
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.split import Split

MAX_FLOATS = 2**25  # in the largest tensor that models trained together make: 128 MB
LOSS_FLOATS = 2**18  # that a loss takes at a time: larger tensors would be asked of the system again and again
HOPELESS = 1e20  # a loss that no training comes back from, and that can still be added up without overflow


class StackedLinear(nn.Module):
    """H linear layers: (B, D), which they share, or (H, B, D), to (H, B, out)."""

    def __init__(self, layer: nn.Linear, n: int):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.new_empty(n, *layer.weight.shape))  # (H, out, D)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.new_empty(n, *layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            bias = None if self.bias is None else self.bias.flatten()
            return F.linear(x, self.weight.flatten(0, 1), bias).unflatten(1, self.weight.shape[:2]).transpose(0, 1)
        weight = self.weight.transpose(1, 2)  # (H, D, out)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x, weight)


class StackedLayerNorm(nn.Module):
    """H layer norms over the last dimension of (B, D), which they share, or (H, B, D): to (H, B, D)."""

    def __init__(self, layer: nn.LayerNorm, n: int):
        super().__init__()
        self.shape, self.eps = layer.normalized_shape, layer.eps
        self.weight = nn.Parameter(layer.weight.new_empty(n, *layer.weight.shape))  # (H, D)
        self.bias = nn.Parameter(layer.bias.new_empty(n, *layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.shape, eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), x, self.weight.unsqueeze(1))


class StackedDropout(nn.Module):
    """Dropout of (H, B, D) that drops the same values in all, as it would in each alone with the same seed."""

    def __init__(self, layer: nn.Dropout, n: int):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.layer.p:
            return x
        return x * self.layer(torch.ones_like(x[0] if x.ndim == 3 else x))


STACKED = {nn.Linear: StackedLinear, nn.LayerNorm: StackedLayerNorm, nn.Dropout: StackedDropout}


def stack(models: Sequence[nn.Module]) -> nn.Module:
    """Return H models of one structure as one: it takes what each takes, and gives (H, B, C) where they give (B, C).

    Its state dict has the names of theirs, each tensor with H in front. Raises ConfigError if their structures differ,
    or other layers than Linear and LayerNorm hold weights or buffers.
    """
    if any(repr(model) != repr(models[0]) for model in models):
        raise ConfigError("models to stack must all have the same layers")
    states = [model.state_dict() for model in models]
    stacked = _stacked(copy.deepcopy(models[0]), len(models))
    stacked.load_state_dict({name: torch.stack([state[name] for state in states]) for name in states[0]})
    return stacked


def unstack(stacked: nn.Module, models: Sequence[nn.Module]) -> None:
    """Copy the weights of a stack back into the models that it was made of."""
    state = stacked.state_dict()
    for i, model in enumerate(models):
        model.load_state_dict({name: tensor[i] for name, tensor in state.items()})


def _stacked(module: nn.Module, n: int) -> nn.Module:
    for kind, stacked in STACKED.items():
        if isinstance(module, kind):
            return stacked(module, n)
    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        raise ConfigError(f"models to stack must keep their weights in Linear or LayerNorm. Got {module} instead")
    for name, child in module.named_children():
        setattr(module, name, _stacked(child, n))
    return module


def shared_settings(config: ResolvedConfig, device: torch.device) -> JsonObject | None:
    """Return the settings in which trainings must agree to be done together; None for one to be done alone.

    They may differ in their loss, class weights, learning rate, weight decay, and in what is decided after training; if
    linear, also in what is for hidden layers. Heads with hidden layers are worth it on CUDA only. What depends on one
    model's own score or gradient (patience, clip-norm, L-BFGS) is done alone, and so are several members, and tokens.
    """
    own_way = config.optimizer == "lbfgs" or config.patience or config.clip_norm
    own_way = own_way or config.accumulate > 1 or bool(config.shuffle)
    if own_way or config.members > 1 or not config.is_linear or (config.head != "linear" and device.type != "cuda"):
        return None
    free = {
        "loss", "loss_options", "class_weights", "lr", "weight_decay", "monitor", "thresholds", "threshold_metric",
        "refit",
    }  # fmt: skip
    if config.head == "linear":
        free |= {"layers", "activation", "dropout"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def most_together(data: TrainingData, config: ResolvedConfig, n_rows: int) -> int:
    """Return how many models can be trained together on so many rows without taking much memory.

    Those of several tasks are trained alone: a row counts for the tasks whose labels it has.
    """
    if data.tasks[0].name:
        return 1
    with torch.device("meta"):
        n_weights = build_model(config, data.specs, len(data.classes)).n_parameters
    hidden = 0 if config.head == "linear" else sum(config.head_options()["layers"])
    classes = len(data.classes)
    checked, at_once = min(n_rows, CHECKED_ROWS), min(n_rows, max(config.effective_batch_size or n_rows, PIECE_ROWS))
    return max(1, MAX_FLOATS // max(checked * classes, at_once * (classes + hidden), n_weights))


@own_randomness()
def train_together(
    data: TrainingData, configs: Sequence[ResolvedConfig], split: Split
) -> list[FusionModel | TrainingError]:
    """Train models on a split's rows, each as ``train_model`` would alone; in place of one that diverged, why.

    Their ``shared_settings`` must be equal.
    """
    # Those with one loss lie side by side, and among them those with the same rates.
    order = sorted(range(len(configs)), key=lambda i: repr((_loss_settings(configs[i]), _rates(configs[i]))))
    ordered = [configs[i] for i in order]
    models = [untrained_model(data, config) for config in ordered]
    training_set = TrainingSet.prepare(data, models[0], split.train)
    for model in models[1:]:
        model.standardize.load_state_dict(models[0].standardize.state_dict())
    stacked, loss = stack([model.fusion for model in models]), StackedLoss(data, ordered, training_set)
    diverged: dict[int, TrainingError] = {}
    for stage in training_stages(ordered[0], stacked, training_set):
        rows_first = RowsFirst(stage.module)
        groups = parameter_groups(rows_first, [_rates(config) for config in ordered])
        with suppress(TrainingError):  # of some of the models; of which is seen below
            fit(*build_stage(ordered[0], stage.training_set, rows_first, loss, groups), epochs=stage.n_epochs)
        unstack(stacked, [model.fusion for model in models])
        for i in loss.suspects(stage.training_set.reading(rows_first), stage.training_set):
            head = models[i].fusion.unimodal_heads()[stage.name] if stage.name else models[i].fusion
            read, own_loss = stage.training_set, training_loss(data, ordered[i], training_set)
            try:
                check_learnt(read.reading(head), own_loss, read.table, read.rows)
            except TrainingError as error:
                diverged.setdefault(i, error)
    return [diverged.get(order.index(i), models[order.index(i)]) for i in range(len(configs))]


class RowsFirst(Model):
    """A stack that gives (B, H, C), as what handles logits expects the rows in front."""

    def __init__(self, stacked: Any):
        super().__init__()
        self.stacked = stacked
        self.specs = stacked.specs

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.stacked(features, present).transpose(0, 1)


class StackedLoss:
    """The sum of each model's own loss, for logits (B, H, C) and targets (B, C).

    A model whose training has diverged no longer counts, so that it does not end that of the others.
    """

    def __init__(self, data: TrainingData, configs: Sequence[ResolvedConfig], training_set: TrainingSet) -> None:
        """``configs`` with the same loss must lie side by side."""
        self._runs = []
        for _, run in groupby(configs, _loss_settings):
            alike = list(run)
            each = training_loss(data, alike[0], training_set, reduction="none")
            self._runs.append((len(alike), each, str(alike[0].loss_options.get("reduction", "mean"))))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = self.of_each(logits, targets)
        return torch.where(losses < HOPELESS, losses, 0).sum()

    def of_each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return each model's own loss, (H,)."""
        sizes = [n for n, _, _ in self._runs]
        return torch.cat(
            [self._of_run(x, targets, *run) for x, run in zip(logits.split(sizes, dim=1), self._runs, strict=True)]
        )

    def _of_run(self, logits: Tensor, targets: Tensor, n: int, each: Loss, reduction: str) -> Tensor:
        rows, total, count = max(1, LOSS_FLOATS // logits[0].numel()), logits.new_zeros(n), 0
        for some, truth in zip(logits.split(rows), targets.split(rows), strict=True):
            values = each(some.flatten(0, 1), truth.unsqueeze(1).expand_as(some).flatten(0, 1))
            values = values.view(len(some), n, -1)  # (b, n, C), or (b, n, 1)
            total, count = total + values.sum((0, 2)), count + values[:, 0].numel()
        return total / count if reduction == "mean" else total

    def suspects(self, module: nn.Module, training_set: TrainingSet) -> list[int]:
        """Return the models whose training may have diverged, by their place."""
        rows = spread(training_set.rows, CHECKED_ROWS)
        try:
            logits, targets = predict_logits(module, training_set.table, rows), training_set.table.targets[rows].cpu()
        except TrainingError:  # of one or more
            return list(range(sum(n for n, _, _ in self._runs)))
        reached, blank = (self.of_each(x, targets) for x in (logits, torch.zeros_like(logits)))
        return torch.nonzero(~(reached <= DIVERGED * blank)).flatten().tolist()


def parameter_groups(module: nn.Module, rates: Sequence[tuple[float, float]]) -> list[JsonObject]:
    """Return an optimizer's groups for a stack whose H models have these learning rates and weight decays.

    Where they differ, each group's parameters are slices of the stack's own memory, which get their gradients from it.
    """
    runs = [(rate, len(list(run))) for rate, run in groupby(rates)]
    groups: list[JsonObject] = [
        {"params": [], "lr": lr, "weight_decay": weight_decay} for (lr, weight_decay), _ in runs
    ]
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        slices = [parameter]
        if len(runs) > 1:
            slices = [nn.Parameter(x) for x in parameter.detach().split([n for _, n in runs])]
            parameter.register_post_accumulate_grad_hook(partial(_hand_on, slices))
        for group, piece in zip(groups, slices, strict=True):
            group["params"].append(piece)
    return groups


def _hand_on(slices: Sequence[nn.Parameter], parameter: Tensor) -> None:
    """Give a parameter's gradient to its slices: views of it, as they are of the parameter."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        for piece, grad in zip(slices, gradient.split([len(piece) for piece in slices]), strict=True):
            piece.grad = grad


def _rates(config: ResolvedConfig) -> tuple[float, float]:
    return config.lr, config.weight_decay


def _loss_settings(config: ResolvedConfig) -> tuple[object, ...]:
    return config.loss, sorted(config.loss_options.items()), config.class_weights
