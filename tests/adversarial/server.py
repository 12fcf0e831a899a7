"""A process that has imported everything, and runs each command in a fork of itself: 20 ms instead of seconds.

It reads requests, one JSON object a line, and answers each with one line. ``forks.py`` is the other side.
"""

import codecs
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

WATCH = 0.01  # seconds between two looks at a child's memory
WARM = (
    "cachefuse",
    "cachefuse_cli",
    "torch",
    "transformers",
    "tokenizers",
    "PIL",
    "matplotlib",
    "sklearn",
    "scipy",
    "zarr",
    "numcodecs",
    "rich",
    "typer",
    "click",
    "pyarrow",
    "h5py",
    "jinja2",
    "safetensors",
    "timm",
    "open_clip",
    "torchvision",
    "adversarial",
    "multiprocessing",
    "asyncio",
    "importlib_metadata",
    "google_crc32c",
    "filelock",
    "psutil",
    "huggingface_hub",
)
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid):
    """Return the bytes of memory that a process holds, 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def serve():
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        reply = import_all(request["modules"]) if "function" not in request else answer(request)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def import_all(names):
    """Import modules, so that no child has to; one that can't be imported by itself is left out."""
    before = set(sys.modules)
    for name in names:
        if name not in sys.modules and name.partition(".")[0] in WARM:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    for encoding in ("utf-8-sig", "utf-16", "cp1252", "ascii", "unicode_escape"):
        codecs.lookup(encoding)  # another user may not read Python's own folder
    gc.freeze()  # a child's collector would write to every page, and so copy it
    return sorted(set(sys.modules) - before)


def answer(request):
    """Run a request in a child, and return how it ended."""
    base = resident(os.getpid())
    begun = time.monotonic()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        child(request, tell)
    os.close(tell)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    with os.fdopen(ready) as pipe:
        base = int(pipe.read() or base)  # a fork begins without the pages of libraries
    descriptor = os.pidfd_open(pid)
    signals = sorted(request.get("signals", []))  # [seconds, number]
    deadline = begun + request["timeout"]
    why = ""
    while not select.select([descriptor], [], [], WATCH)[0]:
        now = time.monotonic()
        while signals and now - begun >= signals[0][0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signals.pop(0)[1])
        if resident(pid) - base > request["memory"]:
            why = "memory"
        elif now > deadline:
            why = "timeout"
        if why:
            break
    if why:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what the child left running
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stopped": why,
        "peak": max(0, usage.ru_maxrss * 1024 - base),
        "seconds": time.monotonic() - begun,
    }


def child(request, tell):
    """Be the command: never return."""
    code = 70
    try:
        os.write(tell, str(resident(os.getpid())).encode())
        os.close(tell)
        os.setpgid(0, 0)
        for number, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], os.O_WRONLY),
            (2, request["err"], os.O_WRONLY),
        ):
            descriptor = os.open(name, flags)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(n, mode, encoding="utf-8", errors=how)
            for n, mode, how in ((0, "r", "strict"), (1, "w", "surrogateescape"), (2, "w", "backslashreplace"))
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(request.get("env", {}))
        os.chdir(request["cwd"])
        importlib.import_module("adversarial.conditions").apply(request.get("conditions", {}))
        module, _, name = request["function"].partition(":")
        getattr(importlib.import_module(module), name)(*request["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
        traceback.print_exc()
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            if request.get("modules"):
                Path(request["modules"]).write_text("\n".join(sys.modules))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    import_all(sys.argv[1].split(","))
    serve()
