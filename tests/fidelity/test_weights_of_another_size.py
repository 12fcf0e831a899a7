"""Weights for images, patches, windows or texts of another size: their libraries would resample them without a word."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from PIL import Image
from safetensors.torch import save_file

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.hf_models import save_model
from fixtures.messages import naming

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
LARGER = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 64}}
LONGER = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 32}}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}


def refused(spec, words):
    with pytest.raises(EncoderError, match=naming(words)) as error:
        open_encoder(spec)
    assert "\n" not in str(error.value)


@pytest.fixture
def save_clip(tmp_path, monkeypatch):
    """Save random weights of a configuration; the name ``tiny`` stands for TINY."""

    def save(config, name, custom_text=False, prefix=""):
        monkeypatch.setitem(_MODEL_CONFIGS, "tiny", {**TINY, "custom_text": custom_text})
        monkeypatch.setitem(_PRETRAINED, "tiny", {"one": {"hf_hub": "x/"}})
        weights = open_clip.CLIP(**config).state_dict()
        save_file({prefix + key: weight for key, weight in weights.items()}, tmp_path / name)
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("config", "words"),
    [(LARGER, "visual.positional_embedding 64 px 32 px 65 17"), (LONGER, "positional_embedding 32 tokens 16 tokens")],
)
@pytest.mark.parametrize("options", [{}, {"custom_text": True}, {"prefix": "module."}])
def test_clip_weights_under_a_name_of_another_size(save_clip, config, words, options):
    refused(f"clip:tiny@{save_clip(config, 'w.safetensors', **options)}/w.safetensors", words)


def test_clip_weights_under_their_own_name(save_clip):
    folder = save_clip(TINY, "w.safetensors", custom_text=True)
    assert set(open_encoder(f"clip:tiny@{folder}/w.safetensors")) == {"image", "text"}


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"])
def test_a_clip_folder_whose_weights_are_of_another_size(save_clip, name):
    folder = save_clip(LARGER, name)
    config = {"model_cfg": TINY, "preprocess_cfg": HALVES}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused(f"clip:{folder}", "64 px 32 px open_clip_config.json model_cfg")
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "model_cfg": LARGER}))
    tower = open_encoder(f"clip:{folder}")["image"]
    assert tower.token_shape == (64, 32)  # of 8 x 8 px


def save_timm(folder, name, prefix="", **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    save_file({prefix + key: value.contiguous() for key, value in model.state_dict().items()}, folder / "w.safetensors")
    return model


@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "module."])
def test_timm_weights_under_a_name_of_another_size(tmp_path, prefix):
    save_timm(tmp_path, "test_vit", prefix, img_size=320)
    refused(f"timm:test_vit.r160_in1k@{tmp_path}/w.safetensors", "pos_embed 320 px 160 px config.json img_size")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm, where it resamples
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("test_vit", {"patch_size": 32}, "pos_embed"),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            {"window_size": 14, "img_size": 224},
            "relative_position_bias_table",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_timm_weights_of_another_patch_or_window(tmp_path, name, arguments, words):
    save_timm(tmp_path, name, **arguments)
    refused(f"timm:{timm.list_pretrained(f'{name}.*')[0]}@{tmp_path}/w.safetensors", words)


def test_a_size_in_the_config_of_timm_is_that_of_the_weights(tmp_path):
    stated = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 1.0, **HALVES}
    config = {"architecture": "test_vit", "pretrained_cfg": stated, "model_args": {"img_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = f"timm:test_vit@{tmp_path}/w.safetensors"
    save_timm(tmp_path, "test_vit", img_size=320)
    refused(spec, "pos_embed 320 px 64 px")
    model = save_timm(tmp_path, "test_vit", img_size=64)
    tower = open_encoder(spec)["image"]
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    images = (torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        np.testing.assert_allclose(
            tower.encode([tower.prepare(picture)], ("pooled",))["pooled"], model(images), atol=1e-5
        )


def test_a_class_token_s_own_position_may_be_in_the_class_token(tmp_path):
    """DINOv2's own files have a row for it, and timm adds it to the class token: nothing is resampled."""
    tables = {"cls_token": (1, 1, 64), "pos_embed": (1, 101, 64), "register_tokens": (1, 4, 64), "mask_token": (1, 64)}
    model = timm.create_model("test_vit", num_classes=0, reg_tokens=4, no_embed_class=True)
    weights = {key: value for key, value in model.state_dict().items() if key not in (*tables, "reg_token")}
    save_file({**weights, **{key: torch.randn(shape) for key, shape in tables.items()}}, tmp_path / "w.safetensors")
    stated = {"input_size": [3, 160, 160], "interpolation": "bilinear", "crop_pct": 1.0, **HALVES}
    arguments = {"reg_tokens": 4, "no_embed_class": True}
    config = {"architecture": "test_vit", "pretrained_cfg": stated, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_encoder(f"timm:test_vit@{tmp_path}/w.safetensors")


def test_hf_weights_of_another_size_than_their_config(tmp_path):
    save_model("vit", tmp_path)
    for name, more in (("config.json", {"image_size": 64}), ("preprocessor_config.json", {"size": 64})):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**content, **more}))
    refused(f"hf:{tmp_path}", "embeddings.position_embeddings config.json")
