"""Training without an optimizer, of fusions whose weights ``solve`` computes without a gradient."""

import torch

from cachefuse.device import own_randomness
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.losses import Loss
from cachefuse.threads import adapt_threads, idle_threads
from cachefuse.training.build import build_validation
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.inference import CHECKED_ROWS, mean_loss, predict_logits, spread
from cachefuse.training.loop import Epoch, History
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.split import Split


@idle_threads()
@own_randomness()
def solve_model(
    data: TrainingData, config: ResolvedConfig, model: FusionModel, training_set: TrainingSet, loss: Loss, split: Split
) -> History:
    """Solve a model on the rows of its training set; return a history of one epoch, measured on the split's rows."""
    threads = adapt_threads()
    rows, groups = training_set.rows, data.groups_of(split.train)
    model.fusion.solve(
        training_set.read,
        rows,
        training_set.targets,
        data.tasks,
        None if groups is None else torch.from_numpy(groups).to(rows.device),
        config.seed,
    )
    reading, table = training_set.reading(model.fusion), training_set.table
    seen = spread(rows, CHECKED_ROWS)
    train_loss = mean_loss(loss, predict_logits(reading, table, seen), table, seen)
    score = val_loss = None
    validation = build_validation(data, config, split.validate)
    if validation is not None:
        logits = predict_logits(reading, table, validation.rows)
        val_loss = mean_loss(loss, logits, table, validation.rows)
        score = validation.score(logits)
    return History([Epoch(1, train_loss, score, True, val_loss, threads=threads)], best_epoch=1)
