"""Options of fusions and parts that are left out, kept with the run."""

import json
import shutil

import pytest
import torch

from cachefuse.errors import RunError
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming
from fixtures.runs import reseal, without_checksums

SMALL = {"depth": 1, "width": 8, "heads": 2}


@pytest.fixture
def saved(made_once, tmp_path, toy_store):
    """A copy of a run of cma, trained once."""

    def train(path):
        run = train_head(toy_store(), TrainConfig(fusion="cma", fusion_options=SMALL, head="linear", epochs=1))
        save_run(run, tmp_path / "first").rename(path)

    return shutil.copytree(made_once("run", train), tmp_path / "run")


@pytest.mark.parametrize(
    ("fusion", "options", "ablate"),
    [
        ("cma", SMALL, ("modality-attention",)),
        ("cma", {**SMALL, "dropout": "0"}, ("modality-attention", "sequence-attention")),
        ("tirg", {"query": "text", "width": "8"}, ()),
    ],
)
def test_a_run_keeps_options_and_parts(fusion, options, ablate, toy_store, tmp_path):
    config = TrainConfig(fusion=fusion, fusion_options=options, ablate=ablate, head="linear", epochs=2)
    run = train_head(toy_store(), config)
    path = save_run(run, tmp_path / "runs")
    again = load_run(path)
    assert again.config == run.config
    assert again.config.ablate == ablate
    assert again.members[0].config == run.members[0].config
    assert again.config.fusion_options.items() >= {
        name: {"width": int, "dropout": float}.get(name, type(x))(x) for name, x in options.items()
    }.items()  # fmt: skip
    written = json.loads((path / "run.json").read_text())["config"]
    assert (written["fusion_options"], written["without"]) == (run.config.fusion_options, list(ablate))
    one, two = (x.members[0].model.state_dict() for x in (run, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    card = (path / "README.md").read_text()
    assert all(part in card for part in ablate)
    assert "width=8" in card


def test_a_run_of_before_there_were_options_loads(toy_store, tmp_path):
    path = save_run(train_head(toy_store(), TrainConfig(head="linear", epochs=2)), tmp_path / "runs")
    values = json.loads((path / "run.json").read_text())
    for config in (values["config"], *(member["config"] for member in values["members"])):
        del config["fusion_options"], config["without"]
    (path / "run.json").write_text(json.dumps(values))
    without_checksums(path)
    run = load_run(path)
    assert (run.config.fusion_options, run.config.ablate) == ({}, ())


@pytest.mark.parametrize(
    "change",
    [
        {"fusion_options": {"dept": 1}}, {"fusion_options": {**SMALL, "depth": 1.5}}, {"fusion_options": None},
        {"fusion_options": {**SMALL, "heads": 3}}, {"fusion_options": {**SMALL, "width": -8}}, {"without": 3},
        {"without": None}, {"with": ["modality-attention"]},
    ],
    ids=str,
)  # fmt: skip
def test_options_edited_into_nonsense_are_refused(change, saved):
    values = json.loads((saved / "run.json").read_text())
    values["members"][0]["config"].update(change)
    (saved / "run.json").write_text(json.dumps(values))
    reseal(saved)
    with pytest.raises(RunError, match=naming("run.json")):
        load_run(saved)


def test_options_that_do_not_fit_the_weights_are_refused(saved):
    values = json.loads((saved / "run.json").read_text())
    for change in ({"fusion_options": {**SMALL, "depth": 2}}, {"without": ["modality-attention"]}):
        values["members"][0]["config"].update(change)
        (saved / "run.json").write_text(json.dumps(values))
        reseal(saved)
        with pytest.raises(RunError, match=naming("model.safetensors weights")):
            load_run(saved)
