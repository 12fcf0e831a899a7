"""Optimizers, learning-rate schedules, and the exponential moving average of a model's weights (EMA)."""

import copy
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

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


Parameters = Iterable[nn.Parameter]


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
    """L-BFGS with line search: each step uses all rows and up to 20 iterations; weight decay is an L2 penalty."""

    def __init__(self, params: Parameters, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, line_search_fn="strong_wolfe")
        self.weight_decay = weight_decay

    def step(self, closure: Any = None) -> Any:
        def penalised() -> Tensor:
            value = closure()
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=self.weight_decay)
                    value = value + self.weight_decay / 2 * parameter.detach().square().sum()
            return value

        return super().step(penalised)  # type: ignore[no-untyped-call]


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
