"""The settings of a training as options: one for each field of TrainConfig, shared by the commands that train."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.nn import ACTIVATIONS, HEADS, LOSSES
from cachefuse.registry import Options
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.config import TrainConfig

MODEL, TRAINING, CHOOSING = "Model", "Training", "Choosing and measuring"
GIVEN = {
    "fusion": "fusion-options are given as depth=2",
    "loss": "loss-options are given as gamma=2",
    "shuffle": "shuffle is given as text=0.5",
}


def choices(table: Iterable[str]) -> str:
    """Return names as a list in a sentence."""
    return ", ".join(table) + "."


def option(kind: Any, panel: str, metavar: str, help: str, shown: str | None = None) -> Any:
    """Return the annotation of an option in a panel of the help."""
    return Annotated[kind, typer.Option(metavar=metavar, help=help, rich_help_panel=panel, show_default=shown or True)]


OPTIONS = {
    "view": option(str, MODEL, "NAME", "pooled, or tokens, which head gmlp gates along."),
    "fusion": option(str, MODEL, "NAME", choices(FUSIONS)),
    "fusion_options": option(
        list[str] | None, MODEL, "KEY=X",
        "cma: depth 2, width 256, heads 4, dropout 0.1, pool; lit: grid, text_model; midfusion: fusion_spec, pool, "
        "depth 4, width 256, decoder_layers 0, answers=text, t5; tirg: query image, width 512.",
    ),
    "without": option(
        list[str] | None, MODEL, "PART",
        "Leave a part out. cma: modality-attention, sequence-attention; lit: tirg, image.",
    ),
    "scheme": option(str, MODEL, "NAME", "joint, or staged: each head alone, then what joins them."),
    "stages": option(str | None, MODEL, "LIST", "cma: warm-up,tuning, the latter of attentions and heads.", "one"),
    "head": option(str, MODEL, "NAME", choices(HEADS)),
    "layers": option(str | None, MODEL, "LIST", "Hidden widths: 2048,512.", "512"),
    "activation": option(str, MODEL, "NAME", choices(ACTIVATIONS)),
    "dropout": option(float | None, MODEL, "P", "In the head's hidden layers.", "0.8; over tokens: 0.2; lit: 0.1"),
    "modality_dropout": option(float, MODEL, "P", "Train without each modality in so many of the rows."),
    "shuffle": option(
        list[str] | None, TRAINING, "MODALITY=X", "Give a share of the rows another's: what if it is irrelevant?"
    ),
    "loss": option(str | None, TRAINING, "NAME", choices(LOSSES), "asl, multi-class: ce"),
    "loss_options": option(
        list[str] | None, TRAINING, "KEY=X",
        "asl: gamma_negative 3, gamma_positive 0, clip 0; focal: gamma 3; ce: smoothing 0; all: reduction mean.",
    ),
    "class_weights": option(str, TRAINING, "NAME", "none, balanced, or effective (number of rows)."),
    "sampler": option(str, TRAINING, "NAME", "shuffle, or balanced: rows of rare classes more often."),
    "optimizer": option(str, TRAINING, "NAME", choices(OPTIMIZERS)),
    "lr": option(
        float | None, TRAINING, "X", "Learning rate.", "1e-3, sgd: 0.05, lbfgs: 1; over tokens: 3e-4; lit: 5e-5"
    ),
    "schedule": option(str | None, TRAINING, "NAME", choices(SCHEDULES), "cosine; lbfgs: constant"),
    "weight_decay": option(
        float | None, TRAINING, "X", "L2 penalty; apart from the gradient in adamw.",
        "0; lbfgs: 0.003; cma, midfusion: 1e-4",
    ),
    "clip_norm": option(float, TRAINING, "X", "Clip the gradient's norm; 0: never."),
    "ema": option(float, TRAINING, "D", "Decay of averaged weights, such as 0.999; 0: none."),
    "epochs": option(int | None, TRAINING, "N", "At most.", "50, or 500 steps; lbfgs: 20; over tokens: 15; lit: 30"),
    "batch_size": option(str | None, TRAINING, "N", "Rows a step, or all.", "256; over tokens: 64; lit: 128"),
    "accumulate": option(int, TRAINING, "N", "Pass a step's rows in N parts, where they take too much memory."),
    "patience": option(int, TRAINING, "N", "Stop after N epochs without a better validation score; 0: never."),
    "monitor": option(str | None, TRAINING, "METRIC", "What that score is.", "the dataset's first"),
    "thresholds": option(
        str, CHOOSING, "KIND", "global, class (one a class), none (0.5), or auto: global where rows are held out."
    ),
    "threshold_metric": option(
        str | None, CHOOSING, "METRIC", "Choose them for micro_f1, macro_f1 or samples_f1.", "the dataset's first such"
    ),
    "folds": option(int, CHOOSING, "K", "Train K models on train and val, each measured on what it has not seen."),
    "members": option(int, CHOOSING, "S", "Average S models that differ in their seed."),
    "refit": option(bool, CHOOSING, "", "Then train on all of train and val."),
    "seed": option(int, CHOOSING, "N", "Same seed, machine, libraries and threads: same result."),
}  # fmt: skip


DEFAULTS = dict.fromkeys(("layers", "batch_size", "loss_options", "fusion_options", "without", "shuffle", "stages"))


def takes(
    config: Any, annotations: Options, defaults: Options, parse: Callable[[Options], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: a command that has a parameter ``config`` gets an option for each field of a dataclass.

    What it is called with is a function without arguments that parses them.
    """
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default), annotation=annotations[field.name],
        )
        for field in fields(config)
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "config"
        ]

        def with_options(**values: Any) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            command(config=lambda: parse(given), **values)

        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        vars(with_options)["__signature__"] = inspect.Signature([*options, *own])
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*options, *own)}
        return with_options

    return decorate


def parse_config(given: Options) -> TrainConfig:
    """Build the settings from what the options say. Raises ConfigError for what does not parse, or does not fit."""
    if given["thresholds"] == "none" and given["threshold_metric"] is not None:
        raise ConfigError("threshold-metric is what thresholds are chosen for; leave it out, or --thresholds none")
    return TrainConfig(
        **{
            **given,
            "layers": _parse_layers(given["layers"]),
            "batch_size": _parse_batch_size(given["batch_size"]),
            "fusion_options": _parse_pairs(given["fusion_options"] or (), "fusion"),
            "shuffle": {
                name: _number(f"shuffle {name}", value)
                for name, value in _parse_pairs(given["shuffle"] or (), "shuffle").items()
            },
            "without": tuple(dict.fromkeys(given["without"] or ())),
            "stages": tuple(name.strip() for name in (given["stages"] or "").split(",") if name.strip()),
            "loss_options": {
                name: value if name == "reduction" else _number(f"loss option {name}", value)
                for name, value in _parse_pairs(given["loss_options"] or (), "loss").items()
            },
        }
    )


def given_options(context: typer.Context) -> list[str]:
    """Return the settings of training that were given as options."""
    sources = {field.name: context.get_parameter_source(field.name) for field in fields(TrainConfig)}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


takes_config = takes(TrainConfig, OPTIONS, DEFAULTS, parse_config)


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"layers must be whole numbers such as 2048,512. Got {text!r} instead") from None


def _parse_batch_size(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch-size must be a whole number of at least 1, or all. Got {text!r} instead")
    return int(text)


def _parse_pairs(texts: Sequence[str], of: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{GIVEN[of]}. Got {text!r} instead")
        if name in options:
            raise ConfigError(f"{of} {'' if of == 'shuffle' else 'option '}{name} is given twice")
        options[name] = value
    return options


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a number. Got {text!r} instead") from None
