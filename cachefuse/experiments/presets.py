"""The experiments of "Multimodal multilabel classification with CLIP" (MMC), section 4, with its published figures.

The paper trains on 25,000 rows and validates on 5,000, with all rows per step and Adam. It reports the last epoch's
samples-F1: the mean over runs in per cent with its standard deviation. Its heads read CLIP ViT-L/14 features (width
768).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cachefuse.errors import ConfigError
from cachefuse.experiments.files import write_results
from cachefuse.experiments.recipe import fit_task, with_layers
from cachefuse.experiments.recipes import MMC_BASE, MMC_TABLES, SWEEPS
from cachefuse.experiments.results import Published, SweepResult
from cachefuse.experiments.sweep import Experiment, run_sweep, views_of
from cachefuse.experiments.token_presets import TOKEN_PRESETS
from cachefuse.files import JsonObject
from cachefuse.registry import Options, lookup
from cachefuse.runs.run import Run
from cachefuse.runs.train import train_run
from cachefuse.settings import settings_of
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, TrainingData
from cachefuse.training.selection import Views, pooled

PAPER_ROWS = 25_000  # to train on
PAPER_TASK = ("multilabel", ("multilabel",))
BASE = MMC_BASE.train_config(*PAPER_TASK)
PAPER_ASL = {"gamma_negative": 4.0, "gamma_positive": 1.0, "clip": 0.05}
DIVERGED = (math.nan, math.nan)


def _preset(name: str, rows: Sequence[tuple[JsonObject, Published]]) -> Experiment:
    """Build an experiment of settings with their printed figures in per cent."""
    recipe = MMC_TABLES[name]
    return Experiment(
        base=recipe.train_config(*PAPER_TASK),
        settings=[setting for setting, _ in rows],
        title=f"MMC {recipe.title}",
        paper="paper: samples-F1 of 5,000 rows, with CLIP features and 25,000 training rows",
        published=[(round(mean / 100, 6), round(std / 100, 6)) for _, (mean, std) in rows],
    )


PRESETS = {
    "mmc-heads": _preset(
        "mmc-heads",
        [({"head": "mlp"}, (85.533, 0.001)), ({"head": "gmlp"}, (83.506, 0.000))],
    ),
    "mmc-fusion": _preset(
        "mmc-fusion",
        [
            ({"fusion": "image"}, (85.375, 0.051)),
            ({"fusion": "text"}, (82.493, 0.000)),
            ({"fusion": "sum"}, (86.338, 0.005)),
            ({"fusion": "concat"}, (85.779, 0.000)),
            ({"fusion": "mixed"}, (86.120, 0.011)),
        ],
    ),
    "mmc-losses": _preset(
        "mmc-losses",
        [
            ({"loss": "bce", "loss_options": {}}, (86.443, 0.005)),
            ({"loss": "focal", "loss_options": {}}, (86.432, 0.005)),
            ({"loss": "asl", "loss_options": PAPER_ASL}, (85.051, 0.005)),
        ],
    ),
    "mmc-layers": _preset(
        "mmc-layers",
        [
            ({"layers": (2048,)}, (86.295, 0.000)),
            ({"layers": (2048, 512)}, (86.526, 0.000)),
            ({"layers": (2048, 1024, 512)}, (86.258, 0.000)),
        ],
    ),
    "mmc-batch": _preset(
        "mmc-batch",
        [
            ({"batch_size": 25_000, "lr": 1e-3}, (86.531, 0.001)),
            ({"batch_size": 25_000, "lr": 1e-2}, (80.136, 0.003)),
            ({"batch_size": 25_000, "lr": 1e-1}, (59.163, 0.001)),
            ({"batch_size": 10_000, "lr": 1e-3}, (85.890, 0.000)),
            ({"batch_size": 10_000, "lr": 1e-2}, (80.292, 0.002)),
            ({"batch_size": 10_000, "lr": 1e-1}, (59.163, 0.000)),
            ({"batch_size": 5_000, "lr": 1e-3}, (84.721, 0.003)),
            ({"batch_size": 5_000, "lr": 1e-2}, (80.160, 0.002)),
            ({"batch_size": 5_000, "lr": 1e-1}, DIVERGED),  # printed as 0.000
        ],
    ),
    "mmc-epochs": _preset(
        "mmc-epochs",
        [
            ({"epochs": 100}, (84.586, 0.000)),
            ({"epochs": 200}, (86.496, 0.000)),
            ({"epochs": 300}, (86.554, 0.001)),
            ({"epochs": 400}, (85.770, 0.000)),
        ],
    ),
    "mmc-activation": _preset(
        "mmc-activation",
        [
            ({"activation": "gelu"}, (86.554, 0.001)),
            ({"activation": "relu"}, (86.050, 0.000)),
            ({"activation": "leaky_relu"}, (86.267, 0.000)),
        ],
    ),
    "mmc-dropout": _preset(
        "mmc-dropout",
        [
            ({"activation": "gelu", "dropout": 0.0}, (85.955, 0.001)),
            ({"activation": "gelu", "dropout": 0.2}, (86.297, 0.001)),
            ({"activation": "gelu", "dropout": 0.5}, (86.554, 0.000)),
            ({"activation": "gelu", "dropout": 0.6}, (86.606, 0.000)),
            ({"activation": "gelu", "dropout": 0.8}, (86.202, 0.000)),
            ({"activation": "leaky_relu", "dropout": 0.0}, (85.269, 0.000)),
            ({"activation": "leaky_relu", "dropout": 0.2}, (85.927, 0.000)),
            ({"activation": "leaky_relu", "dropout": 0.5}, (86.267, 0.001)),
            ({"activation": "leaky_relu", "dropout": 0.6}, (86.349, 0.000)),
            ({"activation": "leaky_relu", "dropout": 0.8}, (86.516, 0.001)),
        ],
    ),
}
CHAIN = ("mmc-layers", "mmc-batch", "mmc-epochs", "mmc-activation", "mmc-dropout")  # the steps of table 5
GREEDY = "mmc-greedy"


def preset(name: str, data: TrainingData, changes: Options | None = None) -> Experiment:
    """Return a preset for the training data, with changes to its base settings.

    Batch sizes are the same shares of the training rows as in the paper. Raises UnknownNameError for an unknown name,
    ConfigError for a change of a setting that the preset varies.
    """
    if name in TOKEN_PRESETS:
        token_preset, kinds = TOKEN_PRESETS[name], [task.kind for task in data.tasks]
        config = token_preset.recipe.train_config(data.task, kinds, changes)
        return _as_changed(token_preset.make(data, config), changes or {})
    experiment: Experiment = lookup({**PRESETS, **TOKEN_PRESETS}, name, "preset")
    base = _apply_changes(name, experiment.base, changes or {}, experiment.settings)
    base = fit_task(base, data.task, [task.kind for task in data.tasks], changes or {})
    # The paper's figures are samples-F1 of several labels a row.
    same = (data.task, base.monitor) == ("multilabel", experiment.base.monitor)
    published = experiment.published if same else None
    settings = [_scaled(setting, data, base) for setting in experiment.settings]
    return _as_changed(replace(experiment, base=base, settings=settings, published=published), changes or {})


def _as_changed(experiment: Experiment, changes: Options) -> Experiment:
    """Return an experiment without the paper's figures if the model or the loss is another."""
    known = settings_of(TrainConfig)
    others = [f"{name} {known[name].text(changes[name])}" for name in ("fusion", "head", "loss") if name in changes]
    if not others:
        return experiment
    return replace(experiment, title=f"{experiment.title}, changed: {', '.join(others)}", published=None)


def fusion_of(name: str) -> str:
    """Return the fusion of a preset. Raises UnknownNameError for an unknown name."""
    fusion: str = lookup(SWEEPS, name, "preset").values()["fusion"]
    return fusion


def preset_views(name: str, changes: Options) -> Views:
    """Return the views that a preset's settings read."""
    if name not in TOKEN_PRESETS:
        return pooled
    token_preset = TOKEN_PRESETS[name]
    return views_of(token_preset.recipe.train_config(*PAPER_TASK, changes), token_preset.reads)


def greedy(
    store: FeatureStore,
    data: TrainingData,
    folder: Path,
    seeds: Sequence[int],
    changes: Options | None = None,
    on_trial: Callable[[SweepResult], None] = lambda result: None,
) -> tuple[list[SweepResult], Run]:
    """Choose one setting after another, each by its mean over the seeds, and train the best on every labelled row.

    The paper finds its best pipeline this way: layers, then batch size and learning rate, epochs, activation, dropout.
    Returns the sweeps, with results written to a folder per step, and the run, which is not saved.
    """
    tried = [setting for name in CHAIN for setting in PRESETS[name].settings]
    base = _apply_changes(GREEDY, BASE, changes or {}, [*tried, {"refit": True}])
    base = fit_task(base, data.task, [task.kind for task in data.tasks], changes or {})
    chosen: JsonObject = {}
    results = []
    for step, name in enumerate(CHAIN, 1):
        experiment = _after(_as_changed(preset(name, data, {"folds": base.folds}), changes or {}), chosen)
        title = f"step {step} of {len(CHAIN)}, {experiment.title}"
        experiment = replace(experiment, base=replace(base, **chosen), title=title)
        results.append(run_sweep(store, data, experiment, folder, seeds, on_trial))
        write_results(results[-1], folder / f"{step}-{name.removeprefix('mmc-')}")
        best = results[-1].settings.index(results[-1].best)
        chosen |= experiment.settings[best]
    run = train_run(store, data, replace(base, **chosen, refit=True, seed=seeds[0]))
    return results, run


def _apply_changes(name: str, base: TrainConfig, changes: Options, tried: Sequence[Options]) -> TrainConfig:
    clash = [field for field in changes if any(field in setting for setting in tried)]
    if clash:
        raise ConfigError(f"preset {name} varies {clash[0]} itself; leave out --{clash[0].replace('_', '-')}")
    return replace(base, **with_layers(base.head, changes))


def _scaled(setting: Options, data: TrainingData, base: TrainConfig) -> JsonObject:
    """Return a setting whose batch size is the same share of the training rows as in the paper; 0 means all rows."""
    if "batch_size" not in setting:
        return dict(setting)
    n = len(data.rows(TRAIN))
    if base.folds:
        n = len(data.rows(TRAIN, VAL)) * (base.folds - 1) // base.folds
    share = setting["batch_size"] / PAPER_ROWS
    return {**setting, "batch_size": math.ceil(share * n) if share < 1 else 0}


def _after(experiment: Experiment, chosen: Options) -> Experiment:
    """Return the settings to try after some fields are chosen; these choices may differ from the paper's."""
    printed: Sequence[Published | None] = experiment.published or [None] * len(experiment.settings)
    rows = list(zip(experiment.settings, printed, strict=True))
    left = [row for row in rows if all(chosen.get(field, value) == value for field, value in row[0].items())]
    if not left:
        left = [(setting, None) for setting, _ in rows]
    settings: dict[str, tuple[JsonObject, Published | None]] = {}
    for setting, figures in left:
        open_fields = {field: value for field, value in setting.items() if field not in chosen}
        settings.setdefault(repr(open_fields), (open_fields, figures))
    open_settings, published = zip(*settings.values(), strict=True)
    return replace(experiment, settings=open_settings, published=published)
