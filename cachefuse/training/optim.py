"""Optimizers, learning-rate schedules, and the exponential moving average of a model's weights (EMA)."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from cachefuse.files import JsonObject
from cachefuse.nn.heads import Linear
from cachefuse.training import DECAY_ALL

# Weights of these modules never decay: a norm's scale belongs around 1, and an embedding is one vector a token.
NOT_DECAYED = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip

ITERATIONS = 100  # of L-BFGS in a step
FAR = 6e-7  # from its minimum, as a gradient
SCALE = 1e8  # of its loss: torch skips updates whose product of step and change of gradient is below 1e-10

logger = logging.getLogger(__name__)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class EMA(Generic[AnyModule]):
    """A copy of a model with averaged weights: theta_ema = d theta_ema + (1 - d) theta after every step.

    At step t, d = min(decay, (1 + t) / (10 + t)): the average of a short training then forgets the initial weights.
    """

    def __init__(self, model: AnyModule, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self.model.eval()
        self.decay = decay
        self.steps = 0
        self._pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the model's current weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, weights = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in self._buffers:  # such as the running statistics of batch normalisation
            average.copy_(buffer)


Parameters = Iterable[nn.Parameter] | Iterable[JsonObject]


def trained_parameters(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each parameter that is not frozen, and whether weight decay applies to it.

    It does to all but biases, norms, embeddings, numbers and vectors, as in minGPT and timm, and those that a module
    names in ``no_weight_decay`` (of timm's models a method), such as a learned token. An embedding that is also the
    matrix of a layer does not decay.
    """
    spared = {parameter for owner in module.modules() for parameter in _spared(owner)}
    for parameter in module.parameters():
        if parameter.requires_grad:
            yield parameter, parameter not in spared


def _spared(owner: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module's own that do not decay."""
    named: Any = getattr(owner, "no_weight_decay", ())
    named = named() if callable(named) else named
    for name, parameter in owner.named_parameters(recurse=False):
        if isinstance(owner, NOT_DECAYED) or parameter.ndim < 2 or "bias" in name or name in named:
            yield parameter


def decay_groups(module: nn.Module, weight_decay: float, decay: str) -> list[nn.Parameter] | list[JsonObject]:
    """Return a module's parameters that are not frozen, in the groups of an optimizer: ``trained_parameters`` decay.

    With ``decay`` "all", every parameter decays.
    """
    parameters = list(trained_parameters(module))
    if not weight_decay or decay == DECAY_ALL or all(decays for _, decays in parameters):
        return [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter, decays in parameters if decays], "weight_decay": weight_decay},
        {"params": [parameter for parameter, decays in parameters if not decays], "weight_decay": 0.0},
    ]


def adam(params: Parameters, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return Adam, with weight decay as an L2 penalty; each step is one fused kernel."""
    return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, fused=True)


def adamw(params: Parameters, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101), with decoupled weight decay."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


class NesterovSGD(torch.optim.SGD):
    """SGD with Nesterov momentum 0.9."""

    def __init__(self, params: Parameters, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)


class LBFGS(torch.optim.LBFGS):
    """L-BFGS with line search: each step uses all rows and up to 100 iterations; weight decay is an L2 penalty.

    It minimises loss + weight_decay / 2 |w|^2. The weights w are those of the groups that decay.
    """

    def __init__(self, params: Parameters, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        self._decays: list[tuple[nn.Parameter, float]] = []
        self.gradient = 0.0  # the largest after the last step
        for given in params:
            group: JsonObject = given if isinstance(given, dict) else {"params": [given]}
            self._decays += [(x, float(group.get("weight_decay", weight_decay))) for x in group["params"]]
        super().__init__(
            [parameter for parameter, _ in self._decays],
            lr=lr,
            max_iter=ITERATIONS,
            tolerance_grad=_tolerance(max((decay for _, decay in self._decays), default=0.0)),
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

    def step(self, closure: Any = None) -> Any:
        def penalised() -> Tensor:
            value = closure()
            for parameter, weight_decay in self._decays:
                if parameter.grad is None:
                    continue
                if weight_decay:
                    parameter.grad.add_(parameter.detach(), alpha=weight_decay)
                    value = value + weight_decay / 2 * parameter.detach().square().sum()
                parameter.grad.mul_(SCALE)
            return value * SCALE

        value = super().step(penalised) / SCALE  # type: ignore[no-untyped-call]
        penalised()  # the gradient of the last step taken, not of the last one tried
        self.gradient = max((float(x.grad.abs().max()) for x, _ in self._decays if x.grad is not None), default=0.0)
        self.gradient /= SCALE
        return value

    def check_minimum(self) -> None:
        """Warn if the last step ended far from the minimum: the gradient there is 0, and 1e-8 is asked for."""
        if self.gradient > FAR:
            logger.warning(
                "L-BFGS stopped before the minimum, at a gradient of %.0e; with --standardize features or more epochs "
                "it comes closer",
                self.gradient,
            )


def _tolerance(weight_decay: float) -> float:
    """Return the gradient at which L-BFGS stops. The error of the weights is at most the gradient / weight decay."""
    return SCALE * min(max(1e-6 * weight_decay, 1e-11), 1e-8)


def start_at_zero(model: nn.Module) -> None:
    """Set the linear heads to 0: the minimum of a convex loss is then the same for every seed.

    A softmax's biases have many equal minima; from 0, L-BFGS finds those with sum 0, as scikit-learn does.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@contextmanager
def float64(model: nn.Module, use: bool = True, centred: bool = False) -> Iterator[None]:
    """Compute a model of linear layers in float64. L-BFGS needs it: its line search compares nearly equal losses.

    With ``centred``, a layer learns W (x - m) + c, where m is the mean of its first inputs, and ends as W x + c - W m.
    Far from 0, W x + b has the same minimum, but L-BFGS would lose it in rounding.
    """
    if not use:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    means: dict[nn.Linear, Tensor] = {}

    @torch.no_grad()
    def mean_of(layer: nn.Linear, x: Tensor) -> Tensor:
        if layer not in means:
            means[layer] = x.flatten(0, -2).mean(0)
            layer.bias.add_(layer.weight @ means[layer])
        return means[layer]

    def prepare(of: nn.Linear, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].double()
        return (x - mean_of(of, x) if centred and of.bias is not None else x,)

    hooks = [layer.register_forward_pre_hook(partial(prepare, layer)) for layer in layers]
    model.double()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, mean in means.items():
                layer.bias.sub_(layer.weight @ mean)
        model.float()
        for hook in hooks:
            hook.remove()


def constant(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Keep the learning rate constant."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Lower the learning rate to 0 along half a cosine (arXiv 1608.03983, equation 5, one period)."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def onecycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Raise the learning rate to its value over the first 30% of the steps, then lower it to 0 (arXiv 1708.07120)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=rates, total_steps=max(2, steps + 1))
