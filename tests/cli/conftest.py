import contextlib
import json
import logging
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachefuse_cli.app import main


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")


@contextlib.contextmanager
def keep_process():
    """Undo what a command does to the logger, where later tests look for messages, to Ctrl-C and to lost errors."""
    on_interrupt, on_unraisable = signal.getsignal(signal.SIGINT), sys.unraisablehook
    logger = logging.getLogger("cachefuse")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    signal.signal(signal.SIGINT, on_interrupt)
    sys.unraisablehook = on_unraisable


@pytest.fixture
def folder(tmp_path, monkeypatch, mine):
    """An empty current folder with a manifest in it, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("CACHEFUSE_WORKSPACE", raising=False)
    (tmp_path / "mine.toml").write_text(mine)
    return tmp_path


@pytest.fixture
def cachefuse(folder, capsys):
    def run(*args):
        with keep_process(), pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(exit.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_in():
    """Run a command in a folder, for what is made once."""

    def run(folder, *args):
        with contextlib.chdir(folder), keep_process(), pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        assert not exit.value.code

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory, mine, run_in):
    """A workspace with extracted features and one run, made once."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.toml").write_text(mine)
    run_in(folder, "extract", "--dataset", "./mine.toml", "--encoder", "classic", "--json")
    run_in(folder, "train-head", "--head", "linear", "--epochs", "3", "--json")
    return folder / "workspace"


@pytest.fixture
def workspace(made, folder):
    return Path(shutil.copytree(made, folder / "workspace"))


@pytest.fixture
def fits():
    def check(text, width=80, keep=()):
        """Assert that no line is longer than ``width``, but those that hold a path."""
        long = [
            line for line in text.splitlines() if len(line) > width and not any(word in line for word in ("/", *keep))
        ]
        assert not long, "\n".join(long)

    return check


@pytest.fixture(scope="session")
def write_vqa():
    """Write VQA v2 in its own layout: of each split's images, red ones with even numbers and green ones with odd."""

    def write(folder, splits, ask):
        """``ask(image)`` gives the questions about an image, each with what ten people answered."""
        rng = np.random.default_rng(0)
        for split, images in splits.items():
            (folder / "data" / split).mkdir(parents=True)
            questions, annotations = [], []
            for image in images:
                pixels = rng.integers(0, 60, (12, 16, 3), dtype=np.uint8)
                pixels[..., image % 2] += 150
                Image.fromarray(pixels).save(folder / f"data/{split}/COCO_{split}_{image:012d}.jpg")
                for k, (text, answers) in enumerate(ask(image)):
                    number = {"image_id": image, "question_id": 1000 * image + k}
                    questions.append({**number, "question": text})
                    kind = "yes/no" if {*answers} & {"yes", "no"} else "other"
                    types = {"answer_type": kind, "question_type": " ".join(text.lower().split()[:2])}
                    annotations.append({**number, **types, "answers": [{"answer": answer} for answer in answers]})
            name = f"data/v2_OpenEnded_mscoco_{split}_questions.json"
            (folder / name).write_text(json.dumps({"questions": questions}))
            if split != "test2015":
                name = f"data/v2_mscoco_{split}_annotations.json"
                (folder / name).write_text(json.dumps({"annotations": annotations}))
        return folder / "data"

    return write
