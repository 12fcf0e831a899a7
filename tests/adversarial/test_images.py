"""Hostile images: each is usable, or bad with a reason of one line; and a whole extract of them ends well."""

import json

import pytest

from adversarial.hostile import PEAK, try_each
from adversarial.images import write_images
from adversarial.judge import SAME, Counts, fault_of
from adversarial.sizes import SEED, size

BATCH = 100
MANIFEST = """
name = "hostile"
task = "multiclass"
classes = ["a", "b"]
reader = { kind = "table", files = { train = "images.jsonl" }, id = "id", image = "images/{file}", labels = "label" }
"""


def extract_all(forks, folder, about, counts):
    """Extract them all; what can't be used is listed, and nothing else is said."""
    rows = [{"id": str(i), "file": name, "label": "ab"[i % 2]} for i, (name, _) in enumerate(about)]
    rows = [row for row in rows if is_text(row["file"])]
    (folder.parent / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder.parent / "hostile.toml").write_text(MANIFEST)
    ended = forks.run(
        "extract",
        "--dataset",
        "./hostile.toml",
        "--encoder",
        "classic",
        "--max-bad",
        "1",
        "--threads",
        "2",
        "--json",
        cwd=folder.parent,
        timeout=300,
        memory=PEAK + 500_000_000,
        warm=True,
    )
    case = f"extract of images {about[0][1]} to {about[-1][1]}"
    found = fault_of(ended)
    if not found and ended.code:
        found = f"exit code {ended.code}: {ended.err[-300:]}"
    if not found and ended.peak > PEAK:
        found = f"a peak of {ended.peak:,} bytes above the process"
    strange = [
        line for line in ended.err.splitlines() if not line.startswith(("dataset ", "note: ")) and "s/s" not in line
    ]
    if not found and strange:
        found = f"on stderr: {strange[0][:200]!r}"
    counts.add(found or SAME, case)


def is_text(name):
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def attack(forks, folder, n, extracted=True):
    """Try the first ``n`` images, in batches."""
    counts = Counts()
    for start in range(0, n, BATCH):
        images = folder / f"from {start}" / "images"
        about = write_images(images, [SEED * 1_000_000 + i for i in range(start, min(n, start + BATCH))])
        cases = [f"image {case}" for _, case in about]
        try_each(forks, counts, "decode", (str(images),), [name for name, _ in about], cases, images.parent)
        if extracted:
            extract_all(forks, images, about, counts)
    return counts.report("images")


def test_some_hostile_images_are_used_or_named(data_forks, tmp_path):
    wrong = attack(data_forks, tmp_path, 60, extracted=False)
    assert not wrong, wrong


@pytest.mark.slow
def test_hostile_images_are_used_or_named(forks, tmp_path):
    wrong = attack(forks, tmp_path, size(8000, 300))
    assert not wrong, wrong
