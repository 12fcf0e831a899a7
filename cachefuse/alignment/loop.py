"""Training an alignment: one visible loop, and a step with an exact gradient for any number of pairs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import PairData, embed, in_batches
from cachefuse.alignment.model import Aligner, Side
from cachefuse.alignment.ranks import Embedded, best_ranks, recall_at
from cachefuse.errors import TrainingError
from cachefuse.threads import idle_threads
from cachefuse.training.loop import Epoch, EpochLoop, History, Optimization, keep_freed_memory

ReadChunk = Callable[[int, Tensor], Side]  # (side, item rows) -> features and mask, on the model's device


@idle_threads()
def fit(
    model: Aligner,
    config: AlignConfig,
    data: PairData,
    train: np.ndarray,
    validate: np.ndarray,
    optimization: Optimization,
    generator: torch.Generator,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train on samples ``train`` (n,); ``patience`` epochs without a better score on ``validate`` (m,) end training.

    The model keeps the weights of the best epoch (averaged with EMA), or of the last epoch if ``validate`` is empty.
    Raises TrainingError if training diverges. Ctrl-C ends training with the weights of the best epoch so far; before
    the end of the first epoch it raises KeyboardInterrupt.
    """
    keep_freed_memory()
    device = model.log_temperature.device
    optimizer, schedule, ema = optimization.optimizer, optimization.schedule, optimization.ema
    kept = model if ema is None else ema.model
    loop = EpochLoop(kept, config.epochs, config.patience)

    def read(side: int, index: Tensor) -> Side:
        return data.sides[side].read(index, device)

    try:
        for _ in loop:
            model.train()
            total = torch.zeros((), device=device)
            n_pairs = 0
            for samples in in_batches(train, config.batch_size, generator):  # (M,)
                items = data.draw(samples, generator)  # two of (M,)
                optimizer.zero_grad()
                value = backward(model, read, items, config.chunk_size, config.targets)
                optimizer.step()
                if schedule:
                    schedule.step()
                model.bound_temperature()
                if ema:
                    ema.update()
                total.add_(value, alpha=len(samples))
                n_pairs += len(samples)
            train_loss = loop.check(total.item() / n_pairs)
            score = val_loss = monitor = None
            if len(validate):
                score, val_loss = _validate(kept, data, validate, config)
                monitor = -val_loss if config.monitor == "loss" else score
            on_epoch(loop.end_epoch(train_loss, score, val_loss, monitor=monitor))
    except KeyboardInterrupt:
        if not loop.restore_best(model):
            raise
        loop.history.interrupted = True
        return loop.history
    loop.restore_best(model)
    return loop.history


def backward(model: Aligner, read: ReadChunk, items: tuple[Tensor, Tensor], chunk_size: int, targets: str) -> Tensor:
    """Add the gradient of the loss of M pairs to the parameters' gradients, and return the loss.

    With chunks, all pairs are first embedded without a graph. The loss gives the gradient of each embedding. Then each
    chunk is embedded again, with the same random numbers, and its gradient is propagated back (GradCache, arXiv
    2101.06983). This needs the memory of one chunk only, and gives the gradient of the whole batch.
    """
    n = len(items[0])
    if not chunk_size or chunk_size >= n:
        x, y = (model(side, read(side, items[side])) for side in (0, 1))  # (M, W) each
        value = model.loss(x, y, targets)
        value.backward()
        return value.detach()
    chunks = [(side, rows) for side in (0, 1) for rows in items[side].split(chunk_size)]
    states, embeddings = [], []
    with torch.no_grad():
        for side, rows in chunks:
            states.append(_random_state(model))
            embeddings.append(model(side, read(side, rows)))
    leaves = [x.requires_grad_() for x in embeddings]
    half = len(leaves) // 2
    value = model.loss(torch.cat(leaves[:half]), torch.cat(leaves[half:]), targets)
    value.backward()
    for (side, rows), state, leaf in zip(chunks, states, leaves, strict=True):
        with _random_numbers_of(model, state):
            model(side, read(side, rows)).backward(leaf.grad)
    return value.detach()


def _random_state(model: Aligner) -> tuple[Tensor, Tensor | None]:
    device = model.log_temperature.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_numbers_of(model: Aligner, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Use random numbers from ``state`` on, so that dropout drops the same; afterwards restore the old state."""
    device = model.log_temperature.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def _validate(model: Aligner, data: PairData, samples: np.ndarray, config: AlignConfig) -> tuple[float, float]:
    """Return the mean recall at 1 of both directions, and the loss of one item per sample in batches of ``batch_size``.

    Raises TrainingError if the loss is not finite.
    """
    both = embed_samples(model, data, samples)
    r1 = float(np.mean([recall_at(best_ranks(*pair), 1) for pair in (both, both[::-1])]))
    loss = _loss_of_first_items(model, both, config)
    if not math.isfinite(loss):
        raise TrainingError(f"training diverged: the loss on val is {loss}; use a lower lr")
    return r1, loss


@torch.inference_mode()
def _loss_of_first_items(model: Aligner, both: tuple[Embedded, Embedded], config: AlignConfig) -> float:
    """Return the loss of each sample's first items; if both sides have the same items, the second item for one side."""
    device = model.log_temperature.device
    firsts = []
    for side, embedded in enumerate(both):
        first, counts = np.unique(embedded.owners, return_index=True, return_counts=True)[1:]
        index = first + np.minimum(side, counts - 1) * (embedded.items is not None)
        firsts.append(embedded.vectors[torch.from_numpy(index)])
    batches = zip(*(x.to(device).split(config.batch_size) for x in firsts), strict=True)
    losses = [
        (len(x), model.loss(x, y, config.targets).item()) for x, y in batches if len(x) > 1 or len(firsts[0]) == 1
    ]
    return sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)


def embed_samples(model: Aligner, data: PairData, samples: np.ndarray) -> tuple[Embedded, Embedded]:
    """Return the embeddings of all items of some samples (n,), by side."""
    both = []
    for number, side in enumerate(data.sides):
        items, owners = side.items(samples)
        both.append(Embedded(embed(model, number, side, items), owners, items if data.same_texts else None))
    return both[0], both[1]
