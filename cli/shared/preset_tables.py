"""The presets as tables."""

from collections.abc import Mapping
from dataclasses import asdict

from cachefuse.experiments.recipe import Recipe
from cachefuse.files import JsonObject
from cachefuse.settings import as_text
from cachefuse_cli.shared.console import Text, new_table, out


def recipe_dict(recipe: Recipe, command: str) -> JsonObject:
    return {"command": command, **asdict(recipe)}


def list_recipes(recipes: Mapping[str, Recipe], command_of: Mapping[str, str]) -> None:
    """Print the presets with their commands and papers."""
    table = new_table("preset", "command", "paper", "what", numbers=0)
    for name, recipe in recipes.items():
        table.add_row(name, command_of[name], recipe.paper, recipe.title)
    out().print(table)
    out().print(Text.assemble(("next  ", "dim"), "cachefuse presets NAME shows its settings and their sources"))


def recipe_report(name: str, recipe: Recipe, command: str) -> None:
    """Print every setting of a preset: stated with its source, chosen with the reason, varied, or idle."""
    console = out()
    console.print(Text.assemble((name, "bold"), f": {recipe.title}"))
    console.print(Text.assemble(("paper ", "dim"), recipe.paper))
    console.print(Text.assemble(("run   ", "dim"), f"cachefuse {command} --preset {name}"))
    table = new_table("setting", "value", "from", numbers=0)
    for stated in recipe.stated:
        table.add_row(stated.name, _value(stated.value), stated.source)
    for stated in recipe.for_tasks:
        table.add_row(stated.name, _value(stated.value), f"{stated.source}; with several tasks")
    for varied, source in recipe.varies.items():
        table.add_row(varied, "tried", source)
    for chosen in recipe.chosen:
        table.add_row(chosen.name, _value(chosen.value), f"chosen: {chosen.reason}")
    for idle, reason in recipe.idle.items():
        table.add_row(idle, "-", f"no part of it: {reason}")
    for feature in recipe.features:
        table.add_row(feature.name, _value(feature.value), f"{feature.source}; of the features")
    console.print(table)
    for note in recipe.notes:
        console.print(Text.assemble(("note  ", "dim"), note))


def _value(value: object) -> str:
    return as_text(value) or "none"
