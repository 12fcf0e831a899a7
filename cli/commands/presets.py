"""`cachefuse presets`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.options import Json


def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show all settings of this preset.")] = None,
    json: Json = False,
) -> None:
    """List the papers' experiments; with a name, show its settings, their sources, and what was chosen."""
    from cachefuse.alignment.presets import ALIGNMENTS
    from cachefuse.experiments.recipes import SWEEPS, TRAININGS
    from cachefuse.registry import lookup
    from cachefuse_cli.shared import preset_tables, render

    every = {"train-head": TRAININGS, "sweep": SWEEPS, "align": ALIGNMENTS}
    command_of = {preset: command for command, recipes in every.items() for preset in recipes}
    recipes = {preset: recipe for table in every.values() for preset, recipe in table.items()}
    if name is not None:
        recipes = {name: lookup(recipes, name, "preset")}
    if json:
        render.print_json({preset: preset_tables.recipe_dict(x, command_of[preset]) for preset, x in recipes.items()})
    elif name is not None:
        preset_tables.recipe_report(name, recipes[name], command_of[name])
    else:
        preset_tables.list_recipes(recipes, command_of)
