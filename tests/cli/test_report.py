import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fixtures.messages import says

TABLE = """
name = "photos"
task = "multilabel"
splits = { val = { from = "train", fraction = 0.4 } }
[reader]
kind = "table"
files = { train = "train.csv" }
id = "id"
image = "{id}.png"
text = "text"
labels = "tags"
"""


@pytest.fixture
def name(workspace):
    """The one run of the workspace."""
    (run,) = (workspace / "runs").iterdir()
    return run.name


@pytest.fixture
def photos(cachefuse, folder):
    """A dataset with files, extracted and trained on; its raw data moved to where no one looks by itself."""
    (folder / "photos.toml").write_text(TABLE)
    lines = ["id,text,tags"]
    for i in range(24):
        Image.new("RGB", (40, 20), ("red", "lime", "blue")[i % 3]).save(folder / f"{i}.png")
        lines.append(f"{i},photo number {i},{' '.join(['warm'] * (i % 3 == 0) + ['odd'] * (i % 2))}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    assert cachefuse("extract", "--dataset", "./photos.toml", "--encoder", "classic").code == 0
    assert cachefuse("train-head", "--head", "linear", "--epochs", "2", "--lr", "1e-6").code == 0
    raw = folder / "elsewhere"
    raw.mkdir()
    for path in [*folder.glob("*.png"), folder / "train.csv"]:
        path.rename(raw / path.name)
    return raw


def commands(page):
    """The two commands that a page gives, as lists of words."""
    return [shlex.split(html.unescape(text)) for text in re.findall("<pre>(.*?)</pre>", Path(page).read_text())]


def test_writes_a_page_into_the_run(cachefuse, workspace, name, fits):
    result = cachefuse("report")
    page = workspace / "runs" / name / "report.html"
    size = page.stat().st_size
    assert result.code == 0
    assert re.fullmatch(rf"wrote workspace/runs/{name}/report.html \((\d+) kB\)\n", result.out)
    assert int(re.search(r"\((\d+) kB", result.out)[1]) == round(size / 1000)
    assert says(result.err, f"{name} classic")
    assert page.read_text().count('<img src="data:image/jpeg') == 24
    fits(result.out)


def test_as_json_for_a_run_and_a_split(cachefuse, workspace, name):
    result = cachefuse("report", "--run", name, "--split", "train", "--output", "r.html", "--json")
    assert json.loads(result.out) == {"run": name, "output": "r.html", "bytes": Path("r.html").stat().st_size}
    assert f"Run {name} was trained on train rows" in Path("r.html").read_text()
    assert not (workspace / "runs" / name / "report.html").exists()


def test_a_run_elsewhere_gets_its_page_there(cachefuse, workspace, name, folder):
    shutil.copytree(workspace / "runs" / name, folder / "kept")
    assert cachefuse("report", "--run", "kept").out.startswith("wrote kept/report.html (")
    assert cachefuse("report", "--run", "kept").code == 0


def test_without_the_raw_data_it_says_where_pictures_come_from(cachefuse, photos):
    result = cachefuse("report", "-o", "r.html")
    assert result.code == 0
    assert says(result.err, "note --data-dir")
    assert "<img" not in Path("r.html").read_text()
    result = cachefuse("report", "-o", "r.html", "--data-dir", photos)
    assert "--data-dir" not in result.err
    page = Path("r.html").read_text()
    assert page.count("<img") > 2
    assert ">photo number " in page


def test_raw_data_that_is_named_must_be_there(cachefuse, photos):
    result = cachefuse("report", "--data-dir", "gone")
    assert (result.code, result.out) == (1, "")
    assert says(result.error, "photos gone train.csv")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--run", "nope"], "nope workspace/runs"),
        (["--split", "dev"], "mine dev train val test"),
        (["--split", "test"], "mine test train val"),
        (["--output", "gone/r.html"], "gone/r.html folder"),
        (["--output", "workspace"], "workspace folder"),
        (["--device", "tpu"], "device tpu"),
    ],
)
def test_says_in_one_line_what_is_wrong(args, message, cachefuse, workspace):
    result = cachefuse("report", *args)
    assert (result.code, result.out) == (1, "")
    assert says(result.error, message)
    assert not list(workspace.rglob("*.html"))


def test_an_interrupt_writes_nothing(cachefuse, workspace, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cachefuse.report.run_page.report_html", stop)
    result = cachefuse("report")
    assert result.code == 130
    assert says(result.err, "note interrupted")
    assert not list(workspace.rglob("*.html"))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--fusion mixed --layers 8,4 --activation relu --loss asl --loss-options gamma_negative=2 "
        "--loss-options reduction=sum --batch-size all --lr 0.01",
        "--folds 2 --patience 0 --refit --thresholds class --members 2 --seed 3",
        "--head mlp --layers '' --ema 0.9 --monitor macro_f1 --schedule onecycle",
        "--fusion text --optimizer lbfgs --head linear --modality-dropout 0.1",
    ],
)
@pytest.mark.slow
def test_its_command_trains_the_same_run_again(options, cachefuse, workspace):
    assert cachefuse("train-head", "--epochs", "2", *shlex.split(options), "--json").code == 0
    cachefuse("report", "--output", "r.html")
    train, predict = commands("r.html")
    assert train[:4] == ["cachefuse", "train-head", "--dataset", "mine"]
    first = workspace / "runs" / predict[predict.index("--run") + 1]
    again = Path(json.loads(cachefuse(*train[1:], "--json").out)["path"])
    assert again != first
    descriptions = [json.loads((run / "run.json").read_text()) for run in (first, again)]
    for description in descriptions:
        del description["created"], description["seconds"], description["checksum"]
    assert descriptions[0] == descriptions[1]
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert cachefuse(*predict[1:]).code == 0


@pytest.mark.slow
def test_an_ensembles_command_joins_it_again(cachefuse, workspace, name):
    cachefuse("train-head", "--head", "linear", "--epochs", "3", "--seed", "1")
    cachefuse("ensemble", name, f"{name[:-1]}2", "--thresholds", "class")
    assert cachefuse("report", "-o", "r.html").code == 0
    (words, _) = commands("r.html")
    assert words == ["cachefuse", "ensemble", name, f"{name[:-1]}2", "--thresholds", "class"]
    assert cachefuse(*words[1:]).code == 0
