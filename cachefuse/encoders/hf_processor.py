"""Image processors of transformers: what their folder must state, and one image as one tensor."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.beside import Rule, check_values, is_number, numbers
from cachefuse.encoders.images import Split
from cachefuse.encoders.model_files import read_json
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

# The numbers that a step takes. Where the step is done, they must be stated: the library's own may be another model's.
# Not so the filter that resizes: many files, such as the first ViT's, leave it to the class of their processor, and so
# they do the steps of a class alone, such as MobileViT's order of channels.
NUMBERS = {
    "do_resize": ("size",),
    "do_center_crop": ("crop_size",),
    "do_pad": ("pad_size",),
    "do_normalize": ("image_mean", "image_std"),
}
USUAL_FACTOR = 1 / 255
RULES: dict[str, Rule] = {
    "resample": (lambda value: isinstance(value, str) or value in list(Image.Resampling), "Pillow's number, 0 to 5"),
    "image_mean": numbers(1, 3, alone=True),
    "image_std": numbers(1, 3, above=0, alone=True),
    "rescale_factor": (lambda value: is_number(value) and value > 0, "a number above 0"),
}
SIZES = ((64, 48), (48, 64), (64, 64), (200, 37), (37, 200))  # of images: all must become as large, and one each


class ImageProcessor(Protocol):
    """What is used of a transformers image processor; those around timm's transforms have no attributes."""

    rescale_factor: float
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, *, images: Image.Image, return_tensors: str, **options: Any) -> Mapping[str, Tensor]: ...

    def to_dict(self) -> JsonObject: ...


def open_processor(
    spec: EncoderSpec, folder: Path, config: PretrainedConfig, offline: Mapping[str, bool]
) -> ImageProcessor:
    """Open a folder's image processor.

    Raises EncoderError if it does not state what changes the pixels, or makes other than one image of one, or images of
    several sizes.
    """
    path, stated = _stated(spec, folder)
    if stated is None and config.model_type != "timm_wrapper":  # of timm's models, it is in their configuration
        raise EncoderError(f"cannot open {spec}: there is no preprocessor_config.json in {folder}, so no preprocessing")
    check_values(spec, path, stated or {}, RULES)
    processor: ImageProcessor = AutoImageProcessor.from_pretrained(folder, **offline)
    if stated is not None and (missing := list(_unstated(stated, processor))):
        raise EncoderError(
            f"cannot open {spec}: its preprocessing does not say {' and '.join(missing)}; add what the model was "
            f"trained with to {path}: the default of {type(processor).__name__} may be another"
        )
    try:
        shapes = {process(processor, image).shape for image in map(_probe, SIZES)}
    except EncoderError as error:
        raise EncoderError(f"cannot open {spec}: {error}") from error
    if len(shapes) > 1:
        raise EncoderError(f"cannot open {spec}: its image processor gives images of different sizes")
    return processor


def process(processor: ImageProcessor, image: Image.Image, **options: Any) -> Tensor:
    """Return one prepared image (3, H, W). Raises EncoderError for a processor that makes several of one."""
    pixels = processor(images=image, return_tensors="pt", **options)["pixel_values"]
    if len(pixels) != 1 or pixels[0].ndim != 3:
        raise EncoderError(
            f"{type(processor).__name__} makes pixel_values of shape {tuple(pixels.shape)} of one image; "
            "expected one image, (1, 3, H, W): turn its crops, patches or frames off"
        )
    return pixels[0]


def split_processor(processor: ImageProcessor) -> Split:
    """Split off scaling and normalising. ``ImageTower`` detects processors that work in another order."""
    resize = partial(process, processor, do_rescale=False, do_normalize=False)
    white = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    normalizes = getattr(processor, "do_normalize", False)  # processors of timm's transforms lack these options
    mean, std = (processor.image_mean, processor.image_std) if normalizes else (0.0, 1.0)
    return Split(resize, white, mean, std)


def _stated(spec: EncoderSpec, folder: Path) -> tuple[Path, JsonObject | None]:
    """Return the file that says how to prepare images, in the library's order, and what it says; None if nothing."""
    path = folder / "processor_config.json"
    whole = read_json(spec, path) if path.is_file() else {}
    if "image_processor" in whole:
        return path, whole["image_processor"]
    path = folder / "preprocessor_config.json"
    return path, read_json(spec, path) if path.is_file() else None


def _unstated(stated: JsonObject, processor: ImageProcessor) -> Iterator[str]:
    """Yield the numbers that change the pixels and are not stated: the library fills in those of the class.

    Which steps are done, older files leave to the class.
    """
    given = {name for name, value in stated.items() if value is not None}  # null asks for the default
    resolved = processor.to_dict()
    for step, names in NUMBERS.items():
        done = bool(resolved.get(step))
        yield from (name for name in names if done and resolved.get(name) is not None and name not in given)
        if not done and step not in given and given & set(names):  # numbers for a step that the class does not do
            yield step
    if resolved.get("do_rescale") and resolved.get("rescale_factor") not in (None, USUAL_FACTOR):
        yield from {"rescale_factor"} - given
    # The part of the image that stays is a number of the step that resizes, but unused for some sizes.
    part = resolved.get("crop_pct", 0) if "crop_pct" not in given else 0
    if part is None or (part and _crops_by(processor, part / 2)):
        yield "crop_pct"


def _crops_by(processor: ImageProcessor, other: float) -> bool:
    """Whether another part of the image to keep changes its pixels."""
    image = _probe((200, 37))
    try:
        one, two = (process(processor, image, **options) for options in ({}, {"crop_pct": other}))
    except Exception:  # a library may reject the value
        return True
    return one.shape != two.shape or not torch.equal(one, two)


def _probe(size: tuple[int, int]) -> Image.Image:
    """Return an image of three channels that differ, so that their order matters."""
    ramp = Image.linear_gradient("L")
    return Image.merge("RGB", [ramp, ramp.rotate(90), Image.radial_gradient("L")]).resize(size)
