"""Whether what a command did is right: the same result as undamaged, or a clear line. Anything else is wrong."""

import csv
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 520  # characters of a line of an error
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # what a terminal obeys
TIMES = ("seconds", "ms_per_item", "steps_per_second")  # columns of a sweep's tables
TUNED = re.compile(rb"(aligned:[\w-]+-mine)-\d+")  # the number of a tuned alignment: a call made again counts on
AGAIN = re.compile(r"/aligned-[\w-]+-mine-[2-9]/")
# What differs between two undisturbed runs.
VOLATILE = {
    *TIMES,
    "seconds",
    "created",
    "extracted",
    "path",
    "source",  # of an encoder: its folder
    "run",
    "output",
    "size_mb",
    "versions",
    "time",
    "tuned",
    "digests",
    "files",
}
LEFTOVERS = re.compile(r"\.new-|\.tmp$|\.partial$|\.old-|^tmp")

SAME, CLEAR, NOTED = "same result", "clear line", "same but for what a note says"
RIGHT = SAME, CLEAR, NOTED


@dataclass
class Counts:
    """What was tried, and what came of it. A case that is wrong has its reason and what reproduces it."""

    verdicts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, verdict: str, case: str) -> None:
        if sum(self.verdicts.values()) % 50 == 49:
            log(f"... {dict(self.verdicts)}")
        if verdict in RIGHT:
            self.verdicts[verdict] += 1
        else:
            self.verdicts["anything else"] += 1
            self.wrong.append(f"{case}: {verdict}")
            log(f"{case}: {verdict}")

    def report(self, title: str) -> str:
        """Print the counts, and return the first of those that are wrong."""
        counts = ", ".join(f"{name} {n:,}" for name, n in sorted(self.verdicts.items()) if name in RIGHT)
        text = "\n".join([f"{title}: {counts or 'nothing tried'}; anything else {len(self.wrong):,}", *self.wrong])
        print("\n" + text.encode("utf-8", "backslashreplace").decode())
        log(text.partition("\n")[0])
        return "\n".join(self.wrong[:20])


def log(text: str) -> None:
    """Write a line to the file that $CACHEFUSE_ATTACK_LOG names, at once: a long attack may be stopped."""
    if name := os.environ.get("CACHEFUSE_ATTACK_LOG"):
        with open(name, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")


def fault_of(ended) -> str:
    """Return what no command may do: hang, take too much memory, crash, print a traceback or a long message."""
    if ended.stopped:
        return f"stopped for {ended.stopped} after {ended.seconds:.0f} s"
    if "Traceback (most recent call last)" in ended.err:
        return f"a traceback: {ended.err.strip().splitlines()[-1][:300]}"
    if ended.code not in (0, 1, 130):
        return f"exit code {ended.code}: {ended.err.strip()[-300:]}"
    long = [line for line in ended.err.splitlines() if len(line) > LONGEST]
    if long:
        return f"a line of {len(long[0])} characters: {long[0][:200]}"
    if unsafe := UNSAFE.search(ended.err.replace("\n", "")):
        return f"{unsafe[0]!r} reaches the terminal"
    return ""


def notes(ended) -> set[str]:
    return {line for line in ended.err.splitlines() if line.startswith("note: ")}


def verdict(ended, result, expected, known_notes=()) -> str:
    """Judge a command that reads; ``expected`` are the results that are right."""
    fault = fault_of(ended)
    if fault:
        return fault
    if ended.code:
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if len(errors) == 1 and ended.code == 1:
            return CLEAR
        return f"exit code {ended.code} with {len(errors)} errors: {(ended.err or ended.out).strip()[-300:]}"
    if result in expected:
        return SAME
    if notes(ended) - set(known_notes) or names_damage(result):
        return NOTED
    return f"another result without a word: {difference(result, expected[0])}"


def names_damage(result) -> bool:
    """Whether a listing, as of ``inspect --json``, names damaged blocks or missing rows itself."""
    views = result.get("views", []) if isinstance(result, dict) else []
    views = [view for view in views if isinstance(view, dict)]
    return any(view.get("damaged") or view.get("done", 0) < view.get("rows", 0) for view in views)


def difference(found, expected, where="") -> str:
    """Return the first place where two results differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if found.get(key) != expected.get(key):
                return difference(found.get(key), expected.get(key), f"{where}/{key}")
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, pair in enumerate(zip(found, expected, strict=True)):
            if pair[0] != pair[1]:
                return difference(*pair, f"{where}/{i}")
    if isinstance(found, list) and isinstance(expected, list) and len(found) > len(expected) > 0:
        (more, *_) = [item for item in found if item not in expected] or found[-1:]
        nearest = max(expected, key=lambda item: alike(item, more))
        return f"{len(found)} for {len(expected)}; one more, nearly: {difference(more, nearest, where)}"
    return f"{where}: {str(found)[:120]!r} for {str(expected)[:120]!r}"


def alike(one, other) -> int:
    """Return how many values two dictionaries share."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return 0
    return sum(one.get(key) == value for key, value in other.items())


def plain(value):
    """Return a value of JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in VOLATILE}
    return [plain(item) for item in value] if isinstance(value, list) else value


# What a command left


def left(folder: Path) -> dict:
    """Return what matters of a workspace and of the files that commands write beside it, and runs by their kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            not path.is_file()
            or path.name.endswith((".lock", ".writer", ".png", ".svg", ".html", ".md"))
            or "/data/" in name
            or "/samples/stamp/" in name  # the times of files
        ):
            continue
        if name.startswith(("workspace/runs/", "images", "bert", "vit")) or AGAIN.search(name):
            continue
        found[name] = canonical(path)
    runs = [
        {file.name: canonical(file) for file in sorted(run.iterdir()) if file.suffix != ".md"}
        for run in sorted(run_folders(folder))
    ]
    runs = [run for run in runs if not interrupted(run)]  # Ctrl-C keeps the best epoch so far
    found["runs"] = [run for _, run in sorted({repr(run): run for run in runs}.items())]
    return found


def interrupted(run: dict) -> bool:
    about = run.get("run.json")
    return isinstance(about, dict) and about.get("interrupted") is True


def run_folders(folder: Path):
    return [run for run in (folder / "workspace" / "runs").glob("*") if run.is_dir() and not run.name.startswith(".")]


def canonical(path: Path):
    """Return a file's content without what differs from run to run."""
    if path.suffix in (".png", ".svg", ".html", ".md", ".lock"):
        return "there"
    data = path.read_bytes()
    if path.name == "journal.jsonl":
        lines = {}
        for text in data.decode().splitlines():
            line = json_or_none(text)
            if isinstance(line, dict):
                lines[(str(line.get("view")), str(line.get("block")))] = text
        return sorted(lines.values())
    if path.name == "trials.jsonl":
        lines = [plain(json_or_none(text)) for text in data.decode().splitlines()]
        return sorted(repr({**line, "checksum": 0}) for line in lines if isinstance(line, dict))
    if path.suffix == ".json" and path.name != "bad.jsonl":
        value = json_or_none(TUNED.sub(rb"\1", data))
        if value is not None:
            return without_checksum(plain(value))
    if path.suffix == ".csv" and "sweeps" in path.parts:
        rows = list(csv.DictReader(data.decode().splitlines()))
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return data


def without_checksum(value):
    """Drop the checksum of a description that holds a time: of a store's and of a run's."""
    about = value.get("attributes", {}).get("cachefuse", {}) if isinstance(value, dict) else {}
    about.pop("checksum", None)
    if isinstance(value, dict):
        value.pop("checksum", None)
    return value


def json_or_none(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def leftovers(folder: Path) -> list[str]:
    """Return what an interrupted command left behind."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(name) for name in names if LEFTOVERS.search(name.name)]
