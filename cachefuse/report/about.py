"""Where a run comes from: its settings, features and versions, and the commands that make it and use it."""

import shlex
from dataclasses import fields
from typing import Any

from cachefuse.runtime import format_bytes
from cachefuse.training.config import TrainConfig
from cachefuse.training.run import Run
from cachefuse.training.run_files import read_json


def train_command(run: Run) -> str:
    """Return the command that trains the same run again; of an ensemble, the one that joins its sources."""
    if run.sources:
        return shlex.join(["cachefuse", "ensemble", *run.sources, "--thresholds", run.config.thresholds])
    words = ["cachefuse", "train-head", "--dataset", run.dataset]
    for encoder in dict.fromkeys(used.encoder for group in run.features.values() for used in group):
        words += ["--encoder", encoder]
    for field in fields(TrainConfig):
        value = getattr(run.config, field.name)
        if value not in (None, {}, field.default):
            words += _option(field.name, value)
    return shlex.join(words)


def predict_command(run: Run) -> str:
    return shlex.join(["cachefuse", "predict", "--run", run.name])


def provenance(run: Run) -> list[tuple[str, str]]:
    """Return what made the run and what it came to, as names and values."""
    n_models = f" in {len(run.members)} models" if len(run.members) > 1 else ""
    facts = [
        ("run", run.name),
        ("created", run.created.partition(".")[0].replace("T", " ") + " UTC" if run.created else "not saved"),
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
        ("versions", ", ".join(f"{name} {version}" for name, version in _versions(run).items())),
    ]
    return [(name, value) for name, value in facts if value]


def settings(run: Run) -> list[tuple[str, str]]:
    """Return each setting's name and value."""
    config = {**run.config.to_dict(), **run.config.head_options(), "lr": run.config.learning_rate}
    return [(name.replace("_", "-"), _text(value)) for name, value in config.items()]


def _versions(run: Run) -> dict[str, str]:
    """Return the versions that a saved run was made with."""
    if run.path is None:
        return {}
    versions = read_json(run.path / "run.json").get("versions", {})
    return versions if isinstance(versions, dict) else {}


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    if name == "loss_options":
        return [word for key, number in value.items() for word in (option, f"{key}={number}")]
    if name == "layers":
        return [option, ",".join(map(str, value))]
    return [option, "all" if (name, value) == ("batch_size", 0) else str(value)]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else str(value)
