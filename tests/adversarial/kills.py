"""The commands that write, each from a state in which it has work to do; and ways to interrupt them."""

import errno
import random
import signal
from dataclasses import dataclass

import numpy as np
from PIL import Image

from adversarial.workspaces import QUICK, STEPS

HEAD = "mine-sum-linear-asl-1"


def as_it_is(folder):
    pass


def change_images(folder):
    for row in (3, 70):
        Image.fromarray(np.full((20, 24, 3), row, np.uint8)).save(folder / "images" / f"r{row}.png")


def append_rows(folder):
    """Add samples at the end, some with images."""
    with (folder / "test.csv").open("a") as file:
        for row in range(112, 150):
            file.write(f"r{row},big blue circle{' two' * (row % 3)}\n")
            if row % 7:
                Image.fromarray(np.full((20, 24, 3), row, np.uint8)).save(folder / "images" / f"r{row}.png")


def damage(folder):
    """Flip a bit in two blocks."""
    features = folder / "workspace" / "cache" / "mine.zarr" / "features"
    for name in ("hf-bert/text/tokens/block-000001/c/0/0", "hf-vit/image/pooled/c/0/0"):
        data = bytearray((features / name).read_bytes())
        data[5] ^= 4
        (features / name).write_bytes(data)


@dataclass(frozen=True)
class Writer:
    """A command that writes: its arguments, the step before which it begins ("": the whole), and what changes first."""

    args: tuple[str, ...]
    step: str = ""
    prepare: object = as_it_is
    weight: int = 4


WRITERS = {
    **{name: Writer(args, name) for name, args in STEPS.items() if name != "train-head int8"},
    "extract appended": Writer(STEPS["extract tokens"], "align", append_rows),
    "extract refresh": Writer((*STEPS["extract tokens"], "--refresh"), "align", change_images),
    "extract both": Writer((*STEPS["extract"], "--encoder", "hf:./bert"), "extract"),
    "verify repair": Writer(("verify", "--dataset", "mine", "--repair", "--data-dir", "."), "align", damage, 8),
    "train-head all folds": Writer(
        ("train-head", "--dataset", "mine", *QUICK, "--folds", "3", "--members", "2", "--encoder", "classic")
    ),
    "compare": Writer(
        (
            "compare",
            "--dataset",
            "mine",
            "--encoder",
            "classic",
            "--methods",
            "sum,gated",
            "--folds",
            "2",
            "--epochs",
            "1",
        )
    ),
    "predict": Writer(("predict", "--output", "out.csv")),
    "predict input": Writer(
        ("predict", "--run", "quant-sum-linear-asl-1", "--input", "test.csv", "--output", "new.csv")
    ),
    "report": Writer(("report", "--run", HEAD, "--output", "page.html")),
    "report alignment": Writer(("report", "--run", "mine-dfe-add-1", "--output", "page.html")),
    "pairs": Writer(("pairs", "--dataset", "mine", "--encoder", "classic", "--threshold", "0.5", "--data-dir", ".")),
    "gates": Writer(
        ("evaluate", "--run", "mine-cma-mlp-asl-1", "--split", "val", "--no-intervals", "--gates", "gates.csv")
    ),
}


def way(rng: random.Random, n_calls: int, seconds: float):
    """Choose how to interrupt: return its name, and the options of ``Forks.run``."""
    kind = rng.choices(
        ("kill at a call", "kill", "SIGTERM", "SIGINT at a call", "SIGINT", "SIGINT twice", "SIGSTOP", "EIO", "ENOSPC"),
        (46, 20, 6, 7, 4, 5, 2, 5, 5),
    )[0]
    n, when = rng.randrange(max(1, n_calls)), rng.uniform(0, seconds)
    number = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}.get(kind)
    options = {
        "kill at a call": {"conditions": {"kill_at": n}},
        "kill": {"signals": [(when, signal.SIGKILL)]},
        "SIGTERM": {"signals": [(when, signal.SIGTERM)]},
        "SIGINT at a call": {"conditions": {"signal_at": [n, signal.SIGINT]}},
        "SIGINT": {"signals": [(when, signal.SIGINT)]},
        "SIGINT twice": {"signals": [(when, signal.SIGINT), (when + rng.uniform(0, 0.1), signal.SIGINT)]},
        "SIGSTOP": {"signals": [(when, signal.SIGSTOP), (when + 0.3, signal.SIGCONT)]},
        "EIO": {"conditions": {"fail_at": [n, number]}},
        "ENOSPC": {"conditions": {"fail_at": [n, number]}},
    }[kind]
    at = f"call {n} of {n_calls}" if "conditions" in options else f"{when:.3f} s"
    return kind, f"{kind}, {at}", options
