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
    assert "unknown operation 'plus'" in cachefuse("align", "--op", "plus").error
    assert "width must be a multiple of 4" in cachefuse("align", "--width", "30").error
    assert "targets must be one of soft, hard" in cachefuse("align", "--targets", "firm").error
    assert "is not in this store" in cachefuse("align", "--encoder", "hf:none").error
    assert "holds no tokens of image; make them with cachefuse extract" in cachefuse("align", "--view", "tokens").error
    assert "no features of gone" in cachefuse("align", "--dataset", "gone").error
    assert not list((workspace / "runs").glob("*dfe*"))


def test_evaluate_runs_and_predict_know_alignments(cachefuse, space, run, fits):
    result = cachefuse("evaluate")
    assert "run mine-dfe-add-1: dfe-add of classic (image) with classic (text)" in result.err
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
    listed = cachefuse("runs")
    assert "mine-dfe-add-1" in listed.out
    assert "mine-sum-linear-asl-1" in listed.out
    fits(listed.out)
    kinds = [one.get("kind") for one in json.loads(cachefuse("runs", "--json").out)]
    assert kinds == [None, "alignment"]
    assert cachefuse("predict", "--output", "x.csv").code == 0  # by the head, though the alignment is later
    assert "is an alignment, without classes" in cachefuse("predict", "--run", "mine-dfe-add-1").error
    assert "is a head, which predicts" in cachefuse("retrieve", "--text", "x", "--run", "mine-sum-linear-asl-1").error
    assert "--without is for heads" in cachefuse("evaluate", "--without", "image").error


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
    assert "leave out --split" in cachefuse("report", "--split", "test").error


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
    assert "one of them" in cachefuse("retrieve").error
    assert "one of them" in cachefuse("retrieve", "--text", "x", "--image", "y.png").error
    assert "no such file" in cachefuse("retrieve", "--image", "gone.png").error
    assert "has no text" in cachefuse("retrieve", "--text", "").error
    assert "has no split 'dev'" in cachefuse("retrieve", "--text", "x", "--split", "dev").error
    assert "has no audio side" in cachefuse("retrieve", "--text", "x", "--among", "audio").error
    assert "not both" in cachefuse("retrieve", "--text", "x", "--run", "a", "--encoder", "classic").error
    (folder / "empty").mkdir()
    assert "no alignments in" in cachefuse("retrieve", "--text", "x", "--workspace", "empty").error


def test_zero_shot_on_another_dataset(cachefuse, space, colours, fits):
    assert cachefuse("extract", "--dataset", colours, "--encoder", "classic").code == 0
    result = cachefuse("zero-shot", "--dataset", "colours", "--prompt", "a {} circle", "--prompt", "{} things")
    assert result.code == 0
    assert re.search(r"^test +9 +[01]\.\d{3} +[01]\.\d{3} +1\.000$", result.out, re.M)
    assert "0.333" in result.out
    fits(result.out)
    found = json.loads(cachefuse("zero-shot", "--dataset", "colours", "--classes", "azure,lime,ruby", "--json").out)
    assert found["classes"] == ["azure", "lime", "ruby"]
    assert "has 3 classes. Got 2 names" in cachefuse("zero-shot", "--dataset", "colours", "--classes", "a,b").error
    assert "must have {}" in cachefuse("zero-shot", "--dataset", "colours", "--prompt", "a photo").error
    assert "takes a multi-class dataset" in cachefuse("zero-shot", "--dataset", "mine").error


def test_fine_tune_leaves_a_head_that_predicts_new_pictures(cachefuse, space, colours, folder, fits):
    cachefuse("extract", "--dataset", colours, "--encoder", "classic")
    result = cachefuse("fine-tune", "--dataset", "colours", "--epochs", "3", "--batch-size", "8")
    assert result.code == 0
    assert "the tuned encoder is" in result.err
    fits(result.out)
    tuned = Alignment.load(space / "runs" / "mine-dfe-add-1-colours-1")
    assert tuned.parent == "mine-dfe-add-1"
    found = json.loads(cachefuse("predict", "--image", "colours/test/red/0.png", "--json").out)
    assert found["scores"].keys() == COLOURS.keys()
    submission = cachefuse("predict", "--split", "test", "--output", "p.csv")
    assert submission.code == 0
    # The one that was tuned is not what retrieve takes by itself.
    assert "by mine-dfe-add-1\n" in cachefuse("retrieve", "--text", "x", "--dataset", "mine").out
    assert "has no audio side to tune" in cachefuse("fine-tune", "--dataset", "mine", "--modality", "audio").error


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
    assert "takes a dataset of scored pairs" in cachefuse("similarity", "--dataset", "mine").error
    assert "no scored pairs in split 'val'" in cachefuse("similarity", "--dataset", "sts", "--split", "val").error
    assert "must be a file of .png" in cachefuse("similarity", "--dataset", "sts", "--plot", "x.gif").error
    assert "is about pairs of sentences" in cachefuse("train-head", "--dataset", "sts").error


def test_pairs_are_a_dataset_to_align_on(cachefuse, workspace, fits):
    result = cachefuse("pairs", "--dataset", "mine", "--threshold", "0.5")
    assert result.code == 0
    manifest = re.search(r"wrote (\S+)", result.out)[1]
    fits(result.out)
    found = cachefuse("extract", "--dataset", manifest, "--encoder", "classic")
    assert found.code == 0
    assert "cachefuse align" in found.out
    assert "takes two encoders. Got 1" in cachefuse("align", "--dataset", "mine-pairs").error
    assert "at most 1" in cachefuse("pairs", "--dataset", "mine", "--threshold", "1.5").error
    found = json.loads(cachefuse("pairs", "--dataset", "mine", "--threshold", "0.5", "--output", "p", "--json").out)
    assert sum(found["pairs"].values()) > 0
