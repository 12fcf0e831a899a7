"""Tokens and tokenizers of open_clip models, against the library's own forward passes. Small random models."""

import json
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.messages import naming

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}
COCA = {
    "embed_dim": 24,
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": COCA_TEXT,
    "custom_text": True,
}
SIGLIP_TEXT = {
    **TEXT,
    "vocab_size": 40,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "pool_type": "last",
}
TEXTS = ["a red circle", "The Big, SMALL square!", "blue", "left " * 30]
PICTURES = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((64, 48), (33, 90))]


def save(folder, config):
    """Save a random model as a folder; return open_clip's own, opened from it."""
    torch.manual_seed(0)
    made = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CLIP
    if config.get("custom_text"):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    model = kind(**made)
    for parameter in model.parameters():  # norms that do nothing would hide whether they are applied
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return model.eval()


def image_features(folder, model):
    tower: Any = open_encoder(f"clip:{folder}")["image"]
    prepared = [tower.prepare(picture) for picture in PICTURES]
    images = tower.stack(prepared)
    with torch.inference_mode():
        expected = model.encode_image(images, normalize=False)
    features = tower.encode(prepared, tower.views)
    np.testing.assert_allclose(features["pooled"], expected, atol=1e-5)
    return torch.from_numpy(features["tokens"]), images, expected


@pytest.mark.parametrize("more", [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_tokens_of_a_vit_are_those_that_its_pooling_takes(tmp_path, more):
    model = save(tmp_path, {"embed_dim": 24, "vision_cfg": {**VISION, **more}, "text_cfg": TEXT})
    tokens, images, pooled = image_features(tmp_path, model)
    model.visual.output_tokens = True
    with torch.inference_mode():
        torch.testing.assert_close(tokens, model.visual(images)[1], atol=1e-5, rtol=1e-4)
        if more.get("final_ln_after_pool"):
            torch.testing.assert_close(model.visual.ln_post(tokens.mean(1)) @ model.visual.proj, pooled)


def test_tokens_of_coca_are_the_patches_before_its_attention_pooling(tmp_path):
    model = save(tmp_path, COCA)
    tokens, images, pooled = image_features(tmp_path, model)
    taken = []
    model.visual.attn_pool.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    with torch.inference_mode():
        model.encode_image(images)
    torch.testing.assert_close(tokens, taken[0][:, 1:], atol=1e-5, rtol=1e-4)
    assert tokens.shape[1:] == (16, 64)

    text = open_encoder(f"clip:{tmp_path}")["text"]
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    features = text.encode([text.prepare(one) for one in TEXTS], text.views)
    with torch.inference_mode():
        pooled, hidden = model.text(ids)
        normed = model.text.ln_final(hidden)  # without the class token, which CoCa puts at the end
    np.testing.assert_allclose(features["pooled"], pooled, atol=1e-5)
    for row, expected, one in zip(features["tokens"], normed, ids, strict=True):
        np.testing.assert_allclose(row, expected[: int(one.argmax()) + 1], atol=1e-5)


@pytest.mark.parametrize(
    ("trunk", "pool", "proj", "size", "n_prefix"),
    [
        ("test_vit", "token", None, 160, 1),  # as MobileCLIP-B
        ("test_vit3", "map", "none", 160, 1),  # as SigLIP, and with a register token
        ("test_convnext", "", "linear", 160, 0),
        pytest.param("fastvit_mci0", "avg", None, 64, 0, marks=pytest.mark.slow),  # MobileCLIP2-S0
        pytest.param("eva02_tiny_patch14_224", "token", None, 224, 1, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", "", "linear", 224, 0, marks=pytest.mark.slow),
    ],
)
def test_tokens_of_a_timm_tower_are_what_its_trunk_gives_to_its_head(tmp_path, trunk, pool, proj, size, n_prefix):
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    width = {"test_vit3": 96}.get(trunk, 24)
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
    model = save(tmp_path, config)
    tokens, images, _ = image_features(tmp_path, model)
    taken = []
    forward_head = model.visual.trunk.forward_head
    model.visual.trunk.forward_head = lambda features, *rest, **more: (
        taken.append(features) or forward_head(features, *rest, **more)
    )
    with torch.inference_mode():
        model.encode_image(images)
    features = taken[0]
    if features.ndim == 4 and trunk.startswith("swin"):
        features = features.flatten(1, 2)
    elif features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, features[:, n_prefix:], atol=1e-5, rtol=1e-4)


def test_tokens_of_a_resnet_are_the_map_that_its_attention_pooling_takes(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    model = save(tmp_path, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": True})
    tokens, images, _ = image_features(tmp_path, model)
    taken = []
    model.visual.attnpool.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    with torch.inference_mode():
        model.encode_image(images)
    torch.testing.assert_close(tokens, taken[0].flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def save_tokenizer(folder, pad="</s>", end="</s>"):
    words = ["a", "the", "red", "blue", "circle", "square", "big", "small", "left", "right"]
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words, *"abcdefghij"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        template = {"single": f"$A {end}", "special_tokens": [(end, vocabulary[end])]}
        backend.post_processor = processors.TemplateProcessing(**template)
    special = {"pad_token": pad, "unk_token": "<unk>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def siglip(folder, monkeypatch, **more):
    """A file of a known name whose tokenizer is of transformers, in a folder with that tokenizer."""
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**SIGLIP_TEXT, **more}}
    save(folder, config)
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(_PRETRAINED, "tiny", {"one": {"hf_hub": "x/", "mean": (0.5,) * 3, "std": (0.5,) * 3}})
    save_tokenizer(folder)
    return folder / "open_clip_model.safetensors"


@pytest.mark.parametrize("named", [True, False])
def test_the_tokenizer_is_read_from_beside_the_weights(tmp_path, monkeypatch, no_hub, named):
    path = siglip(tmp_path, monkeypatch)
    tower = open_encoder(f"clip:tiny@{path}" if named else f"clip:{tmp_path}")["text"]
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    prepared = [tower.prepare(one) for one in TEXTS]
    # Cleaned as the configuration says: lower case, no punctuation.
    assert torch.equal(torch.tensor([text.windows[0] for text in prepared]), ids)
    with torch.inference_mode():
        expected = model.encode_text(ids).numpy()
    features = tower.encode(prepared, tower.views)
    np.testing.assert_allclose(features["pooled"], expected, atol=1e-5)
    assert [len(row) for row in features["tokens"]] == [4, 5, 2, 16]

    before = tower.provenance["tokenizer"]
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["model"]["vocab"] |= {"red": rules["model"]["vocab"]["blue"], "blue": rules["model"]["vocab"]["red"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    assert open_encoder(f"clip:tiny@{path}")["text"].provenance["tokenizer"] != before


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("named", [True, False])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, monkeypatch, no_hub, named, lost):
    path = siglip(tmp_path, monkeypatch)
    (tmp_path / lost).unlink()
    with pytest.raises(EncoderError, match=naming("tokenizer.json tokenizer_config.json timm/ViT-B-16-SigLIP")):
        open_encoder(f"clip:tiny@{path}" if named else f"clip:{tmp_path}")


def test_a_tokenizer_with_another_end_token_is_refused(tmp_path, monkeypatch):
    path = siglip(tmp_path, monkeypatch, pool_type="eos", eos_id=2)
    with pytest.raises(EncoderError, match=naming("token 2 1 tokenizer")):
        open_encoder(f"clip:tiny@{path}")


def test_texts_of_a_model_whose_end_token_is_taken_out_end_at_the_last_word(tmp_path, monkeypatch):
    """As CLIPA: without the end token there is only padding after the words."""
    stripped = {"strip_sep_token": True}
    path = siglip(tmp_path, monkeypatch, tokenizer_kwargs=stripped)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"sep_token": "</s>", "eos_token": None, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tower = open_encoder(f"clip:tiny@{path}")["text"]
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    features = tower.encode([tower.prepare(text) for text in TEXTS], tower.views)
    with torch.inference_mode():
        np.testing.assert_allclose(features["pooled"], model.encode_text(ids), atol=1e-5)
    assert [len(row) for row in features["tokens"]] == [3, 6, 1, 15]


def test_a_model_with_other_tokens_needs_its_tokenizer(tmp_path):
    save(tmp_path, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": 50000}})
    with pytest.raises(EncoderError, match=naming("50000 49408 hf_tokenizer_name open_clip_config.json")):
        open_encoder(f"clip:{tmp_path}")


def test_built_in_models_of_open_clips_own_tokenizer_have_its_size():
    """Otherwise the check above would refuse a published model."""
    for name in {name for name, _ in open_clip.list_pretrained()}:
        text = open_clip.get_model_config(name)["text_cfg"]
        if not text.get("hf_tokenizer_name"):
            assert text.get("vocab_size", 49408) == 49408, name
