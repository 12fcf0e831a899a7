"""timm models from weights files: preprocessing as their tags' or their config's, pooled and tokens as timm's own."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

from cachefuse.encoders import open_encoder
from cachefuse.encoders.vit import RULES, patch_tokens, published_data
from cachefuse.errors import EncoderError
from fixtures.messages import naming

STATED = {
    "input_size": [3, 160, 160],
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "crop_mode": "center",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


def pictures():
    for size in ((64, 48), (133, 290), (200, 31)):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        ImageDraw.Draw(picture).ellipse((3, 5, size[0] // 2, size[1] - 4), fill=(250, 40, 90), outline=(0, 200, 10))
        yield picture


def saved(folder, name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), folder / "w.safetensors")
    model.reset_classifier(0)
    return model


def expect(spec, model, config, n_prefix=0):
    """Compare features with timm's transform, its ``forward``, and the rows of its ``forward_features``."""
    transform = create_transform(**resolve_data_config(pretrained_cfg=config))
    with torch.inference_mode():
        images = torch.stack([transform(picture) for picture in pictures()])
        pooled, features = model(images), model.forward_features(images)
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1).flatten(1, 2)
    tower = open_encoder(spec)["image"]
    ours = tower.encode([tower.prepare(picture) for picture in pictures()], tower.views)
    np.testing.assert_allclose(ours["pooled"], pooled, atol=1e-5)
    np.testing.assert_allclose(ours["tokens"], features[:, n_prefix:], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "n_prefix"), [("test_vit", 1), ("test_resnet", 0), ("test_byobnet", 0), ("test_efficientnet", 0)]
)
def test_a_file_is_as_the_tags_of_its_name_where_they_agree(tmp_path, name, n_prefix):
    model = saved(tmp_path, name)
    published = timm.get_pretrained_cfg(timm.list_pretrained(f"{name}.*")[0]).to_dict()
    expect(f"timm:{name}@{tmp_path}/w.safetensors", model, published, n_prefix)


def test_a_config_beside_the_file_comes_first(tmp_path):
    model = saved(tmp_path, "test_resnet")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": STATED}))
    expect(f"timm:test_resnet@{tmp_path}/w.safetensors", model, STATED)


def test_arguments_of_a_config_build_the_model(tmp_path):
    arguments = {"global_pool": "avg", "class_token": False}
    model = timm.create_model("test_vit", **arguments).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    model.reset_classifier(0)
    config = {"architecture": "test_vit", "pretrained_cfg": STATED, "model_args": arguments, "global_pool": "avg"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expect(f"timm:test_vit@{tmp_path}/w.safetensors", model, STATED)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_folder_as_timm_saves_it(tmp_path, name):
    """It writes global_pool, which is a string or a module of the model."""
    model = timm.create_model(name, num_classes=3).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    stated = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    model.reset_classifier(0)
    expect(f"timm:{name}@{tmp_path}/model.safetensors", model, stated, getattr(model, "num_prefix_tokens", 0))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_with_a_classifier_of_its_own(tmp_path, prefix):
    model = timm.create_model("test_resnet", num_classes=7).eval()
    save_file({prefix + name: x for name, x in model.state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": STATED}))
    model.reset_classifier(0)
    expect(f"timm:test_resnet@{tmp_path}/w.safetensors", model, STATED)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "test_vit", "pretrained_cfg": STATED}, "test_vit config.json"),
        ({"pretrained_cfg": {**STATED, "mean": None, "crop_pct": None}}, "mean crop_pct config.json"),
        ({"pretrained_cfg": STATED, "global_pool": "max"}, "global_pool max avg config.json"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, words):
    saved(tmp_path, "test_resnet")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=naming(words)):
        open_encoder(f"timm:test_resnet@{tmp_path}/w.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("interpolation", "random", "bilinear bicubic"),
        ("crop_mode", "weird", "center squash border"),
        ("crop_pct", "all", "number"),
        ("crop_pct", -1, "number"),
        ("input_size", [1, 64, 64], "3 height width"),
        ("input_size", 64, "3 height width"),
        ("mean", [0.5, 0.5], "3"),
        ("std", [0.5, 0.0, 0.5], "3"),
    ],
)
def test_a_setting_that_timm_does_not_know(tmp_path, name, value, known):
    saved(tmp_path, "test_resnet")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**STATED, name: value}}))
    with pytest.raises(EncoderError, match=naming(f"{name} config.json {known}")):
        open_encoder(f"timm:test_resnet@{tmp_path}/w.safetensors")


@pytest.mark.parametrize("value", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_every_interpolation_of_timm_is_known(value):
    known, words = RULES["interpolation"]
    assert str_to_interp_mode(value).value in words
    assert known(value)


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_224", "convnext_base", "test_vit4"])
def test_a_file_of_a_name_whose_tags_differ_or_that_has_none_is_refused(tmp_path, name):
    path = tmp_path / "w.safetensors"
    path.touch()
    tags = timm.list_pretrained(f"{name}.*")
    words = f"preprocessing config.json {f'timm:{sorted(tags)[0]}@' if tags else name}"
    with pytest.raises(EncoderError, match=naming(words.replace("@", ""))):
        open_encoder(f"timm:{name}@{path}")


def test_tags_agree_only_where_nothing_that_reaches_the_features_differs():
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "fixed_input_size")
    for name in timm.list_models("vit_[bs]*") + timm.list_models("resnet1*"):
        published = [timm.get_pretrained_cfg(tag) for tag in timm.list_pretrained(f"{name}.*")]
        different = {
            str([list(v) if isinstance(v := getattr(c, key), tuple) else v for key in keys]) for c in published
        }
        assert len(published_data(name)) == len(different), name


def tokens_of(name, device):
    with torch.device(device), torch.inference_mode():
        model = timm.create_model(name).eval()
        return patch_tokens(model, model.forward_features(torch.zeros(1, *model.pretrained_cfg["input_size"])))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", (1, 196, 192)),
        ("deit_tiny_distilled_patch16_224", (1, 196, 192)),
        ("vit_small_patch14_reg4_dinov2", (1, 1369, 384)),
        ("coat_lite_tiny", (1, 49, 320)),  # it does not declare its class token
        ("volo_d1_224", (1, 196, 384)),  # nor does it
        ("hieradet_small", (1, 64, 768)),  # channels last
        ("levit_128s", (1, 16, 384)),
        ("pit_ti_224", None),  # only the class token is left
        ("crossvit_9_240", None),  # two scales
    ],
)
def test_tokens_are_patches_only(name, shape):
    try:
        tokens = tokens_of(name, "meta")
    except (RuntimeError, NotImplementedError):  # older versions of timm read numbers from tensors to build a model
        tokens = tokens_of(name, "cpu")
    assert (None if tokens is None else tuple(tokens.shape)) == shape
