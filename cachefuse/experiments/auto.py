"""A search for the best model within a budget: candidates by successive halving, then a mean of the best.

Those trained on all folds are joined by greedy selection, and the chosen ones trained again on all rows. Rows of a
labelled test split take no part in any choice.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cachefuse.data.manifest import VQA
from cachefuse.errors import CachefuseError, ConfigError, TrainingError
from cachefuse.experiments.files import only_sweep
from cachefuse.experiments.halving import Bounds, Halving, Tried
from cachefuse.metrics.bootstrap import at_once, interval, resample
from cachefuse.metrics.paired import LEVEL, difference, holm
from cachefuse.runs.leaderboard import Entry, Leaderboard
from cachefuse.runs.run import Run
from cachefuse.runs.train import BlendPart, build_run
from cachefuse.store.store import FeatureStore
from cachefuse.training.blend import blend
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL
from cachefuse.training.held_out import HeldOut
from cachefuse.training.recommended import KEEPS
from cachefuse.training.split import split_of_all

MINUTES, FOLDS = 5.0, 5
SPARE = 0.8  # of the budget is for trials; the rest for the leaderboard, and for training again on all rows
RESAMPLES = 2000  # of the rows, for intervals and tests


def auto(
    store: FeatureStore,
    *,
    minutes: float = MINUTES,
    trials: int | None = None,
    base: TrainConfig | None = None,
    encoders: Sequence[str] = (),
    device: str = "auto",
    max_size_mb: float | None = None,
    max_ms: float | None = None,
    folder: Path | None = None,
    on_trial: Callable[[Leaderboard], None] = lambda leaderboard: None,
) -> Run:
    """Find the best model for a store in about ``minutes``, and return it as a run with a ``leaderboard``.

    The first ``trials`` candidates are tried instead if it is given: the result then does not depend on the time.
    ``base`` has the settings of choosing and measuring: thresholds, threshold_metric, calibrate, folds, seed and
    duplicates; its other settings have no effect. ``encoders`` names the features to use, by default all. The models of
    the result take at most ``max_size_mb`` 10^6 bytes and ``max_ms`` ms an item, after the encoders. Trials are kept in
    ``folder``: the same call goes on after an interruption, and its time counts from the first. ``on_trial`` gets the
    leaderboard so far.

    Raises ConfigError for settings that do not fit the dataset, a budget that is not above 0, or bounds that no
    candidate keeps, TrainingError if all diverge, and as ``train_head`` does.
    """
    base = TrainConfig(folds=FOLDS) if base is None else base
    _check(store, base, minutes, trials, max_size_mb, max_ms)
    begun = time.perf_counter()
    with only_sweep(folder) if folder else nullcontext():
        bounds = Bounds(max_size_mb, max_ms)
        kept = TrainConfig(**{**{name: getattr(base, name) for name in KEEPS}, "refit": True})
        search = Halving.begin(store, kept, encoders, device, folder, trials, bounds)
        so_far = partial(_so_far, search, minutes if trials is None else None, trials)
        search.on_trial = lambda: on_trial(so_far())
        search.run(math.inf if trials is not None else SPARE * 60 * minutes)
        run, weights = _mix(store, search)
    run.leaderboard = _final(so_far(), search, run, weights)
    run.seconds = time.perf_counter() - begun
    return run


def _check(
    store: FeatureStore,
    base: TrainConfig,
    minutes: float,
    trials: int | None,
    max_size_mb: float | None,
    max_ms: float | None,
) -> None:
    """Raise ConfigError for settings with which no search is possible."""
    if store.manifest.task == VQA:
        raise ConfigError("auto is not for questions with answers; use cachefuse train-head")
    if base.folds < 2:
        raise ConfigError(f"auto measures on folds, of which it needs at least 2. Got {base.folds} instead")
    if trials is not None and trials < 1:
        raise ConfigError(f"trials must be at least 1. Got {trials} instead")
    for name, value in (("minutes", minutes), ("max-size-mb", max_size_mb), ("max-ms", max_ms)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0. Got {value:g} instead")


def _mix(store: FeatureStore, search: Halving) -> tuple[Run, np.ndarray]:
    """Join the K candidates that were trained on all folds; return the run, trained on all rows, and weights (K,).

    Sizes are estimated before that: if the models turn out to be too large, smaller ones are chosen.
    """
    finished, bounds = search.finished, search.bounds
    if not finished:
        raise _none_fits(search)
    costs = [search.costs(tried) for tried in finished]
    while True:
        fits = partial(_fits, costs, bounds)
        weights, held_out = blend(search.data, [tried.held_out for tried in finished if tried.held_out], fits)
        parts = [
            BlendPart(tried.data, tried.config, tried.train(split_of_all(tried.data)), weight, (), tried.calibration)
            for tried, weight in zip(finished, weights.tolist(), strict=True)
            if weight > 0
        ]
        run = build_run(store, sorted(parts, key=lambda part: -part.weight), held_out, "auto")
        over = run.size_mb / (search.bounds.max_size_mb or math.inf)
        if over <= 1:
            return run, weights
        bounds = replace(bounds, max_size_mb=(bounds.max_size_mb or math.inf) / over)
        if not any(bounds.allow([cost]) for cost in costs):
            raise ConfigError(
                f"the models take {run.size_mb:.2f} MB after the training on all rows, and max-size-mb is "
                f"{search.bounds.max_size_mb:g}; raise it"
            )


def _fits(costs: Sequence[tuple[float, float]], bounds: Bounds, counts: np.ndarray) -> bool:
    return bounds.allow(cost for cost, count in zip(costs, counts, strict=True) if count)


def _none_fits(search: Halving) -> CachefuseError:
    """Return the error if no candidate was trained on all folds and fits."""
    if all(tried.problem for tried in search.all if tried.trials):
        return TrainingError(f"{search.data.name}: all candidates diverged: {search.all[0].problem}")
    costs = [search.costs(tried) for tried in search.all if tried.trials and not tried.problem]
    size, ms = (min(each) for each in zip(*costs, strict=True))
    return ConfigError(
        f"no candidate that was tried is {search.bounds}: the smallest takes about {size:.2g} MB, the fastest {ms:.2g} "
        f"ms an item; give more --minutes or --trials, or raise the bounds"
    )


def _so_far(search: Halving, minutes: float | None, trials: int | None) -> Leaderboard:
    """Return the leaderboard of the trials so far, without a mix."""
    entries = [_entry(tried) for tried in search.all if tried.trials]
    return Leaderboard(
        entries=tuple(sorted(entries, key=lambda entry: (-entry.n_folds, entry.log_loss))),
        n_candidates=search.n_candidates,
        folds=len(search.splits),
        n_rows=len(search.data.rows(TRAIN, VAL)),
        main=search.data.metric,
        metrics={},
        interval=(math.nan, math.nan),
        log_loss=math.nan,
        minutes=minutes,
        trials=trials,
        seconds=search.seconds,
        bounds=str(search.bounds),
    )


def _entry(tried: Tried) -> Entry:
    """Return a candidate's line, without its figures."""
    costs = None if tried.problem else tried.costs
    return Entry(
        name=tried.name,
        n_folds=len(tried.trials),
        log_loss=math.nan if tried.problem else tried.loss,
        metrics={},
        interval=(math.nan, math.nan),
        seconds=tried.seconds,
        size_mb=costs.size_mb if costs else math.nan,
        ms_per_item=costs.ms_per_item if costs else math.nan,
        problem=tried.problem,
    )


def _final(board: Leaderboard, search: Halving, run: Run, weights: np.ndarray) -> Leaderboard:
    """Return the leaderboard with the mix, the figures of the candidates, and their paired tests against the mix."""
    data, held_out, main = search.data, run.held_out, board.main
    assert held_out is not None, "folds hold rows out"
    rows = torch.from_numpy(held_out.rows)
    targets, groups, bound = data.targets(rows), data.groups_of(rows), data.bind(data.metrics)

    def measured(scores: HeldOut) -> tuple[dict[str, float], np.ndarray]:
        """Return the metrics, and the main one on resamples (R,): the same for all."""
        arrays = targets, *scores.decided(data, run.config)
        resampled = resample(bound[main].weighted(*arrays), len(rows), RESAMPLES, 0, at_once(targets), groups)
        return {name: float(metric(*arrays)) for name, metric in bound.items()}, resampled

    metrics, resampled = measured(held_out)
    entries, differences = [], []
    for tried, weight in zip(search.finished, weights.tolist(), strict=True):
        assert tried.held_out is not None, "it was measured"
        figures, own = measured(tried.held_out)
        around = interval(figures[main], own, LEVEL)
        entries.append(replace(_entry(tried), metrics=figures, interval=around, weight=weight))
        differences.append(difference(metrics[main] - figures[main], resampled - own))
    corrected = holm(np.array([apart.p for apart in differences]))
    tested = [
        replace(entry, behind=None if math.isnan(apart.low) else replace(apart, p=float(p)))
        for entry, apart, p in zip(entries, differences, corrected, strict=True)
    ]
    tested.sort(key=lambda entry: -entry.metrics[main])
    finished = {entry.name for entry in tested}
    return replace(
        board,
        entries=(*tested, *(entry for entry in board.entries if entry.name not in finished)),
        metrics=metrics,
        interval=interval(metrics[main], resampled, LEVEL),
        log_loss=search.loss(held_out),
    )
