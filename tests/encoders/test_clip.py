import json
import logging
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.messages import naming


def compare(model, preprocess, tokenizer, towers, samples):
    """Both towers against open_clip's own encode_image and encode_text, and where tokens come from."""
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(image) for image in samples["image"]])).numpy()
        ids = tokenizer(samples["text"])
        texts = model.encode_text(ids).numpy()
    for modality, expected in (("image", images), ("text", texts)):
        tower = towers[modality]
        batch = [tower.prepare(sample) for sample in samples[modality]]
        np.testing.assert_allclose(tower.encode(batch, ("pooled",))["pooled"], expected, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(tower.encode(batch, tower.views)["pooled"], expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def folder(makers, tmp_path):
    torch.manual_seed(0)
    makers["clip"](tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["clip", "clip-custom-text"])
def test_a_folder_gives_what_open_clip_gives(makers, kind, tmp_path, samples):
    torch.manual_seed(0)
    towers = open_encoder(makers[kind](tmp_path))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    compare(model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{tmp_path}"), towers, samples)


def test_tokens_are_patches_and_real_text_tokens(folder, samples):
    towers = open_encoder(f"clip:{folder}")
    image, text = towers["image"], towers["text"]
    patches = image.encode([image.prepare(samples["image"][0])], ("tokens",))["tokens"]
    assert patches.shape == (1, 16, 64)  # 32 / 8 squared, the transformer's width, before the projection to 24
    rows = text.encode([text.prepare(t) for t in ("", "red circle", "red " * 50)], ("tokens",))["tokens"]
    assert [row.shape for row in rows] == [(2, 32), (4, 32), (16, 32)]


def test_pooled_text_is_the_projected_end_token(folder):
    tower: Any = open_encoder(f"clip:{folder}")["text"]
    features = tower.encode([tower.prepare("a red circle")], tower.views)
    projected = features["tokens"][0][-1] @ tower.model.text_projection.numpy()
    np.testing.assert_allclose(projected, features["pooled"][0], atol=1e-6)


@pytest.mark.slow
def test_a_file_of_a_known_model_gives_what_open_clip_gives(tmp_path, samples):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    save_file(model.state_dict(), path)
    towers = open_encoder(f"clip:ViT-B-32@{path},preprocess=laion2b_s34b_b79k")
    assert towers["image"].width == towers["text"].width == 512
    small = {modality: some[:3] for modality, some in samples.items()}
    compare(model.eval(), preprocess, open_clip.get_tokenizer("ViT-B-32"), towers, small)


def test_a_tag_brings_its_activation_and_preprocessing(tmp_path, monkeypatch):
    """OpenAI's weights need QuickGELU and are listed under names without it too."""
    loaded = {}

    def create_model(name, path, **options):
        loaded.update(options, name=name, path=path)
        raise RuntimeError("far enough")

    (tmp_path / "open_clip_model.safetensors").touch()
    monkeypatch.setattr("cachefuse.encoders.clip.fetch", lambda *arguments: tmp_path)
    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(EncoderError, match="far enough"):
        open_encoder("clip:ViT-L-14@openai")
    assert loaded["force_quick_gelu"] is True
    assert loaded["force_preprocess_cfg"]["interpolation"] == "bicubic"
    with pytest.raises(EncoderError, match="far enough"):
        open_encoder("clip:ViT-L-14@laion2b_s32b_b82k")
    assert loaded["force_quick_gelu"] is False


def test_opening_leaves_the_root_logger_alone(folder):
    before = list(logging.getLogger().handlers)
    open_encoder(f"clip:{folder}")
    assert logging.getLogger().handlers == before


def test_a_folder_needs_its_config_and_safetensors(tmp_path):
    with pytest.raises(EncoderError, match=naming("open_clip_config.json")):
        open_encoder(f"clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(EncoderError, match=naming("open_clip_model.safetensors")):
        open_encoder(f"clip:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(EncoderError, match="clip"):
        open_encoder(f"clip:{tmp_path}")
    with pytest.raises(EncoderError, match=naming("folder weights openai")):
        open_encoder(f"clip:{tmp_path}@openai")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:ViT-B-23", "open_clip ViT-B-23 ViT-B-32"),
        ("clip:ViT-B-32@laion3b", "weights laion3b ViT-B-32"),
        ("clip:ViT-B-32@./nowhere.safetensors", "nowhere.safetensors"),
        ("clip:ViT-B-32@weights.pt", "weights.pt"),
        ("clip:./nowhere", "folder nowhere"),
        ("clip:ViT-M-32", "open_clip weights ViT-M-32 clip:ViT-M-32@./weights"),
    ],
)
def test_errors_say_what_to_do(spec, message):
    with pytest.raises(EncoderError, match=naming(message)):
        open_encoder(spec)


@pytest.mark.parametrize(
    ("spec", "repo"),
    [("clip:ViT-B-32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"), ("clip:RN50", "timm/resnet50_clip.openai")],
)
def test_without_the_hub_the_error_is_quick_and_says_what_works(no_hub, spec, repo):
    with pytest.raises(EncoderError, match=naming(f"{repo} classic")):
        open_encoder(spec)
    assert sum(no_hub) < 5
