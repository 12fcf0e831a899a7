"""The costs of a model: parameters, bytes, the time of a prediction from the cache, and of a training step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cachefuse.device import own_randomness
from cachefuse.fusion.model import FusionModel
from cachefuse.training import OPTIMIZERS
from cachefuse.training.batches import Batch, Batches
from cachefuse.training.build import build_training
from cachefuse.training.data import TrainingData
from cachefuse.training.inference import predict_logits, spread
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.split import Split
from cachefuse.training.train import train_model

PREDICTED_ROWS = 512  # batch size to measure the time of a prediction
TIMES, SECONDS = 3, 2.0  # minimum number of repeats, and minimum total time, of a measurement


@dataclass(frozen=True)
class Costs:
    """The costs of a model: ``size_mb`` in 10^6 bytes, ``ms_per_item`` per row of a large batch, without encoders.

    ``steps_per_second`` is 0 if it was not measured, or the model is not trained in steps.
    """

    parameters: int
    size_mb: float
    ms_per_item: float
    steps_per_second: float


@own_randomness()
def measure_costs(data: TrainingData, config: ResolvedConfig) -> Costs:
    """Return the costs of a model of resolved settings on this machine; times are medians."""
    train = data.train_rows()
    if config.is_solved:
        model, _ = train_model(data, config, Split(train, train[:0], train[:0]))
        return _costs_of(model, data, train)
    model, training_set, loss = build_training(data, config, train)
    costs = _costs_of(model, data, train)
    module = training_set.reading(model.fusion).train()
    optimizer = OPTIMIZERS[config.optimizer](module.parameters(), lr=1e-6)
    batches: Iterator[Batch] = iter(())
    generator = torch.Generator().manual_seed(config.seed)

    def step() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(Batches(training_set.table, training_set.rows, config.effective_batch_size, generator))
            batch = next(batches)
        features, present, targets = batch

        def closure() -> Any:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=config.mixed_precision and targets.is_cuda):
                value = module.objective(features, present, targets, loss)
            value.backward()
            return value

        last: Any = optimizer.step(closure)
        last.detach().item()  # waits for a GPU

    return replace(costs, steps_per_second=1 / _median_seconds(step))


def _costs_of(model: FusionModel, data: TrainingData, train: Tensor) -> Costs:
    """Return the costs of a model, without steps, on some of the rows (n,)."""
    table, rows = data.table.only(model.specs), spread(train, PREDICTED_ROWS).to(data.device)
    predict = _median_seconds(lambda: predict_logits(model, table, rows))
    return Costs(model.n_parameters, model.size_mb, 1000 * predict / len(rows), 0.0)


def _median_seconds(work: Callable[[], object]) -> float:
    work()  # warms up memory and threads
    seconds: list[float] = []
    while len(seconds) < TIMES or (sum(seconds) < SECONDS and len(seconds) < 100):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2]
