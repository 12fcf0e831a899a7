"""Sweeps: many settings over one cache, each with several seeds. A finished trial is never repeated."""

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cachefuse.errors import ConfigError, TrainingError
from cachefuse.experiments.costs import measure_costs
from cachefuse.experiments.files import (
    append_trials,
    only_sweep,
    read_scores,
    read_trials,
    write_results,
    write_scores,
)
from cachefuse.experiments.results import Curve, Published, SettingResult, SweepResult, Trial
from cachefuse.experiments.settings import FIXED, parse_setting
from cachefuse.feature_spec import modalities_of
from cachefuse.files import JsonObject, to_json
from cachefuse.fusion import FUSIONS
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.nn.losses import build_loss
from cachefuse.registry import Options
from cachefuse.runs.features import record_features
from cachefuse.runs.run import split_digest
from cachefuse.settings import as_stored, settings_of
from cachefuse.store.store import FeatureStore
from cachefuse.training.build import build_model
from cachefuse.training.config import FITTED, TOGETHER, TrainConfig
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData, open_training_data
from cachefuse.training.duplicates import keep_together
from cachefuse.training.held_out import HeldOut, check_calibrates, chooses_thresholds
from cachefuse.training.inference import predict_scores
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.selection import Views
from cachefuse.training.split import make_splits
from cachefuse.training.stack import max_together, shared_settings, train_together
from cachefuse.training.train import TrainedModels, train_models

RESAMPLES = 1000  # bootstrap samples

# The held-out rows, the epoch of the kept weights, and the mean weight of each modality.
Outcome = tuple[HeldOut, float, dict[str, float]] | TrainingError


@dataclass(frozen=True)
class Experiment:
    """A sweep's settings: changes to the fields of ``base``, and the published figures of each setting.

    A setting's fusion options are added to the base's. With ``costs``, each trial has an interval of its score, and
    each model's costs are measured. ``fields`` are the columns that distinguish the settings, by default all changed
    fields; ``labels`` name the settings in words. ``curves`` are their points in a plot of curves. ``paper`` describes
    the published figures. ``shown`` are the metrics of the table, by default the first ones. With ``keep_scores``, each
    trial's scores of the held-out rows are kept in the folder, and a finished trial without them is trained again.
    """

    base: TrainConfig
    settings: Sequence[Options]
    title: str = ""
    published: Sequence[Published | None] | None = None
    costs: bool = False
    fields: tuple[str, ...] | None = None
    labels: Sequence[str] | None = None
    curves: Sequence[Curve] | None = None
    paper: str = ""
    shown: tuple[str, ...] = ()
    keep_scores: bool = False


def sweep(
    store: FeatureStore,
    base: TrainConfig,
    settings: Sequence[Options],
    *,
    folder: Path,
    seeds: Sequence[int] = (0, 1, 2),
    encoders: Sequence[str] = (),
    device: str = "auto",
    on_trial: Callable[[SweepResult], None] = lambda result: None,
) -> SweepResult:
    """Train ``base`` with each of the settings and seeds on a store's features, and write the results to a folder.

    A setting holds the fields of ``base`` that it changes. Each trial is evaluated on held-out rows: val, or with folds
    all of train and val. Its thresholds are chosen as for a run. Finished and diverged trials are kept in the folder's
    ``trials.jsonl``: the same call resumes an interrupted sweep. At the end ``trials.csv``, ``summary.csv``,
    ``sweep.png`` and ``sweep.svg`` are written. ``on_trial`` gets the results so far, first with the kept trials.

    Raises ConfigError, before any training, for settings that do not fit together or do not fit the dataset.
    """
    settings = [parse_setting(setting) for setting in settings]
    data = open_training_data(store, encoders, device, views_of(base, settings))
    result = run_sweep(store, data, Experiment(base, settings), folder, seeds, on_trial)
    write_results(result, folder)
    return result


def views_of(base: TrainConfig, settings: Sequence[Options]) -> Views:
    """Return the views that the settings read."""
    configs = [_with_setting(base, parse_setting(setting)) for setting in settings] or [base]
    return lambda modality: dict.fromkeys(view for config in configs for view in config.reads(modality))


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Show each warning of a training only once, because every trial would repeat it."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in seen
        seen.add(message)
        return new

    logger = logging.getLogger("cachefuse.training.split")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


@_each_warning_once()
def run_sweep(
    store: FeatureStore,
    data: TrainingData,
    experiment: Experiment,
    folder: Path,
    seeds: Sequence[int],
    on_trial: Callable[[SweepResult], None] = lambda result: None,
) -> SweepResult:
    """Do what ``sweep`` does, with opened data; only ``trials.jsonl`` is written."""
    experiment = replace(experiment, settings=[parse_setting(setting) for setting in experiment.settings])
    base, settings = experiment.base, experiment.settings
    if not settings or not seeds or len(set(seeds)) < len(seeds):
        given = f"{len(settings)} settings and " + (f"seeds {', '.join(map(str, seeds))}" if seeds else "no seeds")
        raise ConfigError(f"a sweep needs at least one setting and one seed, each seed once. Got {given} instead")
    if base.refit:
        raise ConfigError(f"a sweep cannot refit: {FIXED['refit']}; leave out --refit")
    data = keep_together(data, base)
    configs = [[data.resolve(_with_setting(base, {**setting, "seed": seed})) for seed in seeds] for setting in settings]
    _check(data, [of_setting[0] for of_setting in configs])
    metrics = tuple(dict.fromkeys((base.monitored_metric or data.metric, *data.metrics)))
    digest = data_digest(store, data, metrics, base)
    keys = [[trial_key(digest, config) for config in of_setting] for of_setting in configs]
    config_of = dict(zip(itertools.chain(*keys), itertools.chain(*configs), strict=True))
    done: dict[str, Trial] = {}

    def so_far() -> SweepResult:
        trials = [tuple(done[key] for key in of_setting if key in done) for of_setting in keys]
        return _result(data, experiment, seeds, metrics, [of_setting[0] for of_setting in configs], trials)

    with only_sweep(folder):
        done |= {trial.key: trial for trial in read_trials(folder) if trial.key in config_of}
        if experiment.keep_scores:
            rows, n_classes = held_out_rows(data, base).numpy(), len(data.classes)
            done = {
                key: trial
                for key, trial in done.items()
                if trial.diverged or read_scores(folder, trial, rows, n_classes) is not None
            }
        on_trial(so_far())
        for batch in _trial_batches(data, {key: config for key, config in config_of.items() if key not in done}):
            trials, held_out = _run_trials(data, batch, metrics, experiment.costs)
            if experiment.keep_scores:
                digests = {key: write_scores(folder, key, scores) for key, scores in held_out.items()}
                trials = [replace(trial, scores=digests.get(trial.key, "")) for trial in trials]
            if experiment.costs:
                trials = [replace(trial, costs=measure_costs(data, batch[trial.key])) for trial in trials]
            append_trials(folder, [(trial, _stored(batch[trial.key])) for trial in trials])
            done |= {trial.key: trial for trial in trials}
            on_trial(so_far())
    return so_far()


def _result(
    data: TrainingData,
    experiment: Experiment,
    seeds: Sequence[int],
    metrics: tuple[str, ...],
    configs: Sequence[ResolvedConfig],
    trials: Sequence[tuple[Trial, ...]],
) -> SweepResult:
    """Return the results of the ``trials`` so far, by setting; ``configs`` are the resolved settings."""
    published: Sequence[Published | None] = experiment.published or [None] * len(configs)
    return SweepResult(
        title=experiment.title or data.name,
        fields=experiment.fields or tuple(dict.fromkeys(itertools.chain(*experiment.settings))),
        metrics=metrics,
        split=OUT_OF_FOLD if experiment.base.folds else VAL,
        n_rows=len(held_out_rows(data, experiment.base)),
        seeds=tuple(seeds),
        paper=experiment.paper,
        shown=tuple(name for name in experiment.shown if name in metrics),
        settings=tuple(
            SettingResult(
                _values(config),
                config,
                trials[i],
                published[i],
                experiment.labels[i] if experiment.labels else "",
                experiment.curves[i] if experiment.curves else None,
            )
            for i, config in enumerate(configs)
        ),
    )


def _with_setting(base: TrainConfig, setting: Options) -> TrainConfig:
    """Return the base with a setting's fields.

    A setting with another fusion does not get the base's fusion options, one with a fusion that is solved directly not
    those of heads and gradients.
    """
    fusion = setting.get("fusion", base.fusion)
    options = {**(base.fusion_options if fusion == base.fusion else {}), **setting.get("fusion_options", {})}
    known = settings_of(TrainConfig)
    unused = {name: known[name].default for name in FITTED} if FUSIONS[fusion].solved and fusion != base.fusion else {}
    return replace(base, **{**unused, **setting, "fusion_options": options})


def _check(data: TrainingData, configs: Sequence[ResolvedConfig]) -> None:
    """Raise the errors that training with any setting would raise at its start, before hours of training."""
    for config in configs:
        with torch.device("meta"):
            build_model(config, data.specs, len(data.classes))
        loss = build_loss(config.loss, config.loss_options)
        loss(*torch.zeros(2, 1, len(data.classes)))
        n_held_out = len(held_out_rows(data, config))
        if not n_held_out:
            raise ConfigError(f"{data.name} has no labelled validation rows to evaluate trials on; use --folds 5")
        chooses_thresholds(data, config, n_held_out)
        check_calibrates(data, config, n_held_out)
    for config in {config.folds: config for config in configs}.values():
        make_splits(data, config)


def held_out_rows(data: TrainingData, config: TrainConfig) -> torch.Tensor:
    """Return the rows that trials are measured on, (n,): val, or with folds all of train and val."""
    return data.rows(TRAIN, VAL) if config.folds else data.rows(VAL)


def _trial_batches(data: TrainingData, pending: Mapping[str, ResolvedConfig]) -> Iterator[dict[str, ResolvedConfig]]:
    """Yield batches of trials that can be trained together, in order, each with as many as fit in memory."""
    left = {key: (config, shared_settings(config, data.device)) for key, config in pending.items()}
    n_rows = len(data.rows(TRAIN, VAL))
    while left:
        first, shared = next(iter(left.values()))
        n = 1 if shared is None else max_together(data, first, n_rows)
        keys = itertools.islice((key for key, (_, settings) in left.items() if settings == shared), n)
        yield {key: left.pop(key)[0] for key in list(keys)}


def _run_trials(
    data: TrainingData, batch: Mapping[str, ResolvedConfig], metrics: Sequence[str], intervals: bool
) -> tuple[list[Trial], dict[str, HeldOut]]:
    """Train a batch of trials; return them with their figures, and the held-out scores of each that did not diverge."""
    begun = time.perf_counter()
    configs = list(batch.values())
    outcomes = _train_alone(data, configs[0]) if len(configs) == 1 else _train_together(data, configs)
    figures = [
        {} if isinstance(outcome, TrainingError) else _figures(data, config, outcome[0], metrics)
        for config, outcome in zip(configs, outcomes, strict=True)
    ]
    seconds = (time.perf_counter() - begun) / len(batch)
    trials, scores = [], {}
    for key, outcome, values in zip(batch, outcomes, figures, strict=True):
        if isinstance(outcome, TrainingError):
            trials.append(Trial(key, batch[key].seed, values, math.nan, seconds, str(outcome)))
            continue
        held_out, epoch, weights = outcome
        interval = _interval(data, batch[key], held_out, metrics[0]) if intervals else None
        trials.append(Trial(key, batch[key].seed, values, epoch, seconds, interval=interval, weights=weights))
        scores[key] = held_out
    return trials, scores


def _interval(data: TrainingData, config: ResolvedConfig, held_out: HeldOut, metric: str) -> tuple[float, float]:
    """Return the 95% interval of a metric on the held-out rows."""
    rows = torch.from_numpy(held_out.rows)
    arrays = data.targets(rows), *held_out.decided(data, config)
    return bootstrap_intervals(*arrays, data.bind([metric]), RESAMPLES, groups=data.groups_of(rows))[metric]


def _figures(data: TrainingData, config: ResolvedConfig, held_out: HeldOut, metrics: Sequence[str]) -> dict[str, float]:
    arrays = data.targets(torch.from_numpy(held_out.rows)), *held_out.decided(data, config)
    return {name: metric(*arrays) for name, metric in data.bind(metrics).items()}


def _train_alone(data: TrainingData, config: ResolvedConfig) -> list[Outcome]:
    data = data.shuffled(config)
    try:
        trained = train_models(data, config)
    except TrainingError as error:
        return [error]
    assert trained.held_out is not None  # _check requires held-out rows
    best = float(np.mean([history.best_epoch for history in trained.histories]))
    return [(trained.held_out, best, _modality_weights(data, trained))]


def _modality_weights(data: TrainingData, trained: TrainedModels) -> dict[str, float]:
    """Return the mean weight of each modality, over the rows that each model has not seen."""
    assert trained.held_out is not None
    weights: list[torch.Tensor] = []
    held_out = trained.held_out
    for member in trained.members:
        model = member.model
        if not model.weighs:
            return {}
        rows = held_out.rows if member.fold is None else held_out.rows[held_out.parts == member.fold]
        weights.append(data.table.only(model.specs).map(model.eval().modality_weights, torch.from_numpy(rows)))
    means = torch.cat(weights).double().flatten(0, -2).mean(0).tolist()  # (n, M), or of K tasks (n, K, M)
    return dict(zip(modalities_of(trained.members[0].model.specs.values()), means, strict=True))


def _train_together(data: TrainingData, configs: Sequence[ResolvedConfig]) -> list[Outcome]:
    splits = make_splits(data, configs[0])
    scores: list[list[np.ndarray]] = [[] for _ in configs]
    diverged: dict[int, TrainingError] = {}
    for split in splits:
        for i, model in enumerate(train_together(data, configs, split)):
            try:
                if isinstance(model, TrainingError):
                    raise model
                loss = configs[i].loss
                scores[i].append(predict_scores(model, data.table.only(model.specs), split.held_out, loss))
            except TrainingError as error:
                diverged.setdefault(i, error)
    name, rows = OUT_OF_FOLD if configs[0].folds else VAL, [split.held_out for split in splits]
    outcomes: list[Outcome] = []
    for i, config in enumerate(configs):
        held_out = None if i in diverged else HeldOut.join(name, data, rows, scores[i])
        outcomes.append((held_out, float(config.epochs), {}) if held_out is not None else diverged[i])
    return outcomes


def _values(config: ResolvedConfig) -> JsonObject:
    """Return all settings by name, with the head's default layers if none are given."""
    return {**asdict(config), "layers": tuple(config.head_options()["layers"])}


def _stored(config: ResolvedConfig) -> JsonObject:
    """Return all settings by their names in files."""
    return as_stored(TrainConfig, _values(config))


def trial_key(digest: str, config: ResolvedConfig) -> str:
    """Hash everything that a trial depends on."""
    settings = {name: value for name, value in _stored(config).items() if name != "duplicates"}  # the digest has it
    text = to_json({"data": digest, "settings": settings})
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def data_digest(store: FeatureStore, data: TrainingData, metrics: Sequence[str], base: TrainConfig) -> str:
    """Hash what all trials share: keys of the features, samples and splits, groups, targets, and metrics."""
    features = record_features(data.stored, data.specs)
    shared = {
        "features": {
            name: [(entry.encoder, entry.key, entry.width) for entry in group] for name, group in features.items()
        },
        "splits": split_digest(store),
        "classes": data.classes,
        "task": data.task,
        "min_labels": data.min_labels,
        "metrics": tuple(metrics),
    }
    digest = hashlib.blake2b(to_json(shared).encode("utf-8", "surrogatepass"), digest_size=16)
    present = (mask.cpu().numpy() for mask in data.table.present.values())
    for x in (store.targets, data.table.labelled, *present):
        digest.update(x.tobytes())
    if data.groups is not None and (store.groups is not None or base.duplicates == TOGETHER):
        digest.update(data.groups.tobytes())  # those of shared inputs follow from the samples
    return digest.hexdigest()
