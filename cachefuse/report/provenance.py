"""The provenance of a run: its settings, features and versions, and the commands to make and use it."""

import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.run import Alignment
from cachefuse.files import JsonObject, format_bytes
from cachefuse.fusion.options import DERIVED_OPTIONS
from cachefuse.runs.folder import RunFolder
from cachefuse.runs.run import Run
from cachefuse.settings import Setting, settings_of
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.recommended import KEEPS


def train_command(run: Run) -> str:
    """Return the command that trains the same run again; for an ensemble, the command that joins its runs."""
    if run.sources:
        return shlex.join(["cachefuse", "ensemble", *run.sources, "--thresholds", run.config.thresholds])
    words = ["cachefuse", "auto" if run.leaderboard else "train-head", "--dataset", run.dataset]
    for encoder in dict.fromkeys(features.encoder for group in run.features.values() for features in group):
        words += ["--encoder", encoder]
    if run.leaderboard:
        board = run.leaderboard
        words += ["--minutes", f"{board.minutes:g}"] if board.trials is None else ["--trials", str(board.trials)]
        return shlex.join(words + _changed(run.config, [name for name in KEEPS if name != "refit"]))
    return shlex.join(words + _changed(run.config, KEEPS if len(run.models) > 1 else ()))


def align_command(run: Alignment) -> str:
    """Return the command that aligns the same encoders again."""
    words = ["cachefuse", "align", "--dataset", run.dataset]
    for encoder in dict.fromkeys(side.encoder for side in run.sides):
        words += ["--encoder", encoder]
    return shlex.join(words + _changed(run.config))


def predict_command(run: Run) -> str:
    return shlex.join(["cachefuse", "predict", "--run", run.name])


def retrieve_commands(run: Alignment) -> list[str]:
    """Return commands that search a store with an alignment, one per kind of query.

    There are none for a fine-tuned alignment: its sides are no longer aligned.
    """
    if run.parent:
        return []
    queries = {"text": ["--text", "a dog in the snow"], "image": ["--image", "photo.jpg"]}
    modalities = dict.fromkeys(side.modality for side in reversed(run.sides))
    return [
        shlex.join(["cachefuse", "retrieve", "--run", run.name, *queries[modality]])
        for modality in modalities
        if modality in queries
    ]


def extract_commands(run: Alignment) -> list[str]:
    """Return commands that add an alignment's features to a store, one for each encoder spec."""
    spec = f"aligned:{run.path or Path('workspace', 'runs', run.name)}"
    specs = [spec, f"{spec}@2"] if run.same_texts else [spec]
    return [shlex.join(["cachefuse", "extract", "--dataset", run.dataset, "--encoder", spec]) for spec in specs]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Return the facts of a run's origin and size, as (name, value)."""
    n_models = f" in {len(run.members)} models" if len(run.members) > 1 else ""
    facts = [
        ("run", run.name),
        ("created", _created(run.created)),
        ("dataset", run.dataset),
        ("title", run.manifest.title),
        ("task", run.task),
        ("classes", f"{len(run.classes):,}"),
        ("split digest", run.split_digest),
        ("ensemble of", ", ".join(run.sources)),
        ("parameters", f"{run.n_parameters:,}{n_models}"),
        ("size", format_bytes(1e6 * run.size_mb)),
        ("training took", f"{run.seconds:,.1f} s"),
        ("interrupted", "yes, at the best epoch so far" if run.interrupted else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in _versions(run.path).items())),
    ]
    return [(name, value) for name, value in facts if value]


def long_texts(encoders: Iterable[tuple[str, str]], store: FeatureStore) -> list[tuple[str, str]]:
    """Return a fact (name, value) for each of the (encoder, modality) with texts that are longer than its limit."""
    facts = []
    for encoder, modality in dict.fromkeys(encoders):
        stored = store.open_features(encoder, modality)
        long = stored.long_texts() if stored is not None else None
        if long is not None and long.message:
            facts.append(("long texts", f"{encoder}: {long.message}"))
    return facts


def alignment_provenance(run: Alignment) -> list[tuple[str, str]]:
    """Return the facts of an alignment's origin and size, as (name, value)."""
    facts = [
        ("run", run.name),
        ("created", _created(run.created)),
        ("fine-tuned from", run.parent),
        ("dataset", run.dataset),
        ("split digest", run.split_digest),
        ("parameters", f"{run.model.n_parameters:,}"),
        ("size", format_bytes(1e6 * run.model.size_mb)),
        ("temperature", f"{run.model.temperature.item():.4f}"),
        ("training took", f"{run.seconds:,.1f} s"),
        ("interrupted", "yes, at the best epoch so far" if run.history.interrupted else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in _versions(run.path).items())),
    ]
    return [(name, value) for name, value in facts if value]


def settings(run: Run) -> list[tuple[str, str]]:
    """Return the settings as (name, value)."""
    if run.leaderboard:
        return [(entry.name, f"weight {entry.weight:.2f}") for entry in run.leaderboard.chosen]
    if len(run.models) > 1:
        return [(name, f"weight {weight:.2f}") for name, weight in run.models.items()]
    heads = {} if run.config.is_generative or run.config.is_solved else run.config.head_options()
    return _named({**run.config.shown(), **heads})


def alignment_settings(run: Alignment) -> list[tuple[str, str]]:
    """Return the settings as (name, value)."""
    return _named(run.config.to_dict())


def _named(config: JsonObject) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), _text(value)) for name, value in config.items()]


def _created(created: str) -> str:
    return created.partition(".")[0].replace("T", " ") + " UTC" if created else "not saved"


def _changed(config: TrainConfig | AlignConfig, only: Collection[str] = ()) -> list[str]:
    """Return the options of settings, or of some of them, that differ from the defaults."""
    words = []
    for setting in settings_of(type(config)).values():
        value = getattr(config, setting.name)
        if (not only or setting.name in only) and value not in (None, {}, setting.default):
            words += _option(setting, value)
    return words


def _versions(path: Path | None) -> dict[str, str]:
    """Return the package versions of a saved run."""
    if path is None:
        return {}
    versions = RunFolder.peek(path).values.get("versions", {})
    return versions if isinstance(versions, dict) else {}


def _option(setting: Setting, value: Any) -> list[str]:
    option = f"--{setting.option}"
    if setting.kind is bool:
        return [option]
    if setting.kind is Mapping:
        given = {
            key: x
            for key, x in value.items()
            if x != "" and not isinstance(x, dict | None) and key not in DERIVED_OPTIONS
        }
        return [word for key, x in given.items() for word in (option, f"{key}={x}")]
    return [option, str(value) if setting.kind is float else setting.text(value)]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else str(value)
