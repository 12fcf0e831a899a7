"""What open_clip can do with an image, and a preprocessor_config.json of transformers in its words."""

from pathlib import Path

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.beside import is_number, numbers, one_of
from cachefuse.encoders.model_files import check_file, read_json
from cachefuse.encoders.model_settings import check_sides
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

CONFIG = "open_clip_config.json"
PROCESSOR = "preprocessor_config.json"  # of transformers
# The processors of transformers that do the steps below and no others, as open_clip does, by the start of their name.
PROCESSORS = ("CLIP", "Siglip", "ViT", "Blip", "Bit", "ChineseCLIP", "EvaCLIP")
STEPS = {"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "default_to_square"}
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# What open_clip can do with an image. Its "random" is bicubic when it encodes.
RULES = {
    "mode": one_of("RGB"),
    "interpolation": one_of("bicubic", "bilinear", "random"),
    "resize_mode": one_of("shortest", "longest", "squash"),
    "fill_color": (lambda fill: is_number(fill) or numbers(3)[0](fill), "a number, or 3"),
    "mean": numbers(3),
    "std": numbers(3, above=0),
}


def from_transformers(spec: EncoderSpec, path: Path, side: object) -> JsonObject:
    """Return what a preprocessor_config.json of transformers states, in open_clip's words; refuse what has none.

    ``side`` is the model's image size in px: open_clip prepares images for it, whatever a file says.
    """
    check_file(spec, path, path.parent)
    stated = read_json(spec, path)
    check_sides(spec, path, stated)
    size, crop = stated.get("size"), stated.get("crop_size")
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = {size.get("height"), size.get("width")} if isinstance(size, dict) else {None}
    crops = {crop.get("height"), crop.get("width")} if isinstance(crop, dict) else {crop}
    cropped = stated.get("do_center_crop", crop is not None)
    if short is not None and cropped and crops == {short}:
        mode: str | None = "shortest"
    else:
        mode = "squash" if short is None and None not in sides and not cropped else None
    usual = all(stated.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    usual = usual and abs(255 * (stated.get("rescale_factor") or 1 / 255) - 1) < 1e-6
    others = {name for name, value in stated.items() if value is True} - STEPS  # such as do_flip_channel_order
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or PROCESSORS[0]
    usual = usual and not others and stated.get("crop_pct") is None and str(kind).startswith(PROCESSORS)
    asked = {short} if mode == "shortest" else sides
    if usual and mode and isinstance(side, int) and asked != {side}:
        raise EncoderError(
            f"cannot open {spec}: {path} is for images of {' x '.join(map(str, asked))} px, and the model for {side} "
            "px; put the file of the model there"
        )
    mean, std = stated.get("image_mean"), stated.get("image_std")
    interpolation = RESAMPLING.get(stated.get("resample", -1))
    if not (usual and mode and interpolation and RULES["mean"][0](mean) and RULES["std"][0](std)):
        raise EncoderError(
            f"cannot open {spec}: {path} asks for what open_clip's preprocessing cannot do; "
            f"put an {CONFIG} with preprocess_cfg beside the weights"
        )
    return {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}
