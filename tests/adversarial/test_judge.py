"""The judge tells right from wrong."""

import pytest

from adversarial.forks import Ended
from adversarial.judge import CLEAR, NOTED, SAME, Counts, verdict


def ended(code=0, err="", stopped=""):
    return Ended(code=code, stopped=stopped, peak=0, seconds=1.0, out="", err=err)


@pytest.mark.parametrize(
    ("of", "result", "expected"),
    [
        (ended(), {"f1": 0.5}, SAME),
        (ended(1, "error: run.json is damaged\n"), None, CLEAR),
        (ended(0, "note: left out\n"), {"f1": 0.4}, NOTED),
        (ended(), {"views": [{"damaged": 1}]}, NOTED),
        (ended(), {"views": [{"damaged": 0, "done": 64, "rows": 112}]}, NOTED),
    ],
)
def test_what_is_right(of, result, expected):
    assert verdict(of, result, [{"f1": 0.5}]) == expected


@pytest.mark.parametrize(
    ("of", "word"),
    [
        (ended(), "without a word"),
        (ended(0, "note: known\n"), "without a word"),
        (ended(1), "0 errors"),
        (ended(1, "error: a\nerror: b\n"), "2 errors"),
        (ended(1, "error: " + "x" * 600), "characters"),
        (ended(1, "error: \x1b[31m"), "terminal"),
        (ended(1, "Traceback (most recent call last)\nKeyError: 1"), "traceback"),
        (ended(-11), "-11"),
        (ended(-9, stopped="memory"), "memory"),
    ],
)
def test_what_is_wrong(of, word):
    counts = Counts()
    counts.add(verdict(of, {"f1": 0.4}, [{"f1": 0.5}], ["note: known"]), "a case")
    assert counts.verdicts == {"anything else": 1}
    assert word in counts.wrong[0]
