"""The settings of a training as options, for the commands that train."""

import typer

from cachefuse.errors import ConfigError
from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig
from cachefuse_cli.shared.setting_options import from_command_line, read, takes


def parse_config(given: Options) -> TrainConfig:
    """Build the settings from what the options say. Raises ConfigError for what does not parse, or does not fit."""
    if given["thresholds"] == "none" and given["threshold_metric"] is not None:
        raise ConfigError("threshold-metric is what thresholds are chosen for; leave it out, or --thresholds none")
    return TrainConfig(**read(TrainConfig, given))


def given_options(context: typer.Context) -> list[str]:
    """Return the settings of training that were given as options."""
    return from_command_line(TrainConfig, context)


takes_config = takes(TrainConfig, parse_config)
