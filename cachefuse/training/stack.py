"""Train models of one structure together: their weights are in one tensor, and their first layers are one GEMM.

On one batch, H heads are one matrix product with weights (H * C, D), which is much faster than H thin products. Except
for rounding, each model is the same as if trained alone.
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
from cachefuse.training import DECAY_ALL
from cachefuse.training.build import build_model, build_stage, training_loss, training_stages, untrained_model
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.feature_table import PIECE_ROWS
from cachefuse.training.inference import CHECKED_ROWS, predict_logits, spread
from cachefuse.training.loop import DIVERGED, check_learnt, fit
from cachefuse.training.optim import trained_parameters
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.split import Split

MAX_FLOATS = 2**25  # limit of the largest tensor in training together: 128 MB
LOSS_FLOATS = 2**18  # per call of a loss: the system would allocate larger tensors each time
DIVERGED_LOSS = 1e20  # the loss of a diverged model; sums of smaller losses do not overflow


class StackedLinear(nn.Module):
    """H linear layers: shared inputs (B, D), or inputs (H, B, D), to (H, B, out)."""

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
    """H layer norms over the last dimension: shared inputs (B, D), or inputs (H, B, D), to (H, B, D)."""

    no_weight_decay = ("weight",)

    def __init__(self, layer: nn.LayerNorm, n: int):
        super().__init__()
        self.shape, self.eps = layer.normalized_shape, layer.eps
        self.weight = nn.Parameter(layer.weight.new_empty(n, *layer.weight.shape))  # (H, D)
        self.bias = nn.Parameter(layer.bias.new_empty(n, *layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.shape, eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), x, self.weight.unsqueeze(1))


class StackedDropout(nn.Module):
    """Dropout of (H, B, D) with the same mask for all H, as for models trained alone with the same seed."""

    def __init__(self, layer: nn.Dropout, n: int):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.layer.p:
            return x
        return x * self.layer(torch.ones_like(x[0] if x.ndim == 3 else x))


STACKED = {nn.Linear: StackedLinear, nn.LayerNorm: StackedLayerNorm, nn.Dropout: StackedDropout}


def stack(models: Sequence[nn.Module]) -> nn.Module:
    """Return H models of one structure as one model with the same inputs and outputs (H, B, C).

    Its state dict has the same names, each tensor with dimension H in front. Raises ConfigError if the structures
    differ, or if layers other than Linear and LayerNorm have weights or buffers.
    """
    if any(repr(model) != repr(models[0]) for model in models):
        raise ConfigError("models to stack must all have the same layers")
    states = [model.state_dict() for model in models]
    stacked = _stacked(copy.deepcopy(models[0]), len(models))
    stacked.load_state_dict({name: torch.stack([state[name] for state in states]) for name in states[0]})
    return stacked


def unstack(stacked: nn.Module, models: Sequence[nn.Module]) -> None:
    """Copy the weights of a stack back into its models."""
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
    """Return the settings that must be equal to train models together; None for a model that is trained alone.

    Loss, class weights, learning rate, weight decay and settings used after training may differ; for linear heads also
    settings of hidden layers. Heads with hidden layers are trained together only on CUDA, where it is faster. A model
    is trained alone if its settings use its own score or gradient (patience, clip-norm, L-BFGS), several members, or
    tokens.
    """
    alone = config.optimizer == "lbfgs" or config.patience or config.clip_norm
    alone = alone or config.accumulate > 1 or bool(config.shuffle)
    if alone or config.members > 1 or not config.is_linear or (config.head != "linear" and device.type != "cuda"):
        return None
    free = {
        "loss", "loss_options", "class_weights", "lr", "weight_decay", "decay", "monitor", "thresholds",
        "threshold_metric", "calibrate", "refit",
    }  # fmt: skip
    if config.head == "linear":
        free |= {"layers", "activation", "dropout"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def max_together(data: TrainingData, config: ResolvedConfig, n_rows: int) -> int:
    """Return the number of models that can be trained together on ``n_rows`` rows in little memory.

    Models of several tasks are trained alone, because rows may lack labels of some tasks.
    """
    if data.tasks[0].name:
        return 1
    with torch.device("meta"):
        n_weights = build_model(config, data.specs, len(data.classes)).n_parameters
    hidden = 0 if config.head == "linear" else sum(config.head_options()["layers"])
    classes = len(data.classes)
    checked_rows = min(n_rows, CHECKED_ROWS)
    step_rows = min(n_rows, max(config.effective_batch_size or n_rows, PIECE_ROWS))
    return max(1, MAX_FLOATS // max(checked_rows * classes, step_rows * (classes + hidden), n_weights))


@own_randomness()
def train_together(
    data: TrainingData, configs: Sequence[ResolvedConfig], split: Split
) -> list[FusionModel | TrainingError]:
    """Train models on a split's rows; return what ``train_model`` would for each, or its error if it diverged.

    Their ``shared_settings`` must be equal.
    """
    # Models with the same loss are side by side, and among them models with the same rates.
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
        with suppress(TrainingError):  # some models diverged; the loop below finds them
            fit(*build_stage(ordered[0], stage.training_set, rows_first, loss, groups), epochs=stage.n_epochs)
        unstack(stacked, [model.fusion for model in models])
        for i in loss.suspects(stage.training_set.reading(rows_first), stage.training_set):
            head = models[i].fusion.unimodal_heads()[stage.name] if stage.name else models[i].fusion
            stage_set, head_loss = stage.training_set, training_loss(data, ordered[i], training_set)
            try:
                check_learnt(stage_set.reading(head), head_loss, stage_set.table, stage_set.rows)
            except TrainingError as error:
                diverged.setdefault(i, error)
    return [diverged.get(order.index(i), models[order.index(i)]) for i in range(len(configs))]


class RowsFirst(Model):
    """A stack with outputs (B, H, C), because the training loop expects rows first."""

    def __init__(self, stacked: Any):
        super().__init__()
        self.stacked = stacked
        self.specs = stacked.specs

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.stacked(features, present).transpose(0, 1)


class StackedLoss:
    """The sum of the models' losses, for logits (B, H, C) and targets (B, C).

    A diverged model is left out, so that the others can continue.
    """

    def __init__(self, data: TrainingData, configs: Sequence[ResolvedConfig], training_set: TrainingSet) -> None:
        """``configs`` with the same loss must be side by side."""
        self._groups = []
        for _, group in groupby(configs, _loss_settings):
            first, *others = group
            loss = training_loss(data, first, training_set, reduction="none")
            self._groups.append((1 + len(others), loss, str(first.loss_options.get("reduction", "mean"))))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = self.of_each(logits, targets)
        return torch.where(losses < DIVERGED_LOSS, losses, 0).sum()

    def of_each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each model, (H,)."""
        sizes = [n for n, _, _ in self._groups]
        by_group = zip(logits.split(sizes, dim=1), self._groups, strict=True)
        return torch.cat([self._of_group(x, targets, *group) for x, group in by_group])

    def _of_group(self, logits: Tensor, targets: Tensor, n: int, loss: Loss, reduction: str) -> Tensor:
        rows, total, count = max(1, LOSS_FLOATS // logits[0].numel()), logits.new_zeros(n), 0
        for x, y in zip(logits.split(rows), targets.split(rows), strict=True):  # (b, n, C), (b, C)
            values = loss(x.flatten(0, 1), y.unsqueeze(1).expand_as(x).flatten(0, 1))
            values = values.view(len(x), n, -1)  # (b, n, C), or (b, n, 1)
            total, count = total + values.sum((0, 2)), count + values[:, 0].numel()
        return total / count if reduction == "mean" else total

    def suspects(self, module: nn.Module, training_set: TrainingSet) -> list[int]:
        """Return the indices of models that may have diverged."""
        rows = spread(training_set.rows, CHECKED_ROWS)
        try:
            logits, targets = predict_logits(module, training_set.table, rows), training_set.table.targets[rows].cpu()
        except TrainingError:  # at least one model has diverged
            return list(range(sum(n for n, _, _ in self._groups)))
        losses, zero_losses = (self.of_each(x, targets) for x in (logits, torch.zeros_like(logits)))
        return torch.nonzero(~(losses <= DIVERGED * zero_losses)).flatten().tolist()


def parameter_groups(module: nn.Module, rates: Sequence[tuple[float, float, str]]) -> list[JsonObject]:
    """Return an optimizer's parameter groups for a stack of H models with these rates: see ``_rates``.

    If they differ, each group's parameters are slices of the stack's memory, with slices of its gradients.
    """
    runs = [(rate, len(list(run))) for rate, run in groupby(rates)]
    groups: list[JsonObject] = []
    parameters = list(trained_parameters(module))
    slices = {parameter: _slices(parameter, [n for _, n in runs]) for parameter, _ in parameters}
    for i, ((lr, weight_decay, decay), _) in enumerate(runs):
        for decays in (True, False):
            group = [slices[parameter][i] for parameter, is_weight in parameters if is_weight == decays]
            rate = weight_decay if decays or decay == DECAY_ALL else 0.0
            if group:
                groups.append({"params": group, "lr": lr, "weight_decay": rate})
    return groups


def _slices(parameter: nn.Parameter, sizes: Sequence[int]) -> list[nn.Parameter]:
    """Return slices of a parameter (H, ...) that get its gradient; a single one is the parameter itself."""
    if len(sizes) == 1:
        return [parameter]
    slices = [nn.Parameter(x) for x in parameter.detach().split(list(sizes))]
    parameter.register_post_accumulate_grad_hook(partial(_move_gradient, slices))
    return slices


def _move_gradient(slices: Sequence[nn.Parameter], parameter: Tensor) -> None:
    """Move a parameter's gradient to its slices, as views."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        for piece, grad in zip(slices, gradient.split([len(piece) for piece in slices]), strict=True):
            piece.grad = grad


def _rates(config: ResolvedConfig) -> tuple[float, float, str]:
    """Return the learning rate, the weight decay, and what decays."""
    return config.lr, config.weight_decay, config.decay


def _loss_settings(config: ResolvedConfig) -> tuple[object, ...]:
    return config.loss, sorted(config.loss_options.items()), config.class_weights
