"""What a weights file of an open_clip model is prepared with, against what open_clip publishes for its tags."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.clip_parts import settings_of_file
from cachefuse.errors import EncoderError
from fixtures.messages import naming

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
ZERO_ONE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}  # as MobileCLIP's
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}  # as SigLIP's


def asked(name, tag):
    """What open_clip itself does with a tag, and whether it was trained with QuickGELU."""
    published = open_clip.get_pretrained_cfg(name, tag)
    whole = merge_preprocess_dict(PreprocessCfg(), published)
    quick_gelu = published.get("quick_gelu") or open_clip.get_model_config(name).get("quick_gelu")
    return json.dumps([{**whole, "size": None}, bool(quick_gelu)], sort_keys=True)


def chosen(spec, name, folder):
    preprocessing, quick_gelu = settings_of_file(EncoderSpec.parse(spec), name, folder)
    return json.dumps([{**preprocessing, "size": None}, quick_gelu], sort_keys=True)


@pytest.mark.parametrize("name", sorted({name for name, _ in open_clip.list_pretrained()}))
def test_a_file_alone_is_as_all_tags_of_its_name_or_is_refused(tmp_path, name):
    tags = open_clip.list_pretrained_tags_by_model(name)
    spec = f"clip:{name}@./w.safetensors"
    expected = {asked(name, tag) for tag in tags}
    if len(expected) == 1:
        assert {chosen(spec, name, tmp_path)} == expected
    else:
        with pytest.raises(EncoderError, match=naming(f"{name} preprocess={tags[0]} open_clip_config.json")):
            chosen(spec, name, tmp_path)
    for tag in tags:
        assert chosen(f"{spec},preprocess={tag}", name, tmp_path) == asked(name, tag)


def pictures():
    for size in ((64, 48), (33, 90), (200, 31), (32, 32)):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        ImageDraw.Draw(picture).ellipse((3, 5, size[0] // 2, size[1] - 4), fill=(250, 40, 90), outline=(0, 200, 10))
        yield picture


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A weights file of the small model ``tiny``; ``publish`` says what its tags ask."""
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    save_file(open_clip.CLIP(**TINY).state_dict(), path)

    def publish(**tags):
        monkeypatch.setitem(_PRETRAINED, "tiny", tags)
        return path

    return publish


def expect(spec, path, preprocessing, quick_gelu=False):
    """Compare an image tower's features with open_clip's own transform and ``encode_image``."""
    model = open_clip.create_model("tiny", str(path), force_quick_gelu=quick_gelu).eval()
    transform = image_transform_v2(PreprocessCfg(size=32, **preprocessing), is_train=False)
    with torch.inference_mode():
        expected = model.encode_image(torch.stack([transform(picture) for picture in pictures()])).numpy()
    tower = open_encoder(spec)["image"]
    features = tower.encode([tower.prepare(picture) for picture in pictures()], ("pooled",))["pooled"]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    return tower.provenance["preprocessing"]


def test_features_of_a_file_are_those_of_its_tag(tiny):
    path = tiny(one={"hf_hub": "x/", **ZERO_ONE}, two={"hf_hub": "y/", **ZERO_ONE})
    assert expect(f"clip:tiny@{path}", path, ZERO_ONE) == expect(f"clip:tiny@{path},preprocess=two", path, ZERO_ONE)


def test_a_tag_names_preprocessing_and_activation(tiny):
    path = tiny(one={"hf_hub": "x/", **ZERO_ONE}, two={"hf_hub": "y/", **HALVES, "quick_gelu": True})
    with pytest.raises(EncoderError, match=naming("preprocessing preprocess=one one two")):
        open_encoder(f"clip:tiny@{path}")
    keys = {expect(f"clip:tiny@{path},preprocess=one", path, ZERO_ONE)}
    keys.add(expect(f"clip:tiny@{path},preprocess=two", path, HALVES, quick_gelu=True))
    assert len(keys) == 2
    with pytest.raises(EncoderError, match=naming("three one two")):
        open_encoder(f"clip:tiny@{path},preprocess=three")


@pytest.mark.parametrize("stated", [HALVES, ZERO_ONE])
def test_a_config_beside_the_file_comes_first(tiny, stated):
    path = tiny(one={"hf_hub": "x/", **ZERO_ONE}, two={"hf_hub": "y/", "quick_gelu": True})
    config = {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": stated}
    (path.parent / "open_clip_config.json").write_text(json.dumps(config))
    expect(f"clip:tiny@{path}", path, stated, quick_gelu=True)


def test_the_activation_must_be_known_too(tiny):
    path = tiny(one={"hf_hub": "x/"}, two={"hf_hub": "y/", "quick_gelu": True})
    (path.parent / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": HALVES}, default=list))
    with pytest.raises(EncoderError, match=naming("activation preprocess=one")):
        open_encoder(f"clip:tiny@{path}")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("text_cfg.pool_type", {"text_cfg": {**TINY["text_cfg"], "pool_type": "last"}}),
        ("text_cfg.hf_tokenizer_name", {"text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "bert-base-uncased"}}),
        ("multimodal_cfg.width", {"multimodal_cfg": {"width": 32}}),
        ("normalize", {"normalize": True}),  # a setting that open_clip may have one day
    ],
)
def test_a_config_of_another_model_is_refused(tiny, name, other):
    path = tiny(one={"hf_hub": "x/"})
    (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, **other}}))
    with pytest.raises(EncoderError, match=naming(f"tiny {name} open_clip_config.json")):
        open_encoder(f"clip:tiny@{path}")


def test_a_name_with_quickgelu_beside_a_config_without(tiny, monkeypatch):
    """open_clip can only switch QuickGELU on: the name's would stay, whatever the config says."""
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny-quickgelu", {**TINY, "quick_gelu": True})
    monkeypatch.setitem(_PRETRAINED, "tiny-quickgelu", {"one": {"hf_hub": "x/", "quick_gelu": True}})
    path = tiny(one={"hf_hub": "x/"})
    config = path.parent / "open_clip_config.json"
    for stated in ({}, {"quick_gelu": False}):
        config.write_text(json.dumps({"model_cfg": {**TINY, **stated}, "preprocess_cfg": HALVES}))
        with pytest.raises(EncoderError, match=naming("tiny-quickgelu quick_gelu open_clip_config.json")):
            open_encoder(f"clip:tiny-quickgelu@{path}")
    config.write_text(json.dumps({"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": HALVES}))
    quick = [open_encoder(f"clip:{name}@{path}")["image"].provenance for name in ("tiny-quickgelu", "tiny")]
    assert quick[0] == quick[1]


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("interpolation", "nearest", "bicubic bilinear"),
        ("resize_mode", "weird", "shortest longest squash"),
        ("mode", "L", "RGB"),
        ("mean", [0.5] * 4, "3"),
        ("mean", 0.5, "3"),
        ("std", [0, 0, 0], "3"),
        ("std", ["a", 1, 1], "3"),
    ],
)
def test_a_setting_that_open_clip_does_not_know(tiny, name, value, known):
    path = tiny()
    stated = {"mean": [0.5] * 3, "std": [0.5] * 3, name: value}
    (path.parent / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": stated}))
    with pytest.raises(EncoderError, match=naming(f"{name} open_clip_config.json {known}")):
        open_encoder(f"clip:tiny@{path}")


def test_a_name_without_tags_needs_a_config(tiny):
    path = tiny()
    with pytest.raises(EncoderError, match=naming("preprocessing tiny open_clip_config.json")):
        open_encoder(f"clip:tiny@{path}")
    (path.parent / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": HALVES}))
    expect(f"clip:tiny@{path}", path, HALVES)


PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
AS_OPEN_CLIP = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
SQUASH = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "crop_size": None, "resample": 3}


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, AS_OPEN_CLIP), (SQUASH, {**AS_OPEN_CLIP, "interpolation": "bicubic", "resize_mode": "squash"})],
)
def test_the_processor_of_transformers_is_read(tiny, more, expected):
    path = tiny()
    (path.parent / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **more}))
    expect(f"clip:tiny@{path}", path, expected)


@pytest.mark.parametrize(
    "more",
    [
        {"resample": 1},
        {"crop_size": {"height": 28, "width": 28}},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127},
        {"do_flip_channel_order": True},
        {"do_pad": True},
        {"crop_pct": 0.9},
        {"image_processor_type": "MobileViTImageProcessor"},
        {"feature_extractor_type": "ConvNextFeatureExtractor"},
    ],
)
def test_a_processor_that_open_clip_cannot_follow_is_refused(tiny, more):
    path = tiny()
    (path.parent / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **more}))
    with pytest.raises(EncoderError, match=naming("preprocessor_config.json open_clip_config.json")):
        open_encoder(f"clip:tiny@{path}")


@pytest.mark.parametrize("more", [{"size": 64, "crop_size": 64}, {**SQUASH, "size": {"height": 64, "width": 64}}])
def test_a_processor_for_images_of_another_size_is_refused(tiny, more):
    path = tiny()
    (path.parent / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **more}))
    with pytest.raises(EncoderError, match=naming("preprocessor_config.json 64 32")):
        open_encoder(f"clip:tiny@{path}")


@pytest.mark.parametrize("name", ["open_clip_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_file_that_is_no_object_is_named(tiny, name, content):
    path = tiny()
    (path.parent / name).write_text(content)
    with pytest.raises(EncoderError, match=naming(f"{name} JSON")):
        open_encoder(f"clip:tiny@{path}")


@pytest.mark.parametrize("stated", [None, {}, {"mean": [0.5] * 3}, {"std": [0.5] * 3, "mean": None}])
def test_a_folder_without_mean_and_std_is_refused(tiny, stated):
    path = tiny()
    path.rename(path.parent / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, **({} if stated is None else {"preprocess_cfg": stated})}
    (path.parent / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=naming("preprocess_cfg open_clip_config.json")):
        open_encoder(f"clip:{path.parent}")
