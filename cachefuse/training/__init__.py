"""Stage 2: from arrays to a trained model. The tables of optimizers and schedules import no torch."""

from typing import TYPE_CHECKING

from cachefuse.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

LBFGS = "lbfgs"
DECAY_WEIGHTS, DECAY_ALL = "weights", "all"  # what weight decay applies to

OPTIMIZERS: "Registry[Callable[..., Optimizer]]" = Registry(
    "optimizer",
    "cachefuse.optimizers",
    {
        "adam": "cachefuse.training.optim:adam",
        "adamw": "cachefuse.training.optim:adamw",
        "lbfgs": "cachefuse.training.optim:LBFGS",
        "sgd": "cachefuse.training.optim:NesterovSGD",
    },
    takes="params, *, lr, weight_decay",
)
SCHEDULES: "Registry[Callable[[Optimizer, int], LRScheduler]]" = Registry(
    "schedule",
    "cachefuse.schedules",
    {
        "constant": "cachefuse.training.optim:constant",
        "cosine": "cachefuse.training.optim:cosine",
        "onecycle": "cachefuse.training.optim:onecycle",
    },
    takes="optimizer, steps",
)
