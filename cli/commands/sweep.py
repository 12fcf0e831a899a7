"""`cachefuse sweep`."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject, slug, to_json
from cachefuse.registry import lookup
from cachefuse.training.config import TrainConfig
from cachefuse_cli.shared.options import (
    WORKSPACE,
    Device,
    Json,
    StoreName,
    Threads,
    UsedEncoders,
    Workspace,
    open_store,
)
from cachefuse_cli.shared.train_options import given_options, takes_config

TRIALS = "Trials"
PRESET_NAMES = (
    "mmc-heads, mmc-fusion, mmc-losses, mmc-layers, mmc-batch, mmc-epochs, mmc-activation, mmc-dropout, mmc-greedy, "
    "cma-irrelevant, lit-table, where-to-fuse"
)


def _option(*names: str, metavar: str, help: str, **about: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=TRIALS, **about)


@takes_config
def sweep(
    config: Callable[..., TrainConfig],
    context: typer.Context,
    grid: Annotated[
        list[str] | None,
        _option(
            "--grid",
            metavar="NAME=A,B",
            help='Values of an option: dropout=0,0.5, or "layers=512 2048,512" for lists; repeatable.',
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        _option(
            "--settings", metavar="FILE", help=r"Instead: a TOML file with a \[\[setting]] table for each setting."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        _option(
            "--preset", metavar="NAME", help=f"Instead: a published experiment (see cachefuse presets): {PRESET_NAMES}."
        ),
    ] = None,
    seeds: Annotated[
        int, _option("--seeds", metavar="S", help="Trials per setting; the first seed is --seed.", min=1, max=1000)
    ] = 3,
    name: Annotated[
        str | None,
        _option("--name", metavar="NAME", help="The folder, in <workspace>/sweeps.", show_default="from the settings"),
    ] = None,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Try many settings over one cache, each with several seeds; a finished trial is never run again.

    All other options apply to every trial. Linear heads train together, many times faster. No run is
    kept: train the best setting with train-head.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("finished trials are kept; run the same command again to resume"):
        with render.status("loading features"):
            from cachefuse.experiments import presets
            from cachefuse.experiments.files import write_results
            from cachefuse.experiments.sweep import Experiment, run_sweep, views_of
            from cachefuse.runs.save import save_run
            from cachefuse.training.data import open_training_data
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared import sweep_tables

            names = given_options(context)
            fusion = presets.fusion_of(preset) if preset and "fusion" not in names else None
            base = config(fusion=fusion) if fusion else config()
            changes = {field: getattr(base, field) for field in names if field != "seed"}
            tried = _tried(grid, settings, preset, changes)
            store = open_store(workspace, dataset)
            views = presets.preset_views(preset, changes) if preset else views_of(base, tried)
            data = open_training_data(store, encoder or (), device, views)
            label = name or f"{store.dataset}-{preset or _hash(base, tried, encoder)}"
            folder = workspace / "sweeps" / slug(label)
            numbers = range(base.seed, base.seed + seeds)
        with sweep_tables.SweepProgress() as progress:
            if preset == presets.GREEDY:
                results, run = presets.greedy(store, data, folder, numbers, changes, progress.update)
                save_run(run, WorkspacePaths(workspace).runs)
            else:
                experiment = presets.preset(preset, data, changes) if preset else Experiment(base, tried)
                results, run = [run_sweep(store, data, experiment, folder, numbers, progress.update)], None
                write_results(results[0], folder)
    if json:
        render.print_json(sweep_tables.sweeps_dict(results, folder, run))
    else:
        sweep_tables.sweeps_report(results, folder, run)


def _tried(
    grid: Sequence[str] | None, settings: Path | None, preset: str | None, given: Collection[str]
) -> list[JsonObject]:
    """Return the settings to try; an empty list for a preset."""
    from cachefuse.experiments.presets import GREEDY, PRESETS
    from cachefuse.experiments.settings import grid as combine
    from cachefuse.experiments.settings import parse_setting
    from cachefuse.experiments.token_presets import TOKEN_PRESETS

    if [grid, settings, preset].count(None) != 2:
        raise ConfigError("a sweep needs exactly one of --grid, --settings and --preset")
    if preset is not None:
        lookup({**PRESETS, **TOKEN_PRESETS, GREEDY: None}, preset, "preset")
        return []
    values = _read_settings(settings) if settings else combine(_parse_grid(grid or ()))
    tried = [parse_setting(setting) for setting in values]
    for name in given:
        if tried and all(name in setting for setting in tried):
            raise ConfigError(f"every setting has its own {name}; leave out --{name.replace('_', '-')}")
    return tried


def _parse_grid(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    from cachefuse.experiments.settings import grid_values

    values: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, choices = text.partition("=")
        if not equals:
            raise ConfigError(f"a grid must be given as dropout=0,0.5. Got {text!r} instead")
        field = name.strip().replace("-", "_")
        if field in values:
            raise ConfigError(f"the grid has {name} twice; give all its values in one --grid")
        values[field] = grid_values(field, choices)
    return values


def _read_settings(path: Path) -> list[JsonObject]:
    import tomllib  # imported late, as hashlib below: other commands do not need them

    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # from TOML or UTF-8
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    tables = values.pop("setting", None)
    if values or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: must have one [[setting]] table for each setting, and nothing else")
    return [{name.replace("-", "_"): value for name, value in table.items()} for table in tables]


def _hash(base: TrainConfig, tried: Sequence[JsonObject], encoders: Sequence[str] | None) -> str:
    """Return a short name for the settings and encoders, independent of the seeds."""
    import hashlib

    text = to_json([base.with_seed(0).to_dict(), [dict(setting) for setting in tried], encoders])
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
