"""What a sweep comes to, and the files that say so."""

import csv
import io
import math
import statistics
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from cachefuse.errors import TrainingError
from cachefuse.experiments.files import write_results
from cachefuse.experiments.results import SettingResult, SweepResult, Trial
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming

LINEAR = TrainConfig(head="linear", epochs=3, patience=0, batch_size=16, lr=0.01, loss="bce")


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def made_up(*figures, published=None, metric="micro_f1"):
    trials = tuple(
        Trial("k", seed, {} if math.isnan(x) else {metric: x}, 1, 0.5, "it diverged" if math.isnan(x) else "")
        for seed, x in enumerate(figures)
    )
    return SettingResult({"lr": 0.1 * len(figures), "layers": (8, 4)}, LINEAR, trials, published)


def made_result(*settings):
    return SweepResult("made: a <title> & $x^2$", ("lr", "layers"), ("micro_f1",), "val", 1234, (0, 1), settings)


def test_one_seed_that_diverges_spoils_the_mean():
    setting = made_up(0.5, math.nan)
    assert setting.n_diverged == 1
    assert math.isnan(setting.mean("micro_f1"))
    with pytest.raises(TrainingError, match=naming("lr")):
        _ = made_result(setting).best


def test_the_files(tmp_path):
    paper = (0.86, 0.001)
    result = made_result(
        made_up(0.5, 0.7, published=paper), made_up(), made_up(0.4, math.nan, published=(math.nan,) * 2)
    )
    write_results(result, tmp_path)
    rows = table(tmp_path / "summary.csv")
    assert rows[0] == {
        "lr": "0.2", "layers": "8,4", "trials": "2", "diverged": "0", "seconds": "0.5", "paper": "0.86",
        "micro_f1_mean": "0.6", "micro_f1_std": str(statistics.stdev([0.5, 0.7])), "paper_std": "0.001",
    }  # fmt: skip
    assert [row["trials"] for row in rows] == ["2", "0", "2"]
    assert [row["paper"] for row in rows] == ["0.86", "", ""]
    image = Image.open(tmp_path / "sweep.png")
    assert image.size[0] >= 1000
    assert image.convert("L").getextrema() == (0, 255) or image.convert("L").getextrema()[0] < 60
    assert ET.parse(tmp_path / "sweep.svg").getroot().tag.endswith("svg")
    assert "diverged" in (tmp_path / "sweep.svg").read_text("utf-8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_results(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plot_of_nothing_but_failures(tmp_path):
    write_results(made_result(made_up(math.nan, math.nan)), tmp_path)
    assert (tmp_path / "sweep.png").stat().st_size > 1000
