"""What any command prints of hostile data is safe: on a terminal, for another program, as JSON, and in an error."""

import contextlib
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import tty
import warnings

import numpy as np
import pytest
from PIL import Image

from cachefuse_cli.app import COMMANDS, main

# A title of the window, a C1 control, a mark of direction, line ends, half of a pair; and what Rich takes for markup.
HOSTILE = "\x1b]0;x\x07\x9b2J\u202egpj\r\n\u2028\ud83d[red]:bug:[/]\\"
NAME = "\x1b]0;x\x07\x9b2J\u202egpj\r\n\u2028[red]:bug:\\"  # of a file
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\r(?=\x1b|$)")
SUM, GATED = "hostile-sum-linear-ce-1", "hostile-gated-linear-ce-1"
LONGEST = 520  # a message, and the few characters around it

MANIFEST = """
name = "hostile"
task = "multiclass"
splits = { val = { from = "train", fraction = 0.25 } }

[reader]
kind = "table"
files = { train = "train.jsonl", test = "test.jsonl" }
id = "id"
image = "image"
text = "text"
labels = "label"
"""


def write_data(folder):
    rng = np.random.default_rng(0)
    (folder / NAME).mkdir()
    classes = [*(f"{i}{HOSTILE}" for i in range(3)), "long" * 1000]
    rows = []
    for i in range(60):
        path = f"{NAME}/{i}{NAME}.png"
        pixels = rng.integers(0, 60, (12, 16, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        Image.fromarray(pixels).save(folder / path)
        rows.append(
            {"id": f"{i}{HOSTILE}", "image": path, "text": f"{HOSTILE} {i % 4} {i}" * 9, "label": classes[i % 4]}
        )
    rows[0]["id"] += "i" * 4000
    (folder / rows[1]["image"]).write_bytes(b"no image")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:48]))
    tests = ({name: value for name, value in row.items() if name != "label"} for row in rows[48:])
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
    (folder / "hostile.toml").write_text(MANIFEST)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, run_in):
    """A folder with hostile data, their features, two runs and an alignment."""
    folder = tmp_path_factory.mktemp("hostile")
    write_data(folder)
    workspace = ["--workspace", f"ws{NAME}"]
    run_in(folder, "extract", "--dataset", "./hostile.toml", "--encoder", "classic", *workspace)
    for fusion in ("sum", "gated"):
        run_in(folder, "train-head", "--fusion", fusion, "--head", "linear", "--epochs", "1", *workspace)
    run_in(folder, "align", "--epochs", "1", *workspace)
    return folder


@pytest.fixture
def there(attacked, monkeypatch):
    logger = logging.getLogger("cachefuse")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.chdir(attacked)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CACHEFUSE_WORKSPACE", f"ws{NAME}")
    return attacked


class Terminal:
    """A pseudo-terminal as stdout and stderr; ``shown`` is what was written to it."""

    def __enter__(self):
        self.master, slave = pty.openpty()
        tty.setraw(slave)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self.stream
        self.data = b""
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                self.data += data

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.before
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        self.shown = self.data.decode("utf-8", "surrogatepass")


@pytest.fixture
def on_terminal(there):
    def run(*args):
        with Terminal() as terminal, pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        return exit.value.code or 0, terminal.shown

    return run


@pytest.fixture
def piped(there, capfd):
    def run(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


def check(text, styled=False):
    if styled:
        text = RICH.sub("", text)
    assert not UNSAFE.search(text), repr(text[max(0, UNSAFE.search(text).start() - 60) :][:120])
    if not styled:  # bars are drawn many times on one line
        assert max(map(len, text.splitlines()), default=0) <= LONGEST


QUICK = {
    "plan": ["--dataset", "./hostile.toml", "--encoder", "classic"],
    "extract": ["--dataset", "./hostile.toml", "--encoder", "classic"],
    "predict": [
        "--text",
        HOSTILE.replace("\0", ""),
        "--image",
        f"{NAME}/2{NAME}.png",
        "--run",
        SUM,
    ],
    "evaluate": ["--against", SUM, "--run", GATED],
    "runs": [],
    "report": ["--run", SUM, "--data-dir", "."],
    "retrieve": ["--text", NAME, "--among", "text", "--data-dir", "."],
    "zero-shot": ["--prompt", HOSTILE + "{}"],
    "inspect": [],
    "verify": [],
    "datasets": [],
    "encoders": [],
    "presets": ["mmc-paper"],
}
LONG = {
    "demo": ["--output", f"demo{NAME}.csv"],
    "train-head": ["--dataset", "hostile", "--head", "linear", "--epochs", "1"],
    "sweep": ["--dataset", "hostile", "--grid", "dropout=0,0.1", "--epochs", "1", "--seeds", "1"],
    "compare": ["--dataset", "hostile", "--methods", "image,text", "--epochs", "1", "--folds", "2"],
    "auto": ["--dataset", "hostile", "--trials", "1", "--folds", "2"],
    "ensemble": [SUM, GATED],
    "align": ["--epochs", "1"],
    "pairs": ["--dataset", "hostile", "--threshold", "0.01", "--data-dir", ".", "--output", f"pairs{NAME}"],
    "fine-tune": ["--dataset", "hostile", "--run", "hostile-dfe-add-1", "--epochs", "1"],
}
OTHERS = {"similarity", "bench"}  # of other data; of minutes
RUNS = [*QUICK, *(pytest.param(command, marks=pytest.mark.slow) for command in LONG)]


def test_every_command_is_tried():
    assert {*QUICK, *LONG, *OTHERS} == {*COMMANDS}


@pytest.mark.parametrize("command", RUNS)
def test_a_result_is_safe(command, on_terminal, piped, monkeypatch):
    args = [command, *{**QUICK, **LONG}[command]]
    monkeypatch.setenv("TERM", "xterm-256color")
    code, shown = on_terminal(*args)
    assert code == 0, shown
    check(shown, styled=True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    code, shown = on_terminal(*args)
    assert code == 0
    check(shown)
    code, out, err = piped(*args, "--json")
    assert code == 0
    check(err)
    assert not UNSAFE.search(out)
    json.loads(out)


def test_bad_samples_are_listed(piped):
    code, out, err = piped("inspect", "--bad")
    assert (code, err) == (0, "")
    check(out)
    assert r"1\x1b]0;x\x07" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_safe_and_short(command, piped):
    given = ["store"] if command == "bench" else QUICK.get(command, LONG.get(command, []))
    without_option = {"demo": ["--seed", HOSTILE], "bench": ["--threads", HOSTILE], "presets": [], "encoders": []}
    for wrong in (["--nope" + NAME * 100], without_option.get(command, ["--dataset", NAME * 100, "--run", NAME * 100])):
        code, out, err = piped(command, *given, *wrong)
        if not wrong:
            continue
        assert code in (1, 2), out
        assert err
        check(out)
        check(err)


def test_a_name_that_is_no_utf_8(there, piped):
    folder = there / "bytes"
    for name in (b"caf\xe9", b"\x9b\xff"):
        inside = os.fsencode(folder) + b"/" + name
        os.makedirs(inside)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            with open(inside + b"/%d\xe9.png" % i, "wb") as file:
                Image.fromarray(pixels).save(file, "png")
    (folder / "bytes.toml").write_text('name = "bytes"\ntask = "multiclass"\nreader = { kind = "folder" }\n')
    workspace = ["--workspace", "of-bytes"]
    code, out, err = piped("extract", "--dataset", "./bytes/bytes.toml", "--encoder", "classic", *workspace)
    assert code == 0, err
    check(out)
    code, out, _ = piped("inspect", *workspace, "--json")
    assert "caf\u00e9" in json.loads(out)["classes"]


def test_what_others_write_to_stderr_is_safe(there, piped, monkeypatch):

    def noisy(*_):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(HOSTILE * 100, UserWarning, stacklevel=1)
        logging.lastResort.handle(
            logging.LogRecord("other", logging.WARNING, "", 0, HOSTILE.replace("\n", ""), (), None)
        )
        raise RuntimeError(HOSTILE * 100)

    monkeypatch.setattr("cachefuse.runs.files.list_runs", noisy)
    code, out, err = piped("runs")
    assert (code, out) == (1, "")
    assert "UserWarning" in err
    assert "Traceback" in err
    check(err)


COMMAND = [sys.executable, "-c", "from cachefuse_cli.app import main; main()"]


@pytest.mark.slow
@pytest.mark.parametrize("args", [["inspect"], ["inspect", "--json"]])
def test_an_output_that_is_not_utf_8(args, there):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *args], capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("ascii")
    assert "--json" not in args or json.loads(shown)["classes"]


@pytest.mark.slow
def test_closed_streams_stay_empty(there):
    """A file that took the number of a closed stream would get what is printed."""
    (there / "made").mkdir()
    args = ["predict", "--run", SUM, "--output", "made/out.csv"]
    command = [*COMMAND, *args]
    closed = f"import os; [os.close(i) for i in range(3)]; os.execv({command[0]!r}, {command!r})"
    assert subprocess.run([sys.executable, "-c", closed], check=False).returncode == 0
    assert (there / "made" / "out.csv").read_text().startswith("id,")
