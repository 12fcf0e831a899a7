"""Run commands, fast, under a watch: each in a fork of one process, with limits of time and memory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
GB = 1_000_000_000
# Imported before the first fork: what the commands import late.
MODULES = (
    "cachefuse_cli.app",
    "cachefuse_cli.shared.render",
    "torch",
    "transformers",
    "torchvision",
    "sklearn.metrics",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "pyarrow.parquet",
    "pyarrow.csv",
    "zarr",
    "h5py",
    "safetensors.torch",
    "scipy.sparse",
    "adversarial.conditions",
)


@dataclass
class Ended:
    """How a command ended. ``code`` is minus a signal's number; ``stopped`` is the limit it met, if any."""

    code: int
    stopped: str
    peak: int  # bytes above the process it came from
    seconds: float
    out: str
    err: str


class Forks:
    """The process that commands are forks of. Use it as a context."""

    def __init__(self, modules: Sequence[str] = MODULES):
        self.scratch = tempfile.TemporaryDirectory(prefix="forks-")
        self.modules = modules
        self.process: Any = None

    def __enter__(self) -> "Forks":
        environment = {
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "CACHEFUSE_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONWARNINGS": "ignore",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("CACHEFUSE_WORKSPACE", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "adversarial.server", ",".join(self.modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.scratch.cleanup()

    def call(
        self, function, *arguments, cwd, timeout=60, memory=GB, env=None, signals=(), conditions=None, warm=False
    ) -> Ended:
        """Call ``module:name`` with arguments that JSON knows, in a child.

        ``signals`` are (seconds, number) after the start. ``warm`` has later children begin with what this one imports.
        """
        files = {name: Path(self.scratch.name, name) for name in ("out", "err")}
        for file in files.values():
            file.write_bytes(b"")
            file.chmod(0o666)
        request = {
            "function": function,
            "arguments": arguments,
            "cwd": str(cwd),
            "timeout": timeout,
            "memory": memory,
            "env": env or {},
            "signals": list(signals),
            "conditions": conditions or {},
            **{name: str(file) for name, file in files.items()},
        }
        if warm:
            request["modules"] = str(Path(self.scratch.name, "modules"))
        answer = self._ask(request)
        if warm and answer["code"] == 0:
            self._ask({"modules": Path(request["modules"]).read_text().split("\n")})
        texts = {name: file.read_text("utf-8", "surrogateescape") for name, file in files.items()}
        return Ended(**answer, **texts)

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *args, cwd, **options) -> Ended:
        """Run ``cachefuse`` with arguments."""
        return self.call("cachefuse_cli.app:main", [str(arg) for arg in args], cwd=cwd, **options)
