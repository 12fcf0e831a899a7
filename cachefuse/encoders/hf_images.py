"""Image towers of transformers models."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.frozen import fingerprint, flatten_map
from cachefuse.encoders.hf_models import Outputs, Part
from cachefuse.encoders.hf_processor import ImageProcessor, process, split_processor
from cachefuse.encoders.images import ImageTower
from cachefuse.errors import EncoderError

PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # the tokens before the patches
CLASS_TOKENS = {"cls_token", "class_embedding"}
COPIES = 10  # bytes a pixel of the copies that a processor makes: an array, a tensor, and one with 4 channels
SAME = 1e-5  # relative to the largest feature: the same vector, computed in another order


class HFImageTower(ImageTower):
    """Pooled: as ``pooling`` says. Tokens: the patches of last_hidden_state, without class and register tokens."""

    options = ("pooling",)

    def __init__(self, part: Part, processor: ImageProcessor, device: str, provenance: Mapping[str, str], pooling: str):
        self.outputs, self.pooling = part.outputs, pooling
        self.n_prefix = sum(prefix_tokens(part.model).values())
        preprocessing = f"{type(processor).__name__} {fingerprint(processor.to_dict())}"
        facts = {**provenance, "preprocessing": preprocessing, "pooling": pooling}
        super().__init__(part.model, device, facts, partial(process, processor), split_processor(processor))

    def prepare_bytes(self, width: int, height: int) -> int:
        return super().prepare_bytes(width, height) + COPIES * width * height

    def forward(self, batch: Sequence[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
        out = self.outputs(pixel_values=self.stack(batch))
        return pool(out, self.pooling, self.n_prefix), patches(out, self.n_prefix)


def choose_pooling(spec: EncoderSpec, part: Part, processor: ImageProcessor) -> str:
    """Return what pooled is: what the spec asks for, else the library's own pooled output, if the weights hold it.

    A pooler that only takes the class token or the mean is called by that. Raises EncoderError for a pooling that the
    model does not have.
    """
    part.model.eval()
    asked = spec.option("pooling")
    with torch.inference_mode():
        image = process(processor, Image.linear_gradient("L").rotate(30).convert("RGB"))
        out = part.outputs(pixel_values=image[None].float())
    prefix = prefix_tokens(part.model)
    n_prefix = sum(prefix.values())
    known = {"mean"}
    if out.hidden.ndim == 3 and CLASS_TOKENS & prefix.keys():
        known.add("class token")
        _check_grid(spec, part, out, n_prefix, image)
    if out.pooler is not None and part.has_pooler:
        known.add("pooler")
    if asked is None and out.shared is not None:
        return "shared space"
    name = {None: "pooler", "cls": "class token", "mean": "mean", "pooler": "pooler", "last": "last token"}[asked]
    if name not in known and asked is not None:
        raise EncoderError(
            f"cannot open {spec}: its model has no {asked} to pool by; it has "
            f"{', '.join(sorted(one.replace('class token', 'cls') for one in known))}"
        )
    if name in known - {"pooler"}:
        return name
    if "pooler" in known:
        vector = pool(out, "pooler", n_prefix)
        same = (other for other in ("class token", "mean") if other in known)
        return next((other for other in same if _equal(vector, pool(out, other, n_prefix))), "pooler")
    return "class token" if "class token" in known else "mean"


def pool(out: Outputs, pooling: str, n_prefix: int) -> Tensor:
    """Return pooled features (B, D)."""
    match pooling:
        case "shared space" if out.shared is not None:
            return out.shared
        case "pooler" if out.pooler is not None:
            return out.pooler
        case "class token":
            return out.hidden[:, 0]
    return patches(out, n_prefix).float().mean(1)


def patches(out: Outputs, n_prefix: int) -> Tensor:
    """Return the tokens of the patches, or of the places of a CNN's feature map (B, T, D)."""
    return flatten_map(out.hidden) if out.hidden.ndim == 4 else out.hidden[:, n_prefix:]


def prefix_tokens(model: nn.Module) -> dict[str, int]:
    """Return the number of tokens before the patches, by the name of their parameter."""
    # The class token of an attention head is none of the model's.
    parameters = ((name, parameter) for name, parameter in model.named_parameters() if "head" not in name)
    named = ((name.rsplit(".", 1)[-1], parameter) for name, parameter in parameters)
    return {name: 1 if p.ndim == 1 else p.shape[-2] for name, p in named if name in PREFIX}


def _check_grid(spec: EncoderSpec, part: Part, out: Outputs, n_prefix: int, image: Tensor) -> None:
    """Refuse a model with other tokens than those known, such as YOLOS's detections, which are not patches."""
    size = getattr(part.config, "patch_size", None)
    if isinstance(size, int):
        n_patches = (image.shape[-2] // size) * (image.shape[-1] // size)
        n_tokens = out.hidden.shape[1]
        if n_tokens != n_prefix + n_patches:
            kind = part.config.model_type
            raise EncoderError(f"{spec} ({kind}) gives {n_tokens} tokens for {n_patches} patches and {n_prefix} others")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= SAME * other.abs().max())
