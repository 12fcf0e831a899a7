"""Stage 2: from arrays to a trained model. Naming optimizers and schedules imports no torch."""

from cachefuse.registry import Registry

OPTIMIZERS = Registry(
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
SCHEDULES = Registry(
    "schedule",
    "cachefuse.schedules",
    {
        "constant": "cachefuse.training.optim:constant",
        "cosine": "cachefuse.training.optim:cosine",
        "onecycle": "cachefuse.training.optim:onecycle",
    },
    takes="optimizer, steps",
)
