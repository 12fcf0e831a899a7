"""Another installed package adds a fusion, a head, a loss and a reader by entry points; each test is real processes."""

import json
import os
import subprocess
import sys

import pytest

from cachefuse.errors import PluginError
from cachefuse.registry import Registry

CODE = '''
from torch import nn

from cachefuse.data.column import Column
from cachefuse.data.readers.base import Reader, Samples
from cachefuse.fusion.base import Fusion, join, joint_head
from cachefuse.metrics.base import metric
from cachefuse.nn.losses import bce

LAZY = "a text"
PARTS = ("a", "b")


class MyFusion(Fusion):
    """The product of the number of modalities and what a head makes of all of them."""

    name = "mine"

    def __init__(self, specs, classes, head):
        super().__init__(specs, classes, head)
        self.head = joint_head(self.specs, classes, head)

    def forward(self, features, present):
        return len(self.specs) * self.head(join(features, present, self.specs))


class OddFusion(MyFusion):
    """Declares what only running its code tells, and inherits an option."""

    name = "odd"
    parts = tuple("ab")
    stages = [part for part in PARTS]
    defaults = dict(lr=1e-4, epochs=None)

    def __init__(self, specs, classes, head, *, twice=(), mode="x"):
        super().__init__(specs, classes, head)


class HeirFusion(OddFusion):
    name = "heir"
    defaults = {"lr": "x", "dropout": None}


class MyHead(nn.Linear):
    default_layers = ()

    def __init__(self, width, classes, *, layers=(), activation="relu", dropout=0.0):
        super().__init__(width, classes)


def my_loss(logits, targets, *, times=2.0, reduction="mean"):
    return times * bce(logits, targets, reduction=reduction)


class MyReader(Reader):
    n: int = 40

    def missing(self, root):
        return []

    def read(self, root):
        colors = ["red" if i % 2 else "blue" for i in range(self.n)]
        return Samples(
            ids=[str(i) for i in range(self.n)],
            splits=["val" if i % 4 == 0 else "train" for i in range(self.n)],
            labels=[(color,) for color in colors],
            modalities={"text": Column.texts([f"a {color} thing" for color in colors])},
        )


def no_mean(logits, targets, *, reduction="mean"):
    return logits - targets


@metric("no mean")
def no_function(targets, scores, predictions):
    return 0.5


def takes_no_logits(targets, *, reduction="mean"):
    return targets.sum()
'''
POINTS = """
[cachefuse.fusions]
mine = my_package:MyFusion
broken = my_package.nowhere:Broken
gone = my_package:NotThere
headless = my_package:MyHead
odd = my_package:OddFusion
heir = my_package:HeirFusion
falls = falls.fusion:Fusion
ends = ends.fusion:Fusion
sum = my_package:NotThere

[cachefuse.heads]
mine = my_package:MyHead
lossy = my_package:my_loss

[cachefuse.losses]
mine = my_package:my_loss
bad = my_package:takes_no_logits
matrix = my_package:no_mean

[cachefuse.metrics]
number = my_package:no_function

[cachefuse.readers]
mine = my_package:MyReader
fused = my_package:MyFusion
"""
MANIFEST = """
name = "colors"
title = "Colors"
licence = "none"
task = "multiclass"
reader = { kind = "KIND" }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A package as pip lays it down, beside a manifest that names its reader."""
    root = tmp_path_factory.mktemp("site")
    (root / "my_package").mkdir()
    (root / "my_package" / "__init__.py").write_text(CODE)
    for name, code in {"falls": "1 / 0", "ends": "raise SystemExit(3)"}.items():
        (root / name).mkdir()
        (root / name / "__init__.py").write_text(code)
    about = root / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    (root / "colors.toml").write_text(MANIFEST.replace("KIND", "mine"))
    (root / "fused.toml").write_text(MANIFEST.replace("KIND", "fused"))
    return root


@pytest.fixture(scope="module")
def run(folder):
    def run(*args):
        """Run cachefuse where the package is installed, and return the code, stdout and stderr."""
        code = "from cachefuse_cli.app import main; main()"
        env = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=folder, env=env)
        return done.returncode, done.stdout, done.stderr

    assert run("extract", "--dataset", "./colors.toml", "--encoder", "classic")[0] == 0
    return run


@pytest.mark.slow
def test_is_used_by_name(run):
    mine = ("--fusion", "mine", "--head", "mine", "--loss", "mine", "--loss-options", "times=3")
    code, out, error = run("train-head", *mine, "--epochs", "2", "--json")
    assert (code, json.loads(out)["run"]) == (0, "colors-mine-mine-mine-1"), error
    code, out, error = run("evaluate", "--run", "colors-mine-mine-mine-1", "--no-intervals", "--json")
    assert (code, json.loads(out)["split"]) == (0, "val"), error


@pytest.mark.slow
def test_is_listed_in_help(run):
    code, out, _ = run("train-head", "--help")
    listed = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "gone, headless, heir, image, kernel, lit, logistic, midfusion, mine, mixed, neighbours, odd" in listed
    assert "gmlp, linear, lossy, mine, mlp" in listed
    assert "bad, bce, ce, focal, matrix, mine" in listed


@pytest.mark.slow
def test_what_it_gets_wrong_is_one_line(run):
    code, out, error = run("train-head", "--fusion", "broken")
    assert (code, out, error.count("\n")) == (1, "", 1), error
    assert all(word in error for word in ("'broken' of my-package", "my_package.nowhere:Broken", "ModuleNotFoundError"))
    code, _, error = run("extract", "--dataset", "./fused.toml", "--encoder", "classic")
    assert (code, error.count("\n")) == (1, 1), error
    assert all(word in error for word in ("fused.toml", "reader 'fused' of my-package", "base.Reader")), error


WRONG = """
from cachefuse.fusion import FUSIONS
from cachefuse.metrics import METRICS
from cachefuse.nn import HEADS, LOSSES

WRONG = (
    (FUSIONS, "gone"), (FUSIONS, "headless"), (HEADS, "lossy"), (LOSSES, "bad"), (LOSSES, "matrix"),
    (METRICS, "number"), (FUSIONS, "mien"),
)
for table, name in WRONG:
    try:
        table[name]
    except (ImportError, LookupError) as error:
        print(type(error).__name__, error)
print(FUSIONS["sum"].__module__)
"""


@pytest.mark.slow
def test_options_that_it_does_not_explain_are_listed(run):
    for fusion in ("odd", "heir"):
        code, out, error = run("train-head", "--fusion", fusion, "--fusion-options", "help")
        assert (code, out.splitlines(), error) == (0, ["twice=() (a value)", "mode=x (text)"], "")


def test_what_is_no_fusion_head_or_loss_is_refused_where_it_is_used(folder):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, env=env, check=True)
    gone, headless, lossy, bad, matrix, number, unknown, own = done.stdout.splitlines()
    assert all(word in gone for word in ("PluginError", "fusion 'gone' of my-package", "my_package:NotThere"))
    assert all(word in headless for word in ("PluginError", "fusion 'headless'", "cachefuse.fusion.base.Fusion"))
    assert all(word in lossy for word in ("PluginError", "head 'lossy'", "torch.nn.Module"))
    assert all(word in bad for word in ("PluginError", "loss 'bad'", "logits, targets, *, reduction"))
    assert all(word in matrix for word in ("PluginError", "loss 'matrix'", "one number", "(3, 2)"))
    assert all(word in number for word in ("PluginError", "metric 'number'", "TypeError"))
    assert all(word in unknown for word in ("UnknownNameError", "did you mean 'mine'?"))
    # An entry of this package goes before one of the same name, with a warning.
    assert own == "cachefuse.fusion.late"
    assert all(word in done.stderr for word in ("fusion 'sum'", "my-package", "not used"))


class OnePoint:
    """An entry point."""

    name, value, group, dist = "one", "somewhere:thing", "things", None

    def load(self):
        return object()


def test_what_is_not_the_kind_of_thing_is_refused(monkeypatch):
    monkeypatch.setattr("cachefuse.registry._entry_points", lambda group: {"one": OnePoint()})
    table = Registry("thing", "things", {"two": 2}, has=("size",))
    assert list(table) == ["one", "two"]
    assert table["two"] == 2
    with pytest.raises(PluginError, match=r"thing 'one' .*size"):
        table["one"]


def test_a_module_that_ends_the_process_is_one_line(monkeypatch):
    def end(point):
        raise SystemExit("boom\nagain")

    monkeypatch.setattr("cachefuse.registry._entry_points", lambda group: {"one": OnePoint()})
    monkeypatch.setattr(OnePoint, "load", end)
    with pytest.raises(PluginError, match=r"thing 'one' .*boom again") as refused:
        Registry("thing", "things", {})["one"]
    assert "\n" not in str(refused.value)
