"""Saving and loading a run: a directory of only JSON and safetensors, so that loading runs no code.

run.json              settings, classes, members with their features and keys, thresholds, calibration, metrics,
                      versions; the checksums of the files that loading reads, and its own
model.safetensors     each member's weights and the statistics of its training rows
history.json          loss and score of each epoch
held_out.safetensors  scores of the held-out rows, by models that have not seen them
leaderboard.csv       what a search has tried
README.md             the model card, which people may edit: nothing reads it, and it has no checksum
"""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import save

from cachefuse.data.answers import EVALUATION
from cachefuse.data.manifest import VQA
from cachefuse.encoders.base import is_derived
from cachefuse.files import JsonObject, to_json
from cachefuse.runs.features import specs_of
from cachefuse.runs.files import held_out_bytes, load_held_out, load_weights, named_errors, read_description
from cachefuse.runs.folder import (
    ABOUT,
    FORMATS,
    HEAD,
    HELD_OUT,
    HISTORY,
    LEADERBOARD,
    WEIGHTS,
    RunFolder,
    finish_run,
    time_of_creation,
    write_run,
)
from cachefuse.runs.leaderboard import Leaderboard
from cachefuse.runs.model_card import model_card
from cachefuse.runs.run import Member, Run
from cachefuse.training.build import build_model
from cachefuse.training.held_out import Result
from cachefuse.training.loop import History
from cachefuse.training.resolved import ResolvedConfig

VERSIONS = ("cachefuse", "torch", "numpy", "scikit-learn", "zarr")


def save_run(run: Run, runs: Path) -> Path:
    """Write the run to a new directory in ``runs``, which appears only when complete."""
    run.created = time_of_creation(runs)
    tensors = {
        f"{i}.{name}": tensor.cpu().contiguous()
        for i, member in enumerate(run.members)
        for name, tensor in member.model.state_dict().items()
    }
    files = {WEIGHTS: save(tensors)}
    if run.held_out is not None:
        files[HELD_OUT] = held_out_bytes(run.held_out)
    if run.leaderboard is not None:
        files[LEADERBOARD] = run.leaderboard.as_csv()
    files[HISTORY] = to_json({"histories": [asdict(history) for history in run.histories]}).encode()

    def card(name: str) -> bytes:
        run.name = name
        return model_card(run).encode()

    run.path = write_run(runs, run.name, _to_dict(run), files, card)
    for encoder, _ in run.encoders:
        if is_derived(encoder):  # of an alignment that was tuned for this run
            finish_run(runs / encoder.partition(":")[2])
    return run.path


def load_run(path: Path) -> Run:
    """Open a run directory. Raises RunError, naming the file, if a file is missing, damaged or not valid."""
    folder = RunFolder.open(path, HEAD)
    about = read_description(folder)
    with named_errors(path / ABOUT):
        config = ResolvedConfig.from_run(about.config, about.manifest.task)
        tasks = about.manifest.task_slices(about.classes)
        members = []
        for member in about.members:
            settings = ResolvedConfig.from_run(member.config, about.manifest.task)
            specs = specs_of(member.features)
            with torch.device("meta"):  # no memory is allocated before the weights' file has shown these shapes
                model = build_model(settings, specs, len(about.classes), tasks)
            calibration = member.calibration.open() if member.calibration else None
            members.append(Member(settings, member.features, model, member.weight, member.fold, calibration))
        leaderboard = TypeAdapter(Leaderboard | None).validate_python(about.leaderboard)
    values = folder.read_json(HISTORY)
    with named_errors(path / HISTORY):
        histories = TypeAdapter(list[History]).validate_python(values["histories"])
    load_weights([member.model for member in members], folder)
    return Run(
        name=path.resolve().name,
        dataset=about.dataset,
        manifest=about.manifest,
        classes=about.classes,
        config=config,
        members=members,
        thresholds=np.array(about.thresholds),
        calibration=about.calibration.open() if about.calibration else None,
        histories=histories,
        held_out=load_held_out(folder, about),
        split_digest=about.split_digest,
        calibration_errors=about.calibration_errors,
        results={split: Result(**result.model_dump()) for split, result in about.results.items()},
        sources=about.sources,
        leaderboard=leaderboard,
        seconds=about.seconds,
        created=about.created,
        path=path,
    )


def _to_dict(run: Run) -> JsonObject:
    return {
        "kind": HEAD,
        "format": FORMATS[HEAD],
        "created": run.created,
        "dataset": run.dataset,
        **({"answers": EVALUATION} if run.task == VQA else {}),
        "manifest": run.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "classes": list(run.classes),
        "config": run.config.to_dict(),
        "members": [
            {
                "config": member.config.to_dict(),
                "features": {name: list(map(asdict, group)) for name, group in member.features.items()},
                "weight": member.weight,
                "fold": member.fold,
                **({"calibration": member.calibration.as_dict()} if member.calibration else {}),
            }
            for member in run.members
        ],
        "sources": list(run.sources),
        "thresholds": run.thresholds.tolist(),
        "calibration": run.calibration.as_dict() if run.calibration else None,
        "calibration_errors": run.calibration_errors,
        "split_digest": run.split_digest,
        "interrupted": run.interrupted,
        "results": {split: asdict(result) for split, result in run.results.items()},
        "caution": run.caution,
        "leaderboard": asdict(run.leaderboard) if run.leaderboard else None,
        "seconds": round(run.seconds, 3),
        "parameters": run.n_parameters,
        "size_mb": round(run.size_mb, 6),
        "versions": {name: version(name) for name in VERSIONS},
    }
