"""Image towers and dual encoders against the library's own call: of every architecture, pooled and tokens."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.encoder_table import pooled_in_table
from fixtures.hf_models import DUALS, IMAGES, WORDS, save_model
from fixtures.messages import naming

# Relative to the largest feature. All types measure 2.6e-6 at most but mobilenet_v2, 2.7e-5: convolutions of a batch
# take another algorithm than those of one image.
TOLERANCE = 1e-4


def some_images():
    rng = np.random.default_rng(0)
    sizes = ((40, 60), (33, 90), (64, 64), (128, 100))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def encoded(tower, samples):
    return tower.encode([tower.prepare(sample) for sample in samples], ("pooled", "tokens"))


def assert_close(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def pixels(folder, images):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(images=images, return_tensors="pt")["pixel_values"]


def call(kind, folder, model, image):
    """The library's own call on one image: its output, and the tokens of patches or places (T, D)."""
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
    noise = {"noise": torch.arange(16.0)[None]} if kind == "vit_mae" else {}
    with torch.inference_mode():
        out = model(pixel_values=pixels(folder, [image]), **noise)
    hidden = out.last_hidden_state[0].double().numpy()
    if hidden.ndim == 3:
        return out, hidden.reshape(len(hidden), -1).T
    n_patches = (model.config.image_size // model.config.patch_size) ** 2 if "vit" in kind or kind in CLASSED else None
    return out, hidden[-n_patches:] if n_patches else hidden[kind == "pvt" :]


CLASSED = {"beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers"}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind != "yolos"])
def test_features_are_the_library_s(kind, tmp_path):
    model = save_model(kind, tmp_path).eval()
    tower = open_encoder(f"hf:{tmp_path}")["image"]
    pooling = tower.provenance["pooling"]
    assert pooling == pooled_in_table()[kind]
    images = some_images()
    features = encoded(tower, images)
    for i, image in enumerate(images):
        out, tokens = call(kind, tmp_path, model, image)
        assert_close(features["tokens"][i], tokens)
        pooler = getattr(out, "pooler_output", None)
        if pooler is not None:  # also where it is called by what it is
            assert_close(features["pooled"][i], pooler.flatten())
        else:
            first = out.last_hidden_state[0, 0]
            assert_close(features["pooled"][i], first if pooling == "class token" else tokens.mean(0))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", DUALS)
def test_a_dual_encoder_is_two_towers(kind, tmp_path):
    model = save_model(kind, tmp_path).eval()
    towers = open_encoder(f"hf:{tmp_path}")
    assert set(towers) == {"image", "text"}
    assert {tower.provenance["pooling"] for tower in towers.values()} == {pooled_in_table()[kind]}
    assert towers["image"].provenance["weights"] != towers["text"].provenance["weights"]
    images, texts = some_images(), [" ".join(WORDS[:n]) for n in (1, 5, 2, 9)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {}
    features = {
        modality: encoded(towers[modality], samples) for modality, samples in (("image", images), ("text", texts))
    }
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        inputs = tokenizer(text, return_tensors="pt", **padding)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            both = (model.get_image_features(pixel_values=pixels(tmp_path, [image])), model.get_text_features(**inputs))
            tokens = model.text_model(**inputs).last_hidden_state[0, : int(inputs["attention_mask"].sum())]
        for modality, out in zip(("image", "text"), both, strict=True):
            expected = out if isinstance(out, torch.Tensor) else out.pooler_output
            assert_close(features[modality]["pooled"][i], expected[0])
        assert_close(features["text"]["tokens"][i], tokens)


def test_a_side_of_a_dual_encoder_has_a_key_of_its_own_weights(tmp_path):
    save_model("clip", tmp_path)
    before = {modality: tower.provenance["weights"] for modality, tower in open_encoder(f"hf:{tmp_path}").items()}
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_projection.weight"][0, 0] += 1
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    after = {modality: tower.provenance["weights"] for modality, tower in open_encoder(f"hf:{tmp_path}").items()}
    assert after["image"] == before["image"]
    assert after["text"] != before["text"]


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_another_pooling_may_be_asked_for(pooling, tmp_path):
    model = save_model("vit", tmp_path).eval()
    images = some_images()
    features = encoded(open_encoder(f"hf:{tmp_path},pooling={pooling}")["image"], images)
    for row, image in zip(features["pooled"], images, strict=True):
        out, tokens = call("vit", tmp_path, model, image)
        expected = {"cls": out.last_hidden_state[0, 0], "mean": tokens.mean(0), "pooler": out.pooler_output[0]}
        assert_close(row, expected[pooling])


def test_a_pooler_that_the_weights_lack_is_the_class_token_or_refused(tmp_path):
    save_model("vit", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_encoder(f"hf:{tmp_path}")["image"].provenance["pooling"] == "class token"
    with pytest.raises(EncoderError, match=naming("pooler mean")):
        open_encoder(f"hf:{tmp_path},pooling=pooler")


@pytest.mark.parametrize(
    ("kind", "pooling"), [("resnet", "cls"), ("swin", "cls"), ("vit", "last"), ("ijepa", "pooler")]
)
def test_a_pooling_that_a_model_lacks_is_refused(kind, pooling, tmp_path):
    save_model(kind, tmp_path)
    with pytest.raises(EncoderError, match=naming(f"{pooling} mean")):
        open_encoder(f"hf:{tmp_path},pooling={pooling}")


@pytest.mark.slow
def test_objects_are_refused(tmp_path):
    config = transformers.ConditionalDetrConfig(
        backbone_config=transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
    )
    transformers.ConditionalDetrModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=naming("conditional_detr patches")):
        open_encoder(f"hf:{tmp_path}")


def test_tokens_that_are_not_patches_are_refused(tmp_path):
    save_model("yolos", tmp_path)
    with pytest.raises(EncoderError, match=naming("yolos 20 16")):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", [kind for kind in ("siglip2", "siglip2_vision_model") if kind in CONFIG_MAPPING])
def test_images_that_keep_their_shape_are_refused(kind, tmp_path):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=naming("pixel_attention_mask")):
        open_encoder(f"hf:{tmp_path}")
