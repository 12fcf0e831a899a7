"""Stage 2: from arrays to a trained model. Naming optimizers and schedules imports no torch."""

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
