"""What a folder must say of how to prepare images, which files open, and images that a processor cannot prepare."""

import json
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.hf import OFFLINE
from cachefuse.encoders.hf_processor import open_processor
from cachefuse.errors import BadSampleError, EncoderError
from cachefuse.extraction.pipeline import is_bad, prepare_in_order
from fixtures.hf_models import save_model
from fixtures.messages import naming

SQUARE = {"height": 32, "width": 32}
COLOUR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
OLD = {"do_normalize": True, "do_resize": True, "size": 32, **COLOUR}  # of transformers before 4.26
NEW = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, **COLOUR}
CROP = {"do_center_crop": True, "crop_size": SQUARE}
SHORT = {"size": {"shortest_edge": 36}}
# The settings of popular models' files, each with the type of its model. Sizes are smaller.
FILES = {
    "ViT": ("vit", {**OLD, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2}),
    "the first ViT": ("vit", OLD),
    "ViT of 5": ("vit", {**NEW, "image_processor_type": "ViTImageProcessor", "resample": 2, "size": SQUARE}),
    "ViT of 4.55": (
        "vit",
        {
            **NEW,
            "image_processor_type": "ViTImageProcessorFast",
            "resample": 2,
            "size": SQUARE,
            "crop_size": None,
            "do_center_crop": None,
            "do_convert_rgb": None,
            "default_to_square": True,
            "return_tensors": None,
        },
    ),
    "DeiT": (
        "deit",
        {
            **OLD,
            "feature_extractor_type": "DeiTFeatureExtractor",
            "resample": 3,
            "do_center_crop": True,
            "crop_size": 32,
        },
    ),
    "BEiT": (
        "beit",
        {
            **OLD,
            "feature_extractor_type": "BeitFeatureExtractor",
            "resample": 2,
            "do_center_crop": False,
            "crop_size": 32,
            "reduce_labels": True,
        },
    ),
    "Swin": ("swin", {**OLD, "feature_extractor_type": "ViTFeatureExtractor", "resample": 3}),
    "ConvNeXT": (
        "convnext",
        {**OLD, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "crop_pct": 0.875},
    ),
    "ConvNeXT of 384": (
        "convnext",
        {**OLD, "image_processor_type": "ConvNextImageProcessor", "resample": 3, "size": 384},
    ),
    "ResNet": (
        "resnet",
        {**OLD, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "crop_pct": 0.875},
    ),
    "DINOv2": (
        "dinov2",
        {**NEW, **CROP, **SHORT, "image_processor_type": "BitImageProcessor", "resample": 3, "do_convert_rgb": True},
    ),
    "CLIP": (
        "clip",
        {
            **OLD,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "resample": 3,
            "do_center_crop": True,
            "crop_size": 32,
        },
    ),
    "CLIP without its steps": (
        "clip",
        {"image_processor_type": "CLIPImageProcessor", "resample": 3, **OLD, "crop_size": 32},
    ),
    "SigLIP": ("siglip", {**NEW, "image_processor_type": "SiglipImageProcessor", "resample": 3, "size": SQUARE}),
    "MobileViT": (
        "mobilevit",
        {
            "feature_extractor_type": "MobileViTFeatureExtractor",
            "resample": 2,
            "size": 36,
            "do_resize": True,
            "crop_size": 32,
            "do_center_crop": True,
            "do_flip_channel_order": True,
        },
    ),
    "EfficientNet": (
        "efficientnet",
        {
            **NEW,
            "image_processor_type": "EfficientNetImageProcessor",
            "resample": 0,
            "size": SQUARE,
            "include_top": True,
            "crop_size": SQUARE,
            "do_center_crop": False,
            "rescale_offset": False,
        },
    ),
    "PoolFormer": (
        "poolformer",
        {**OLD, "feature_extractor_type": "PoolFormerFeatureExtractor", "resample": 3, "crop_pct": 0.9, **CROP},
    ),
    "SAM": (
        "vit",
        {
            **NEW,
            "image_processor_type": "SamImageProcessor",
            "resample": 2,
            "size": {"longest_edge": 32},
            "do_pad": True,
            "pad_size": SQUARE,
        },
    ),
}


def opened(folder, kind, stated, name="preprocessor_config.json"):
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(folder)
    (folder / name).write_text(json.dumps(stated))
    return open_processor(EncoderSpec.parse(f"hf:{folder}"), folder, config, OFFLINE)


@pytest.mark.parametrize("name", FILES)
def test_files_as_their_publishers_wrote_them_open(tmp_path, name):
    assert opened(tmp_path, *FILES[name])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("ViT", "size"),
        ("ViT", "image_mean"),
        ("ViT of 5", "image_std"),
        ("DeiT", "crop_size"),
        ("DINOv2", "crop_size"),
        ("CLIP", "crop_size"),
        ("CLIP without its steps", "crop_size"),
        ("BEiT", "do_center_crop"),
        ("EfficientNet", "do_center_crop"),
        ("ConvNeXT", "crop_pct"),
        ("ResNet", "crop_pct"),
        ("PoolFormer", "crop_pct"),
        ("SAM", "pad_size"),
    ],
)
def test_what_changes_the_pixels_must_be_stated(tmp_path, name, missing):
    kind, stated = FILES[name]
    with pytest.raises(EncoderError, match=naming(missing)):
        opened(tmp_path, kind, {key: value for key, value in stated.items() if key != missing})


def test_the_file_that_the_library_reads_must_state_it(tmp_path):
    kind, stated = FILES["ViT of 5"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    nested = {"image_processor": {key: value for key, value in stated.items() if key != "image_mean"}}
    if int(transformers.__version__.split(".")[0]) >= 5:
        with pytest.raises(EncoderError, match=naming("image_mean processor_config.json")):
            opened(tmp_path, kind, nested, "processor_config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resample", 99),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "a"),
        ("image_std", [0.5, 0.0, 0.5]),
        ("rescale_factor", 0),
        ("rescale_factor", "x"),
    ],
)
def test_a_value_that_the_library_does_not_know(tmp_path, name, value):
    kind, stated = FILES["ViT of 5"]
    with pytest.raises(EncoderError, match=naming(f"{name} preprocessor_config.json")):
        opened(tmp_path, kind, {**stated, name: value})


def save_vit(folder, name, **settings):
    save_model("vit", folder)
    stated = {**NEW, "resample": 2, "size": SQUARE, "image_processor_type": name, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return f"hf:{folder}"


def test_a_step_that_is_left_to_the_library_is_in_the_key(tmp_path):
    stated = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
    keys = [
        open_encoder(save_vit(tmp_path, "CLIPImageProcessor", **{**stated, **more}))["image"].provenance[
            "preprocessing"
        ]
        for more in ({}, {"do_center_crop": True}, {"size": {"shortest_edge": 40}})
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.skipif(not hasattr(transformers, "GotOcr2ImageProcessor"), reason="of newer libraries")
def test_a_processor_that_makes_several_images_of_one(tmp_path):
    spec = save_vit(tmp_path, "GotOcr2ImageProcessor", crop_to_patches=True)
    with pytest.raises(EncoderError, match=naming("GotOcr2ImageProcessor 3")):
        open_encoder(spec)
    assert open_encoder(save_vit(tmp_path, "GotOcr2ImageProcessor", crop_to_patches=False))


NARROW = {
    "SamImageProcessor": {"size": {"longest_edge": 32}, "do_pad": True, "pad_size": SQUARE},
    "DonutImageProcessor": {"do_thumbnail": True, "do_pad": True},
}


@pytest.mark.parametrize("name", NARROW)
def test_an_image_that_cannot_be_prepared_is_unusable_and_the_rest_goes_on(tmp_path, name):
    tower = open_encoder(save_vit(tmp_path, name, **NARROW[name]))["image"]
    sizes = ((40, 50), (5000, 3), (50, 40), (3, 5000), (33, 33))

    class Source:
        def __init__(self, size):
            self.image = Image.effect_noise(size, 60).convert("RGB")

        def load(self):
            return self.image

    with prepare_in_order(tower, [Source(size) for size in sizes], range(len(sizes)), ahead=2) as prepared:
        items = list(prepared)
    assert [is_bad(item) for item in items] == [False, True, False, True, False]
    assert "5000 x 3" in str(items[1])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        pixels = processor(images=Image.effect_noise((40, 50), 0).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert items[0].shape == pixels.shape[1:]


def test_an_image_of_another_size_than_the_encoder_takes(tmp_path):
    tower: Any = open_encoder(save_vit(tmp_path, "ViTImageProcessor"))["image"]
    tower.resize = lambda image: torch.zeros(3, 32, 40, dtype=torch.uint8)
    with pytest.raises(BadSampleError, match=naming("64 48 40 32")):
        tower.prepare(Image.new("RGB", (64, 48)))


@pytest.mark.parametrize("size", [(500_000, 1), (1, 500_000)])
def test_an_image_so_narrow_that_its_resized_side_fills_the_memory(tmp_path, size):
    """It would be 16,000,000 x 32 px, of which 32 x 32 are used."""
    tower = open_encoder(save_vit(tmp_path, "CLIPImageProcessor", **CROP, **SHORT))["image"]
    with pytest.raises(BadSampleError, match=naming(f"{size[0]} {size[1]}")):
        tower.prepare(Image.new("RGB", size))
    squashed = open_encoder(save_vit(tmp_path, "ViTImageProcessor"))["image"]
    assert squashed.prepare(Image.new("RGB", size)).shape == (3, 32, 32)


def test_a_full_memory_is_not_the_fault_of_an_image(tmp_path):
    tower: Any = open_encoder(save_vit(tmp_path, "ViTImageProcessor"))["image"]

    def resize(image):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    tower.resize = resize
    with pytest.raises(RuntimeError, match="memory"):
        tower.prepare(Image.new("RGB", (64, 48)))


def test_a_processor_that_can_prepare_no_image_stops_with_a_line(tmp_path):
    spec = save_vit(tmp_path, "ViTImageProcessor", size={"height": -3, "width": -3})
    with pytest.raises(EncoderError) as error:
        open_encoder(spec)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
