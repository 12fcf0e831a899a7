import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachefuse.alignment.run import Alignment
from cachefuse.alignment.train import evaluate_alignment
from cachefuse.store.store import FeatureStore
from fixtures.messages import says

QUICK = "--epochs", "3", "--width", "32", "--batch-size", "64", "--seed", "1"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def aligned(made, run_in, tmp_path_factory):
    """The same workspace with an alignment of its images and texts, made once."""
    folder = tmp_path_factory.mktemp("aligned")
    shutil.copytree(made, folder / "workspace")
    run_in(folder, "align", "--dataset", "mine", *QUICK, "--json")
    return folder / "workspace"


@pytest.fixture
def space(aligned, folder):
    return Path(shutil.copytree(aligned, folder / "workspace"))


@pytest.fixture
def run(space):
    return Alignment.load(space / "runs" / "mine-dfe-add-1")


@pytest.fixture
def colours(folder):
    """A multi-class dataset of plain pictures in folders."""
    for split, n in (("train", 6), ("test", 3)):
        for name, rgb in COLOURS.items():
            (folder / "colours" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (48, 48), tuple(c + i for c in rgb)).save(
                    folder / "colours" / split / name / f"{i}.png"
                )
    manifest = folder / "colours" / "colours.toml"
    manifest.write_text(
        'name = "colours"\ntask = "multiclass"\n'
        '[reader]\nkind = "folder"\nsplits = { train = "train", test = "test" }\n'
    )
    return manifest


@pytest.fixture
def sentences(folder):
    """A dataset of scored pairs of sentences."""
    (folder / "sts").mkdir()
    for split, n in (("train", 12), ("test", 9)):
        rows = [
            f"a red circle {i}\t{'a red circle' if i % 3 else 'blue squares, many'} {i}\t{i % 3 * 2.5}"
            for i in range(n)
        ]
        (folder / "sts" / f"{split}.tsv").write_text("first\tsecond\tscore\n" + "\n".join(rows) + "\n")
    manifest = folder / "sts" / "sts.toml"
    manifest.write_text(
        'name = "sts"\ntask = "similarity"\nscale = [0.0, 5.0]\n[reader]\nkind = "sentence_pairs"\n'
        'files = { train = "train.tsv", test = "test.tsv" }\ntexts = ["first", "second"]\nlabel = "score"\n'
    )
    return manifest


def test_align_with_the_settings_of_a_paper(cachefuse, workspace):
    """Options change them; the run has them all."""
    result = cachefuse(
        "align", "--dataset", "mine", "--preset", "cbmf-paper", "--epochs", "2", "--width", "32", "--json"
    )
    assert result.code == 0, result.err
    config = json.loads((workspace / "runs" / "mine-dfe-add-1" / "run.json").read_text())["config"]
    found = {name: config[name] for name in ("epochs", "width", "targets", "monitor", "patience", "schedule")}
    assert found == {
        "epochs": 2, "width": 32, "targets": "soft", "monitor": "loss", "patience": 5, "schedule": "constant"
    }  # fmt: skip
    assert says(cachefuse("align", "--dataset", "mine", "--preset", "cbmf-papre").error, "cbmf-papre cbmf-paper")


def test_align_measures_both_directions_and_says_what_is_next(cachefuse, workspace, fits):
    result = cachefuse("align", "--dataset", "mine", *QUICK, "--op", "dot-attention")
    assert result.code == 0
    found = re.findall(
        r"^(?:val|test|)\s*(image to text|text to image) +(0\.\d{3}) +(0\.\d{3}) +(0\.\d{3})", result.out, re.M
    )
    assert [name for name, *_ in found] == ["image to text", "text to image"] * 2
    assert re.search(r"modality gap, untrained to trained: val \d\.\d{3} to \d\.\d{3}, test ", result.out)
    assert "mine-dfe-dot-attention-1" in result.out
    assert "cachefuse retrieve --text" in result.out
    fits(result.out)


def test_align_in_json_is_what_the_run_keeps(cachefuse, workspace):
    found = json.loads(cachefuse("align", *QUICK, "--method", "projection", "--json").out)
    run = Alignment.load(Path(found["path"]))
    assert found["run"] == run.name == "mine-projection-1"
    assert found["results"]["test"]["gap_after"] == run.results["test"].gap_after
    assert run.config.method == "projection"
    assert (run.config.epochs, run.config.width, run.config.seed) == (3, 32, 1)


def test_bad_settings_are_one_line(cachefuse, workspace):
    assert says(cachefuse("align", "--op", "plus").error, "plus")
    assert says(cachefuse("align", "--width", "30").error, "width 4")
    assert says(cachefuse("align", "--targets", "firm").error, "targets soft hard firm")
    assert says(cachefuse("align", "--encoder", "hf:none").error, "none")
    assert says(cachefuse("align", "--views", "tokens").error, "tokens image extract")
    assert says(cachefuse("align", "--dataset", "gone").error, "gone")
    assert not list((workspace / "runs").glob("*dfe*"))


def test_evaluate_runs_and_predict_know_alignments(cachefuse, space, run, fits):
    result = cachefuse("evaluate")
    assert says(result.err, "mine-dfe-add-1 classic image text")
    one = run.results["test"].directions["text to image"]
    assert f"{one.recall[1]:.3f}" in result.out
    fits(result.out)
    found = json.loads(cachefuse("evaluate", "--split", "train", "--json").out)
    store = FeatureStore(space / "cache" / "mine.zarr")
    assert found["results"].keys() == {"train"}
    expected = evaluate_alignment(run, store, "train")["train"].directions["image to text"].recall
    assert found["results"]["train"]["directions"]["image to text"]["recall"] == {
        str(k): x for k, x in expected.items()
    }
    assert says(cachefuse("evaluate", "--scores", "s.csv").error, "--scores alignment")
    listed = cachefuse("runs")
    assert "mine-dfe-add-1" in listed.out
    assert "mine-sum-linear-asl-1" in listed.out
    fits(listed.out)
    found = json.loads(cachefuse("runs", "--json").out)
    assert [one.get("kind") for one in found] == [None, "alignment"]
    assert found[1]["split"] == "test"  # which chose nothing
    assert found[1]["caution"] is None
    assert cachefuse("predict", "--output", "x.csv").code == 0  # by the head, though the alignment is later
    assert says(cachefuse("predict", "--run", "mine-dfe-add-1").error, "alignment classes")
    assert says(cachefuse("retrieve", "--text", "x", "--run", "mine-sum-linear-asl-1").error, "head")
    assert says(cachefuse("evaluate", "--drop-modality", "image").error, "--drop-modality heads")


@pytest.mark.slow
def test_report_is_a_page_with_its_plots(cachefuse, space, run):
    result = cachefuse("report")
    assert result.code == 0
    folder = space / "runs" / run.name
    assert [line.split()[1] for line in result.out.splitlines()] == [
        f"workspace/runs/{run.name}/{name}" for name in ("report.html", "retrieval.png", "training.png")
    ]
    assert "What queries find" in (folder / "report.html").read_text()
    assert (folder / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(cachefuse("report", "--output", "page.html", "--json").out)["plots"]) == 2
    assert says(cachefuse("report", "--split", "test").error, "--split")


def test_retrieve_by_words_lists_images_with_their_texts(cachefuse, space, fits):
    result = cachefuse("retrieve", "--text", "a red circle", "-k", "4")
    assert result.code == 0
    assert result.out.startswith("images of mine nearest to 'a red circle', by mine-dfe-add-1")
    rows = re.findall(r"^(\d) +(-?\d\.\d{3})  (\S+)", result.out, re.M)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    fits(result.out)


def test_retrieve_compares_all_and_keeps_to_a_split(cachefuse, space, run):
    store = FeatureStore(space / "cache" / "mine.zarr")
    found = json.loads(cachefuse("retrieve", "--text", "a red circle", "-k", "1000", "--split", "test", "--json").out)
    assert len(found["matches"]) == int((store.splits == "test").sum())
    assert {store.splits[match["sample"]] for match in found["matches"]} == {"test"}
    assert all(store.ids[match["sample"]] == match["id"] for match in found["matches"])
    features = store.open_features("aligned:mine-dfe-add-1", "image")
    vectors = features.read()
    assert np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=2e-3)
    assert found["matches"][0]["text"]


def test_retrieve_by_a_picture_lists_texts_and_writes_a_page(cachefuse, space, folder):
    Image.new("RGB", (40, 40), (200, 20, 20)).save(folder / "photo.png")
    result = cachefuse("retrieve", "--image", "photo.png", "-k", "3", "--html", "found.html")
    assert result.code == 0
    assert result.out.startswith("texts of mine nearest to 'photo.png'")
    page = (folder / "found.html").read_text()
    assert page.count("data:image/jpeg") >= 3
    among = json.loads(cachefuse("retrieve", "--image", "photo.png", "--among", "image", "--json").out)
    assert among["modality"] == "image"


def test_retrieve_refuses_what_it_can_not_look_for(cachefuse, space, folder):
    assert says(cachefuse("retrieve").error, "--text --image")
    assert says(cachefuse("retrieve", "--text", "x", "--image", "y.png").error, "--text --image")
    assert says(cachefuse("retrieve", "--image", "gone.png").error, "gone.png")
    assert says(cachefuse("retrieve", "--text", "").error, "text")
    assert says(cachefuse("retrieve", "--text", "x", "--split", "dev").error, "dev")
    assert says(cachefuse("retrieve", "--text", "x", "--among", "audio").error, "audio")
    assert says(cachefuse("retrieve", "--text", "x", "--run", "a", "--encoder", "classic").error, "--run --encoder")
    (folder / "empty").mkdir()
    assert says(cachefuse("retrieve", "--text", "x", "--workspace", "empty").error, "alignments empty")


def test_zero_shot_on_another_dataset(cachefuse, space, colours, fits):
    assert cachefuse("extract", "--dataset", colours, "--encoder", "classic").code == 0
    result = cachefuse("zero-shot", "--dataset", "colours", "--prompt", "a {} circle", "--prompt", "{} things")
    assert result.code == 0
    assert re.search(r"^test +9 +[01]\.\d{3} +[01]\.\d{3} +1\.000$", result.out, re.M)
    assert "0.333" in result.out
    fits(result.out)
    found = json.loads(cachefuse("zero-shot", "--dataset", "colours", "--classes", "azure,lime,ruby", "--json").out)
    assert found["classes"] == ["azure", "lime", "ruby"]
    assert says(cachefuse("zero-shot", "--dataset", "colours", "--classes", "a,b").error, "3 2")
    assert says(cachefuse("zero-shot", "--dataset", "colours", "--prompt", "a photo").error, "{}")
    assert says(cachefuse("zero-shot", "--dataset", "mine").error, "mine")


def test_fine_tune_leaves_a_head_that_predicts_new_pictures(cachefuse, space, colours, folder, fits):
    cachefuse("extract", "--dataset", colours, "--encoder", "classic")
    result = cachefuse("fine-tune", "--dataset", "colours", "--epochs", "3", "--batch-size", "8")
    assert result.code == 0
    assert says(result.err, "encoder")
    fits(result.out)
    tuned = Alignment.load(space / "runs" / "mine-dfe-add-1-colours-1")
    assert tuned.parent == "mine-dfe-add-1"
    found = json.loads(cachefuse("predict", "--image", "colours/test/red/0.png", "--json").out)
    assert found["scores"].keys() == COLOURS.keys()
    submission = cachefuse("predict", "--split", "test", "--output", "p.csv")
    assert submission.code == 0
    # The one that was tuned is not what retrieve takes by itself.
    assert "by mine-dfe-add-1\n" in cachefuse("retrieve", "--text", "x", "--dataset", "mine").out
    assert says(cachefuse("fine-tune", "--dataset", "mine", "--modality", "audio").error, "audio")


def test_linear_probe_by_train_head(cachefuse, space, colours):
    extracted = cachefuse("extract", "--dataset", colours, "--encoder", "aligned:mine-dfe-add-1")
    assert "aligned:mine-dfe-add-1" in extracted.out
    args = "--encoder", "aligned:mine-dfe-add-1", "--fusion", "image", "--head", "linear", "--epochs", "3"
    found = json.loads(cachefuse("train-head", "--dataset", "colours", *args, "--json").out)
    assert "test" in found["metrics"]


def test_aligned_features_are_the_same_from_the_store_and_from_raw_data(cachefuse, space, colours, folder):
    """One way reads the cached features of the encoder, the other passes every picture through it again."""
    cachefuse("extract", "--dataset", colours, "--encoder", "aligned:mine-dfe-add-1")
    store = FeatureStore(space / "cache" / "colours.zarr")
    encoded = store.open_features("aligned:mine-dfe-add-1", "image").read()
    shutil.rmtree(space / "cache" / "colours.zarr")
    cachefuse("extract", "--dataset", colours, "--encoder", "classic", "--encoder", "aligned:mine-dfe-add-1")
    derived = FeatureStore(space / "cache" / "colours.zarr").open_features("aligned:mine-dfe-add-1", "image").read()
    assert np.allclose(encoded.astype(np.float32), derived.astype(np.float32), atol=2e-3)


def test_train_head_takes_aligned_features_only_by_name(cachefuse, space):
    cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "aligned:mine-dfe-add-1")
    plain = json.loads(cachefuse("train-head", "--dataset", "mine", "--epochs", "1", "--json").out)
    assert "aligned" not in json.dumps(plain)
    assert cachefuse("train-head", "--encoder", "aligned:mine-dfe-add-1", "--epochs", "1").code == 0


@pytest.mark.slow
def test_similarity_of_pairs(cachefuse, space, sentences, fits, folder):
    assert "cachefuse similarity" in cachefuse("extract", "--dataset", sentences, "--encoder", "classic").out
    result = cachefuse("similarity", "--dataset", "sts", "--run", "mine-dfe-add-1", "--plot", "curve.png")
    assert result.code == 0
    assert re.search(r"^classic +train +12 +-?\d\.\d{3}", result.out, re.M)
    assert re.search(r"^aligned:mine-dfe-add-1 +train +12 +-?\d\.\d{3}", result.out, re.M)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    fits(result.out)
    found = json.loads(cachefuse("similarity", "--dataset", "sts", "--split", "test", "--json").out)
    assert found["encoders"]["classic"]["test"]["n_pairs"] == 9
    assert len(found["tolerances"]) == len(found["encoders"]["classic"]["test"]["tolerance"]["all"]) == 100
    assert says(cachefuse("similarity", "--dataset", "mine").error, "mine")
    assert says(cachefuse("similarity", "--dataset", "sts", "--split", "val").error, "val")
    assert says(cachefuse("similarity", "--dataset", "sts", "--plot", "x.gif").error, ".png x.gif")
    assert says(cachefuse("train-head", "--dataset", "sts").error, "similarity")


def test_pairs_are_a_dataset_to_align_on(cachefuse, workspace, fits):
    result = cachefuse("pairs", "--dataset", "mine", "--threshold", "0.5")
    assert result.code == 0
    manifest = re.search(r"wrote (\S+)", result.out)[1]
    fits(result.out)
    found = cachefuse("extract", "--dataset", manifest, "--encoder", "classic")
    assert found.code == 0
    assert "cachefuse align" in found.out
    assert says(cachefuse("align", "--dataset", "mine-pairs").error, "encoders 1")
    assert says(cachefuse("pairs", "--dataset", "mine", "--threshold", "1.5").error, "1")
    found = json.loads(cachefuse("pairs", "--dataset", "mine", "--threshold", "0.5", "--output", "p", "--json").out)
    assert sum(found["pairs"].values()) > 0
    alone = cachefuse("pairs", "--dataset", "mine", "--threshold", "0.5", "--within-samples")
    assert says(alone.error, "one text --within-samples")
