"""`cachefuse compare`, on a terminal of 80 columns."""

import json
import re

import pytest

from cachefuse.experiments import costs
from fixtures.messages import says

QUICK = ("compare", "--methods", "image,text,sum,tirg", "--folds", "2", "--epochs", "1")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setattr(costs, "TIMES", 1)
    monkeypatch.setattr("cachefuse.experiments.sweep.RESAMPLES", 20)


@pytest.mark.slow
def test_a_table_of_what_to_choose_from(cachefuse, workspace, fits):
    result = cachefuse(*QUICK)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].strip() == "mine: 2 folds, 1 epochs of 64 rows per step"
    assert lines[1].strip() == "one seed, 120 rows of oof"
    heads = ["fusion", "micro-F1", "95%", "macro-F1", "s", "params", "MB", "ms/item", "steps/s"]
    assert lines[2].split() == heads
    for name, line in zip(("image", "text", "sum", "tirg"), lines[3:7], strict=True):
        assert re.match(rf"{name} +0\.\d+ +\.\d+-\.\d+ +0\.\d+ +[\d.]+ +[\d.]+M +[\d.]+ +[\d.e-]+ +[\d.e+]+$", line)
    assert lines[11].split() == ["fusion", "behind", "95%", "p", "p", "corrected", "within", ".01", "of", "all"]
    for name, line in zip(("image", "text", "sum", "tirg"), lines[12:16], strict=True):
        assert re.match(rf"{name} +(-|[+-]\.\d+) +(-|[+-]\.\d+ to [+-]\.\d+) +(-|<?\.\d+|1\.000) +", line)
    assert says(lines[-1], "undecided .01 micro-F1 120 rows Holm 4 --margin")
    fits("\n".join(lines[:16]))
    wide = cachefuse(*QUICK, "--margin", "0.95").out.splitlines()
    assert says(wide[-2], "enough micro-F1 .95 120 rows Holm 4")
    assert re.fullmatch(r"next  cachefuse train-head --fusion \w+", wide[-1])
    again = cachefuse(*QUICK, "--json")
    values = json.loads(again.out)
    assert values["enough"] is None
    found = values["comparison"]
    assert (found["metric"], found["margin"], found["rows"], found["correction"]) == ("micro_f1", 0.01, 120, "Holm")
    assert [fusion["method"] for fusion in found["fusions"]] == QUICK[2].split(",")
    assert found["fusions"][QUICK[2].split(",").index(found["best"])]["behind"]["value"] == 0
    assert [setting["setting"]["fusion"] for setting in values["sweeps"][0]["settings"]] == QUICK[2].split(",")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "smu"), "fusion smu sum"),
        (("--methods", ""), "fusion"),
        (("--folds", "1"), "folds 0 2"),
        (("--margin", "0"), "margin 0 1"),
        (("--margin", "1.5"), "margin 0 1 1.5"),
        (("--epochs", "0"), "epochs 1"),
        (("--methods", "cma"), "workspace/cache/mine.zarr tokens image extract --dataset mine"),
        (("--dataset", "nothing"), ""),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace):
    result = cachefuse("compare", *args)
    assert result.code == 1
    assert says(result.error, message)
