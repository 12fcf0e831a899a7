"""The settings of a training as options."""

import typer

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.declared import HELP, declared
from cachefuse.fusion.options import DERIVED_OPTIONS, KINDS
from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig
from cachefuse_cli.shared.console import out
from cachefuse_cli.shared.setting_options import from_command_line, read, takes


def parse_config(given: Options) -> TrainConfig:
    """Build the settings from the options. Raises ConfigError for invalid values or combinations."""
    if HELP in (given["fusion_options"] or ()):
        explain_options(given["fusion"])
        raise typer.Exit()
    if given["thresholds"] == "none" and given["threshold_metric"] is not None:
        raise ConfigError("threshold-metric has no effect with --thresholds none; leave out one of them")
    return TrainConfig(**read(TrainConfig, given))


def explain_options(fusion: str) -> None:
    """Print the options of a fusion, each with its default, type and help."""
    helps = {option.name: f": {option.help}" for option in declared(fusion).options}
    options = {name: x for name, x in FUSIONS[fusion].options().items() if name not in DERIVED_OPTIONS}
    for name, default in options.items():
        out().print(f"{name}={default} ({KINDS.get(type(default), 'a value')}){helps.get(name, '')}", soft_wrap=True)
    if not options:
        out().print(f"fusion {fusion} has no options", soft_wrap=True)


def given_options(context: typer.Context) -> list[str]:
    """Return the training settings that are on the command line."""
    return from_command_line(TrainConfig, context)


takes_config = takes(TrainConfig, parse_config)
