import csv
import json

import pytest

from cachefuse.training.config import TrainConfig
from fixtures.messages import says


@pytest.mark.slow
def test_the_demo_shows_fusion_and_submits(cachefuse, folder, fits):
    (folder / "mine.toml").unlink()
    result = cachefuse("demo", "--json")
    assert result.code == 0
    scores = {run["run"].split("-")[1]: run["metrics"]["val"]["micro_f1"] for run in json.loads(result.out)["runs"]}
    alone = max(scores["image"], scores["text"])
    assert all(scores[fusion] > alone + 0.1 for fusion in ("concat", "sum", "mixed"))
    with (folder / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["id"] for row in rows}) == 600
    assert all(row["labels"] for row in rows)
    before = sorted((folder / "workspace" / "cache").rglob("journal.jsonl"))
    fingerprints = [path.stat().st_mtime_ns for path in before]
    again = cachefuse("demo")
    assert again.code == 0
    assert [path.stat().st_mtime_ns for path in before] == fingerprints
    assert "fusion can predict all of them" in again.out
    fits(again.out)


def test_an_interrupt_ends_the_demo(cachefuse, folder, monkeypatch):
    import cachefuse.runs.train as module

    def interrupted(store, config, on_progress):
        def stop(epoch):
            raise KeyboardInterrupt

        return real(store, TrainConfig(head="linear", epochs=2), on_progress=stop)

    real = module.train_head
    monkeypatch.setattr(module, "train_head", interrupted)
    monkeypatch.setattr("cachefuse.data.manifest.load_manifest", lambda name, load=_small: (load(), None))
    result = cachefuse("demo")
    assert result.code == 130
    assert says(result.err, "interrupted demo")
    assert not (folder / "submission.csv").exists()


def _small():
    from cachefuse.data.manifest import parse_manifest

    text = 'name = "shapes"\ntask = "multilabel"\nreader = { kind = "shapes", train = 20, test = 5 }'
    return parse_manifest(text, "shapes.toml")
