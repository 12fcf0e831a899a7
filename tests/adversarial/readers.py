"""The commands that read a workspace, and their results in a form that can be compared."""

import json
import shutil
from pathlib import Path

from adversarial.judge import canonical, plain, run_folders
from adversarial.workspaces import QUICK, STEPS

READERS = {
    "verify": ("verify", "--dataset", "mine", "--json"),
    "verify int8": ("verify", "--dataset", "quant", "--json"),
    "evaluate": ("evaluate", "--no-intervals", "--json"),
    "evaluate head": ("evaluate", "--no-intervals", "--run", "mine-sum-linear-asl-1", "--json"),
    "evaluate tokens": ("evaluate", "--no-intervals", "--run", "mine-cma-mlp-asl-1", "--split", "val", "--json"),
    "evaluate alignment": ("evaluate", "--no-intervals", "--run", "mine-dfe-add-1", "--json"),
    "predict": ("predict", "--output", "out.csv"),
    "predict head": ("predict", "--run", "mine-sum-linear-asl-1", "--output", "out.csv"),
    "predict int8": ("predict", "--run", "quant-sum-linear-asl-1", "--output", "out.csv"),
    "train-head": ("train-head", "--dataset", "mine", *QUICK),
    "train-head int8": ("train-head", "--dataset", "quant", *QUICK),
    "retrieve": (*STEPS["retrieve"], "--json"),
    "inspect": ("inspect", "--dataset", "mine", "--json"),
    "runs": ("runs", "--json"),
    "sweep": (*STEPS["sweep"], "--json"),
}


def result(forks, folder: Path, name: str, **options):
    """Run a command that reads; return how it ended and its result. What it wrote is taken away again."""
    out, runs = folder / "out.csv", set(run_folders(folder))
    ended = forks.run(*READERS[name], cwd=folder, **options)
    if ended.code or ended.stopped:
        return ended, None
    made = sorted(set(run_folders(folder)) - runs)
    if made:
        (run,) = made
        value = {file.name: canonical(file) for file in sorted(run.iterdir())}
        shutil.rmtree(run)
    elif out.is_file():
        value = out.read_text()
        out.unlink()
    else:
        try:
            value = ordered(plain(json.loads(ended.out)))
        except ValueError:
            value = ended.out
    return ended, value


def ordered(value):
    """Return a result with its views in one order: verify lists them as threads end."""
    if isinstance(value, dict) and isinstance(value.get("views"), list):
        value["views"].sort(key=repr)
    return value
