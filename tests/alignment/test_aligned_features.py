"""Aligned features beside those that they are made of: written, appended to, refreshed, damaged, chosen by default."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cachefuse.alignment import finetune
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import open_pairs
from cachefuse.alignment.finetune import fine_tune
from cachefuse.alignment.retrieve import retrieve
from cachefuse.alignment.run import Alignment, list_alignments
from cachefuse.alignment.space import AlignedSpace, EncoderSpace
from cachefuse.alignment.tower import aligned_features
from cachefuse.alignment.train import align
from cachefuse.alignment.zero_shot import zero_shot
from cachefuse.data.dataset import load_dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError, EncoderError, RunError, TrainingError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.verify import repair, verify
from cachefuse.runs.files import find_run
from cachefuse.runs.folder import ALIGNMENT
from cachefuse.runs.predict import predict_samples
from cachefuse.runs.save import save_run
from cachefuse.store.lock import only_writer
from cachefuse.store.store import FeatureStore
from cachefuse.training.selection import select_features
from fixtures.columns import columns, images_of, texts_of, with_columns
from fixtures.messages import naming
from fixtures.runs import edit

MANIFEST = """
name = "mine"
task = "multilabel"
reader = { kind = "shapes", train = 120, test = 40 }
splits = { val = { from = "train", fraction = 0.25 } }
"""
QUICK = AlignConfig(epochs=2, width=32, batch_size=64)
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(parse_manifest(MANIFEST, "mine.toml"), Path())


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    """A workspace with classic features and an alignment of them."""
    folder = tmp_path_factory.mktemp("aligned")
    extract(dataset, ["classic"], folder / "mine.zarr", device="cpu")
    align(FeatureStore(folder / "mine.zarr"), QUICK, device="cpu").save(folder / "runs")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "here"))


@pytest.fixture
def store(folder):
    return FeatureStore(folder / "mine.zarr")


@pytest.fixture
def run(folder):
    return Alignment.load(folder / "runs" / "mine-dfe-add-1")


def aligned(store, run, modality="image"):
    return store.open_features(f"aligned:{run.name}", modality)


def without_last(dataset, n):
    rows = slice(0, len(dataset) - n)
    return replace(
        dataset,
        ids=dataset.ids[rows],
        splits=dataset.splits[rows],
        targets=dataset.targets[rows],
        modalities=columns(images_of(dataset)[rows], texts_of(dataset)[rows]),
    )


def flip(features, block=0):
    """Change a byte in the middle of a block."""
    path = features.files("pooled", block)["pooled"]
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)


def test_rows_that_are_appended_are_aligned_too(dataset, run, tmp_path):
    path = tmp_path / "grows.zarr"
    extract(without_last(dataset, 30), ["classic"], path, device="cpu")
    first = aligned_features(run, 0, FeatureStore(path), device="cpu").read()
    extract(dataset, ["classic"], path, device="cpu")
    store = FeatureStore(path)
    whole = aligned_features(run, 0, store, device="cpu").read()
    assert len(first) == 130
    assert len(whole) == 160
    assert np.array_equal(whole[:130], first)
    assert np.linalg.norm(whole[130:].astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)


def test_a_changed_sample_is_aligned_anew(dataset, run, store):
    before = aligned_features(run, 1, store, device="cpu").read()
    texts = list(texts_of(dataset))
    texts[3] = ("something else entirely",)
    extract(with_columns(dataset, texts=texts), ["classic"], store.path, device="cpu", refresh=True)
    fresh = FeatureStore(store.path)
    assert aligned(fresh, run, "text").missing_rows("pooled").tolist() == [3]
    after = aligned_features(run, 1, fresh, device="cpu").read()
    changed = np.flatnonzero((before != after).any(1))
    assert changed.tolist() == [3]


def test_both_are_repaired_and_what_is_made_of_others_last(dataset, run, store):
    expected = aligned_features(run, 0, store, device="cpu").read()
    flip(store.open_features("classic", "image"))
    flip(aligned(store, run))
    found = verify(FeatureStore(store.path))
    assert {damage.encoder for damage in found.damage} == {"classic", f"aligned:{run.name}"}
    repair(FeatureStore(store.path), found, dataset, device="cpu")
    store = FeatureStore(store.path)
    assert not verify(store).damage
    assert np.allclose(aligned(store, run).read().astype(np.float32), expected.astype(np.float32), atol=2e-3)


def test_aligned_features_come_after_their_encoder_whatever_the_order(dataset, run, tmp_path, monkeypatch):
    spec = f"aligned:{run.path}"
    monkeypatch.setattr("cachefuse.alignment.tower.AlignedTower.encode", lambda *_: pytest.fail("encoded again"))
    report = extract(dataset, [spec, "classic"], tmp_path / "both.zarr", device="cpu")
    assert report.computed[(f"aligned:{run.name}", "image")] == 160


def test_in_float32_they_are_found_as_well(dataset, run, tmp_path):
    path = tmp_path / "wide.zarr"
    extract(dataset, ["classic"], path, device="cpu")
    with pytest.raises(CacheError, match="dtype"):
        extract(dataset, ["classic", f"aligned:{run.path}"], path, device="cpu", dtype="float32")
    extract(dataset, [f"aligned:{run.path}"], path, device="cpu", dtype="float32")
    features = aligned_features(run, 0, FeatureStore(path), device="cpu")
    assert features.read().dtype == np.float32
    assert len(retrieve(AlignedSpace(run, "cpu"), FeatureStore(path), text="a red circle", k=3).matches) == 3


def test_they_are_never_chosen_unless_named(dataset, run, store, tmp_path):
    """Not even where they are whole and those that they are made of are not."""
    aligned_features(run, 0, store, device="cpu")
    assert [features.encoder for features in select_features(store)["image"]] == ["classic"]
    flat = store.open_features("classic", "image").files("pooled", 0)["pooled"]
    flat.unlink()
    with pytest.raises(CacheError, match=naming("classic image block 0 damaged --repair")):
        select_features(FeatureStore(store.path))
    named = select_features(FeatureStore(store.path), [f"aligned:{run.name}"])
    assert [features.encoder for features in named["image"]] == [f"aligned:{run.name}"]


def test_a_store_of_other_features_is_refused(dataset, run, tmp_path):
    extract(dataset, ["classic"], tmp_path / "wide.zarr", device="cpu", dtype="float32")
    store = FeatureStore(tmp_path / "wide.zarr")
    with pytest.raises(RunError, match=naming("wide.zarr")):
        aligned_features(run, 0, store, device="cpu")
    assert aligned(store, run) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "../../elsewhere"}, "dataset"),
        ({"dataset": "/tmp/x"}, "dataset"),
        ({"dataset": "x.toml"}, "dataset"),
        ({"config": {"width": 30}}, "width 4"),
        ({"config": {"width": "wide"}}, "width number"),
        ({"config": {"pickle": 1}}, "pickle"),
        ({"sides": []}, "sides"),
        ({"format": 99}, "version"),
        ({"kind": "other"}, "kind"),
    ],
)
def test_an_edited_run_is_one_clear_line(run, values, message):
    edit(run.path / "run.json", **values)
    with pytest.raises(RunError, match=naming(message)):
        Alignment.load(run.path)


def test_an_edited_run_can_not_claim_a_width_that_takes_all_memory(run):
    sides = json.loads((run.path / "run.json").read_text())["sides"]
    edit(run.path / "run.json", sides=[{**sides[0], "width": 10**12}, sides[1]])
    with pytest.raises(RunError, match="width"):
        Alignment.load(run.path)
    edit(run.path / "run.json", sides=[{**sides[0], "width": 10**6}, sides[1]])
    with pytest.raises(RunError, match="weights"):
        Alignment.load(run.path)


def test_a_run_that_reads_itself_is_refused(run):
    sides = json.loads((run.path / "run.json").read_text())["sides"]
    edit(run.path / "run.json", sides=[{**side, "source": f"aligned:{run.path}"} for side in sides])
    with pytest.raises(EncoderError, match="aligned"):
        open_encoder(f"aligned:{run.path}")


def test_specs_that_open_nothing(run, tmp_path):
    with pytest.raises(EncoderError, match="folder"):
        open_encoder(f"aligned:{tmp_path / 'gone'}")
    with pytest.raises(EncoderError, match=naming("1 2")):
        open_encoder(f"aligned:{run.path}@1")


def colours(folder):
    for split, n in (("train", 12), ("test", 4)):
        for name, rgb in {"red": (220, 30, 30), "blue": (30, 30, 220)}.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (48, 48), tuple(c + i for c in rgb)).save(folder / split / name / f"{i}.png")
    reader = 'reader = { kind = "folder", splits = { train = "train", test = "test" } }'
    text = f'name = "colours"\ntask = "multiclass"\n{reader}'
    return load_dataset(parse_manifest(text, "colours.toml"), folder)


@pytest.fixture
def pictures(tmp_path):
    return colours(tmp_path / "colours")


class TestFineTuning:
    def test_what_fails_at_the_end_leaves_nothing(self, run, pictures, tmp_path, monkeypatch):
        extract(pictures, ["classic"], tmp_path / "c.zarr", device="cpu")
        monkeypatch.setattr(finetune, "compute_results", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fine_tune(run, FeatureStore(tmp_path / "c.zarr"), tmp_path / "runs", epochs=1, device="cpu")
        assert list((tmp_path / "runs").iterdir()) == []

    def test_a_store_that_is_being_written_is_refused_before_training(self, run, pictures, tmp_path, monkeypatch):
        path = tmp_path / "c.zarr"
        extract(pictures, ["classic"], path, device="cpu")
        monkeypatch.setattr(finetune, "fit", lambda *_, **__: pytest.fail("trained"))
        with only_writer(path), pytest.raises(CacheError, match="extract"):
            fine_tune(run, FeatureStore(path), tmp_path / "runs", epochs=1, device="cpu")

    def test_the_encoder_learns_and_the_head_predicts_by_it(self, run, pictures, tmp_path):
        path = tmp_path / "c.zarr"
        extract(pictures, ["classic"], path, device="cpu")
        tuned, head = fine_tune(
            run, FeatureStore(path), tmp_path / "runs", epochs=40, lr=1e-3, batch_size=8, device="cpu"
        )
        before, after = run.model.state_dict(), tuned.model.state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(before["log_temperature"], after["log_temperature"])
        assert head.results["test"].metrics["accuracy"] == 1
        place = save_run(head, tmp_path / "runs")
        shutil.move(tmp_path / "runs", tmp_path / "moved")
        from cachefuse.data.readers.base import Samples
        from cachefuse.runs.save import load_run

        moved = load_run(tmp_path / "moved" / place.name)
        image = FileImage(tmp_path / "colours" / "test" / "red" / "0.png")
        found = predict_samples(
            moved, Samples(ids=["0"], splits=[""], labels=[None], modalities=columns([image])), device="cpu"
        )
        assert found.names(0) == ["red"]
        # What was tuned is no alignment to take by itself, of whatever kind is looked for.
        with pytest.raises(RunError, match="alignments"):
            find_run(tmp_path / "moved", kind=ALIGNMENT)
        assert find_run(tmp_path / "moved", kind=None).name == place.name
        assert [one.name for one in list_alignments(tmp_path / "moved")] == [tuned.path.name]

    def test_on_tokens_that_differ_in_number_a_head_still_learns(self, tmp_path):
        """Padding is told from tokens by being zero."""
        model = finetune.TunedModel(
            _aligner(4), 0, "text", torch.nn.Identity(), n_tokens=3
        )  # fmt: skip
        x = torch.randn(2, 3, 4)
        x[1, 2] = 0
        alone = model.embed({"text": torch.nn.functional.pad(x[1:, :2], (0, 0, 0, 1)).flatten(1)})
        assert torch.allclose(model.embed({"text": x.flatten(1)})[1:], alone, atol=1e-6)

    def test_diverging_says_so(self, run, pictures, tmp_path):
        extract(pictures, ["classic"], tmp_path / "c.zarr", device="cpu")
        with pytest.raises(TrainingError, match=naming("lr")):
            fine_tune(run, FeatureStore(tmp_path / "c.zarr"), tmp_path / "runs", epochs=3, lr=1e6, device="cpu")
        assert not (tmp_path / "runs").exists()


def _aligner(width):
    from cachefuse.alignment.model import Aligner

    torch.manual_seed(0)
    return Aligner([width, width], AlignConfig(width=8)).eval()


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "tiny_clip"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"clip:{folder}"


class TestEncoderSpace:
    def test_zero_shot_is_by_the_cosines_of_the_encoder(self, clip, pictures, tmp_path):
        extract(pictures, [clip], tmp_path / "c.zarr", device="cpu")
        store = FeatureStore(tmp_path / "c.zarr")
        found = zero_shot(EncoderSpace(clip, "cpu"), store, prompts=["a {} thing"])
        text = open_encoder(clip)["text"]
        texts = np.concatenate(
            [text.encode([text.prepare(f"a {name} thing")], ("pooled",))["pooled"] for name in found.classes]
        )
        images = store.open_features(store.features()[0].encoder, "image").read().astype(np.float32)
        scores = images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
        right = scores.argmax(1) == store.targets
        for split, shares in found.accuracy.items():
            assert shares[0] == pytest.approx(right[store.splits == split].mean())
            assert shares[-1] == 1

    def test_retrieve_divides_by_the_length_of_what_is_stored(self, clip, dataset, tmp_path):
        extract(dataset, [clip], tmp_path / "c.zarr", device="cpu")
        store = FeatureStore(tmp_path / "c.zarr")
        found = retrieve(EncoderSpace(clip, "cpu"), store, text=texts_of(dataset)[0][0], k=5, modality="text")
        assert found.matches[0].score == pytest.approx(1, abs=1e-3)
        assert texts_of(dataset)[found.matches[0].sample] == texts_of(dataset)[0]

    def test_features_of_other_weights_under_its_name_are_refused(self, clip, pictures, tmp_path):
        extract(pictures, [clip], tmp_path / "c.zarr", device="cpu")
        torch.manual_seed(1)
        save_file(open_clip.CLIP(**CLIP).state_dict(), Path(clip.partition(":")[2]) / "open_clip_model.safetensors")
        with pytest.raises(CacheError, match="weights"):
            zero_shot(EncoderSpace(clip, "cpu"), FeatureStore(tmp_path / "c.zarr"))

    def test_an_encoder_without_a_common_space_is_refused(self, tmp_path):
        with pytest.raises(EncoderError, match="space"):
            EncoderSpace("classic", "cpu")

    def test_clip_with_another_encoder_takes_the_one_pair_that_makes_sense(self, clip, dataset, tmp_path, add_features):
        extract(dataset, [clip, "classic"], tmp_path / "c.zarr", device="cpu")
        store = FeatureStore(tmp_path / "c.zarr")
        with pytest.raises(ConfigError, match=naming("4")):
            open_pairs(store, [clip, "classic"])
        add_features(store, "words", "text", np.eye(len(store), 4, dtype=np.float16))
        _, (image, text) = open_pairs(FeatureStore(tmp_path / "c.zarr"), [clip, "words"])
        assert (image.encoder, image.modality) == ("clip:tiny_clip", "image")
        assert (text.encoder, text.modality) == ("words", "text")
