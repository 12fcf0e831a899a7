"""Try many hostile files in few children, and judge what each came to."""

import json

from adversarial.judge import CLEAR, SAME, UNSAFE, Counts, fault_of

PEAK = 1_000_000_000  # bytes above the process
PATIENCE = 60  # seconds for a batch


def try_each(forks, counts: Counts, function: str, before: tuple, names: list, cases: list[str], folder) -> None:
    """Give names to a function of ``children.py``; behind one that ends its child, another child goes on."""
    answers, start, lines = folder / "answers.jsonl", 0, []
    while start < len(names):
        answers.write_text("")
        ended = forks.call(
            f"adversarial.children:{function}",
            *before,
            names,
            str(answers),
            start,
            cwd=folder,
            timeout=PATIENCE,
            memory=3 * PEAK,
        )
        new = [json.loads(line) for line in answers.read_text().splitlines()]
        lines += new
        start += len(new)
        if start < len(names):
            counts.add(f"the process ended: {fault_of(ended) or ended.code}", cases[start])
            start += 1
    for line in lines:
        counts.add(judge(line), cases[line["number"]])


def judge(line: dict) -> str:
    """Judge one answer of a child."""
    if line["peak"] > PEAK:
        return f"a peak of {line['peak']:,} bytes above the process"
    if line["said"]:
        return f"{line['said']} bytes on stderr"
    if line["wrong"]:
        return line["wrong"]
    if line["seconds"] > PATIENCE / 2:
        return f"took {line['seconds']:.0f} s"
    if line["found"] == "usable":
        return SAME
    if line["found"].startswith("bad: "):
        one_line = len(line["found"]) <= 525 and not UNSAFE.search(line["found"])
        return CLEAR if one_line else f"a reason that is no line: {line['found'][:200]!r}"
    return line["found"][:300]
