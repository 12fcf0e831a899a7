"""PAPERS.md names each table and figure of the five papers, and its commands have presets and values that exist."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cachefuse.alignment.presets import ALIGNMENTS
from cachefuse.experiments import recipes
from cachefuse.training.config import TrainConfig
from cachefuse_cli.app import COMMANDS

TEXT = (Path(recipes.__file__).parent / "PAPERS.md").read_text(encoding="utf-8")
# The numbers of tables and figures, as the papers print them.
PAPERS = {
    "MMC": (range(1, 13), range(1, 11)),
    "CBMF": (("I", "II", "III", "IV", "V", "VI"), range(1, 5)),
    "CMA-CLIP": (range(1, 5), range(1, 2)),
    "LiT": (range(1, 2), range(1, 3)),
    "Where to fuse": ((), range(1, 23)),
}
PRESETS = {"train-head": recipes.TRAININGS, "sweep": recipes.SWEEPS, "align": ALIGNMENTS}
COMMAND = re.compile(r"`cachefuse ([^`]+)`")


def section_of(name):
    return next(part for part in TEXT.split("\n## ") if name in part.splitlines()[0])


def named(kind, text):
    """Return the numbers after "table" or "figure" at the start of rows: table 5, tables 10 and 11, figures 1 to 5."""
    found = set()
    for row in re.findall(rf"^\| {kind}s? ([\dIVX][^|]*)\|", text, flags=re.M):
        listed = re.match(r"[\dIVX]+(?:(?:, | and | to )[\dIVX]+)*", row)[0]
        if between := re.fullmatch(r"(\d+) to (\d+)", listed):
            found |= {*map(str, range(int(between[1]), int(between[2]) + 1))}
        else:
            found |= {*re.findall(r"[\dIVX]+", listed)}
    return found


@pytest.mark.parametrize("paper", PAPERS)
def test_every_table_and_figure_is_there(paper):
    text = section_of(paper)
    for kind, numbers in zip(("table", "figure"), PAPERS[paper], strict=True):
        assert named(kind, text) == {*map(str, numbers)}


@pytest.mark.parametrize("command", sorted({*COMMAND.findall(TEXT)}))
def test_every_command_can_be_run(command):
    """Its name, its preset, and the values of its settings; test_documents.py checks the names of options."""
    name, *words = shlex.split(command)
    assert name in COMMANDS
    given = dict(pairwise(words))
    if "--preset" in given:
        assert given["--preset"] in PRESETS[name]
    if name == "presets" and words != ["NAME"]:
        assert words[0] in {preset for table in PRESETS.values() for preset in table}
    if name == "train-head" and "--fusion" in given:
        TrainConfig(
            fusion=given["--fusion"], head=given.get("--head", "mlp"), optimizer=given.get("--optimizer", "adam"),
            monitor=given.get("--monitor"),
        )  # fmt: skip


def test_every_preset_is_in_the_document():
    for table in PRESETS.values():
        for preset in table:
            assert re.search(rf"(--preset|presets) {preset}\b", TEXT), preset
