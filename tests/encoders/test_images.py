"""The cut of each library's transform: bytes from the threads, the library's own numbers on the device."""

import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from cachefuse.encoders.hf_images import HFImageTower
from cachefuse.encoders.hf_models import Part
from cachefuse.encoders.images import ImageTower, Split, split_compose

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # the same arithmetic, but for its order
SIZES = ((31, 32), (33, 90), (300, 17), (224, 224), (501, 375), (3, 3))  # width, height
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
)


class Bare(ImageTower):
    """What the image towers share, without a model."""

    def __init__(self, whole, split, device="cpu"):
        super().__init__(nn.Identity(), device, {}, whole, split)

    def forward(self, batch, tokens):
        return self.stack(batch).mean((2, 3)), None


def bare_part():
    """A part of a model that does nothing."""
    return Part(nn.Identity(), transformers.ViTConfig(), nn.Identity(), ())


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def check(tower, whole, images, dtype=torch.uint8):
    """Prepared images are of a type, and what the model gets is what the library gives."""
    prepared = [tower.prepare(image) for image in images]
    assert {image.dtype for image in prepared} == {dtype}
    stacked = tower.stack(prepared)
    assert stacked.dtype == torch.float32
    assert stacked.device.type == tower.device.type
    torch.testing.assert_close(stacked.cpu(), torch.stack([whole(image) for image in images]).float(), **EXACT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"resize_mode": "longest", "fill_color": 77},
        {"resize_mode": "squash", "interpolation": "bilinear"},
        {"size": (24, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3},
    ],
)
def test_open_clip_transforms_are_cut(config, device):
    transform = image_transform_v2(PreprocessCfg(**{"size": 32, **config}), is_train=False)
    images = [noise(*size, mode) for size in SIZES for mode in MODES]
    check(Bare(transform, split_compose(transform), device), transform, images)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"crop_mode": "border", "crop_pct": 0.9},
        {"crop_mode": "squash", "interpolation": "lanczos", "mean": (0.0,) * 3, "std": (1.0,) * 3},
        {"input_size": (3, 24, 48), "interpolation": "bicubic", "crop_border_pixels": 1},
    ],
)
def test_timm_transforms_are_cut(config, device):
    transform = create_transform(**{"input_size": (3, 32, 32), **config}, is_training=False)
    check(Bare(transform, split_compose(transform), device), transform, [noise(*size) for size in SIZES])


def processor(name, **options):
    """A processor by its name in transformers 5: by torchvision, or with the end Pil by Pillow and NumPy."""
    if transformers.__version__.startswith("4."):  # there NameFast, and Name
        fast = f"{name}Fast"
        name = fast if hasattr(transformers, fast) else name.removesuffix("Pil")
    return getattr(transformers, name)(**options)


SMALL = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_convert_rgb": True}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", SMALL),
        ("ViTImageProcessorPil", SMALL),
        ("BitImageProcessor", CROP),
        ("CLIPImageProcessorPil", CROP),
        ("MobileViTImageProcessor", {**CROP, "do_flip_channel_order": True}),
        ("ViTImageProcessor", {**SMALL, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        ("ViTImageProcessor", {**SMALL, "do_normalize": False}),
        ("ViTImageProcessor", {**SMALL, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
        ("ViTImageProcessor", {**SMALL, "do_rescale": False, "do_normalize": False}),
    ],
)
def test_transformers_processors_are_cut(name, options, device):
    library = processor(name, **options)
    modes = MODES if library.do_convert_rgb else ("RGB",)
    images = [noise(*size, mode) for size in SIZES for mode in modes]
    tower = HFImageTower(bare_part(), library, device, {}, "mean")
    check(tower, lambda image: library(images=image, return_tensors="pt")["pixel_values"][0], images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DINOv3ViTImageProcessor", SMALL),  # resizes floats
        ("EfficientNetImageProcessor", SMALL),  # normalises twice, and can't leave that out
        ("EfficientNetImageProcessorPil", {**SMALL, "rescale_offset": True, "include_top": False}),  # subtracts 1
        ("TimmWrapperImageProcessor", {"pretrained_cfg": {"input_size": (3, 32, 32)}}),  # has no options
    ],
)
def test_other_processors_are_used_whole(name, options):
    library = processor(name, **options)
    tower = HFImageTower(bare_part(), library, "cpu", {}, "mean")
    images = [noise(*size) for size in SIZES]
    check(tower, lambda image: library(images=image, return_tensors="pt")["pixel_values"][0], images, torch.float32)


def test_pipelines_with_another_end_are_used_whole():
    ends = ([ToTensor()], [ToTensor(), Normalize(0.5, 0.25), nn.ReLU()], [Normalize(0.5, 0.25)], [])
    assert [split_compose(Compose([Resize((8, 8)), *end])) for end in ends] == [None] * 4
    whole = Compose([Resize((8, 8)), ToTensor()])
    check(Bare(whole, None), whole, [noise(20, 30)], torch.float32)


def test_a_split_that_gives_other_numbers_or_shapes_is_not_used():
    whole = Compose([Resize((8, 8)), ToTensor(), Normalize(0.5, 0.25)])
    split = split_compose(whole)
    larger = split_compose(Compose([Resize((9, 9)), *whole.transforms[1:]]))
    for wrong in (Split(split.resize, 255.0, 0.5, 0.2501), Split(split.resize, 256.0, 0.5, 0.25), larger):
        check(Bare(whole, wrong), whole, [noise(20, 30)], torch.float32)


@pytest.mark.real
@pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="CACHEFUSE_REAL_DATA is unset")
def test_a_real_processor_is_cut():
    folder = Path(os.environ["CACHEFUSE_REAL_DATA"]) / "weights" / "vit_s14"
    library = transformers.AutoImageProcessor.from_pretrained(folder)
    tower = HFImageTower(bare_part(), library, "cpu", {}, "mean")
    images = [noise(*size, mode) for size in SIZES for mode in MODES]
    check(tower, lambda image: library(images=image, return_tensors="pt")["pixel_values"][0], images)


@pytest.mark.slow
def test_every_published_configuration_is_cut():
    """All that timm and open_clip publish weights for: no model is left with the slower hand-off unnoticed."""
    transforms = {}
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        data = resolve_data_config(pretrained_cfg=config)
        transforms.setdefault(repr(sorted(data.items())), create_transform(**data, is_training=False))
    for name, tag in open_clip.list_pretrained():
        known = open_clip.get_pretrained_cfg(name, tag)
        config = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if known.get(key)}
        transform = image_transform_v2(PreprocessCfg(size=32, **config), is_train=False)
        transforms.setdefault(repr(transform), transform)
    assert len(transforms) > 100
    for transform in transforms.values():
        check(Bare(transform, split_compose(transform)), transform, [noise(90, 60)])
