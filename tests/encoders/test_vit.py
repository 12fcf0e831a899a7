import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.messages import naming


def saved(tmp_path, name):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    path = tmp_path / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return model, f"timm:{name}@{path}"


@pytest.mark.parametrize(
    ("name", "width", "n_tokens"),
    [
        ("vit_tiny_patch16_224", 192, 196),
        ("resnet10t", 512, 36),
        pytest.param("swin_tiny_patch4_window7_224", 768, 49, marks=pytest.mark.slow),
    ],
)
def test_features_are_what_timm_gives(tmp_path, samples, name, width, n_tokens):
    model, spec = saved(tmp_path, name)
    tower = open_encoder(spec)["image"]
    images = samples["image"][:2]
    features = tower.encode([tower.prepare(image) for image in images], tower.views)

    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        maps = model.forward_features(torch.stack([transform(image) for image in images]))
        expected = model.forward_head(maps, pre_logits=True)
    np.testing.assert_allclose(features["pooled"], expected, atol=1e-5)
    assert tower.width == width
    assert features["tokens"].shape == (2, n_tokens, width)
    if name.startswith("resnet"):
        np.testing.assert_allclose(features["tokens"].mean(1), expected, atol=1e-5)
        np.testing.assert_allclose(features["tokens"][0, 7], maps[0, :, 1, 1], atol=1e-5)
    elif name.startswith("swin"):
        np.testing.assert_allclose(features["tokens"][0, 8], maps[0, 1, 1], atol=1e-5)
    else:
        np.testing.assert_allclose(features["tokens"], maps[:, 1:], atol=1e-5)


def test_a_classifier_of_any_size_may_be_in_the_file(tmp_path):
    model, spec = saved(tmp_path, "test_resnet")
    weights = set()
    for n_classes in (0, 7, 1000):
        model.reset_classifier(n_classes)
        save_file(model.state_dict(), tmp_path / "test_resnet.safetensors")
        tower = open_encoder(spec)["image"]
        assert tower.width == 96
        weights.add(tower.provenance["weights"])
    assert len(weights) == 1


def test_weights_of_another_model_are_refused(tmp_path):
    _, spec = saved(tmp_path, "test_resnet")
    with pytest.raises(EncoderError, match="state_dict"):
        open_encoder(spec.replace("timm:test_resnet@", "timm:test_vit@"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_base_patch16_242", "vit_base_patch16_224"),
        ("timm:resnet18.a9_in1k", "timm"),
        ("timm:resnet18@a1_in1k", "timm:name.tag"),
        ("timm:resnet18@./nowhere.safetensors", "nowhere.safetensors"),
        ("timm:resnet18@weights.pth", "weights.pth"),
        ("timm:test_vit4", "weights test_vit4"),
    ],
)
def test_errors_say_what_to_do(spec, message):
    with pytest.raises(EncoderError, match=naming(message)):
        open_encoder(spec)


def test_without_the_hub_the_error_is_quick_and_says_what_works(no_hub):
    with pytest.raises(EncoderError, match=naming("timm/resnet18.a1_in1k classic")):
        open_encoder("timm:resnet18")
    assert sum(no_hub) < 5
