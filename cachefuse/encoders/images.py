"""The common code of image towers: threads resize and crop to bytes, the device scales and normalises the batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

from cachefuse.encoders.frozen import FrozenTower, brief
from cachefuse.errors import BadSampleError, CachefuseError

Transform = Callable[[Image.Image], Tensor]  # an RGB image to (3, H, W)

# The same float32 formula in another order differs by less than this, absolute or relative; other formulas by more.
ROUNDING = 1e-6
MAX_RESIZED = 100_000_000  # pixels of an image whose shorter side is resized: more take seconds and gigabytes
WEIGHTS = 48  # bytes
PROBES = ((640, 427), (37, 91))  # width, height: a wide image to shrink and a tall one to enlarge


@dataclass(frozen=True)
class Split:
    """A library's transform, cut at the step from bytes to floats: ``(resize(image) / white - mean) / std``."""

    resize: Transform
    white: float = 1.0
    mean: float | Sequence[float] = 0.0  # a number, or one per channel
    std: float | Sequence[float] = 1.0


def split_compose(transform: Compose) -> Split | None:
    """Cut a torchvision pipeline before its final ToTensor and Normalize; None if it has another end."""
    match transform.transforms:
        case [*resize, ToTensor(), Normalize() as normalize]:
            return Split(Compose([*resize, PILToTensor()]), 255.0, normalize.mean, normalize.std)
    return None


class ImageTower(FrozenTower):
    """A tower whose ``prepare`` returns bytes, a quarter of the size of floats, and which normalises on the device.

    ``whole`` is the library's own transform, to (3, H, W) float32. ``split`` is the same in two steps. It is tried on
    probes: if it does not give bytes, or not the same numbers, threads do all of ``whole`` and return floats.
    """

    def __init__(
        self, model: nn.Module, device: str, provenance: Mapping[str, str], whole: Transform, split: Split | None
    ):
        super().__init__("image", model, device, provenance)
        self.shape: tuple[int, ...] = ()  # of every prepared image, once the tower is probed
        self.crops = False  # whether the longer side of an image is cut
        self._use(split or Split(whole))
        if split and not all(self._agrees(whole, probe) for probe in _probes()):
            self._use(Split(whole))

    def prepare_bytes(self, width: int, height: int) -> int:
        if not self.shape:
            return super().prepare_bytes(width, height)
        scale = max(self.shape[-2] / height, self.shape[-1] / width)
        across, down = (scale * width, scale * height) if self.crops else (self.shape[-1], self.shape[-2])
        # Pillow resizes rows first, and holds up to 6 float64 weights for each pixel of a side.
        return round(4 * across * (height + down) + WEIGHTS * (width + height))

    def prepare(self, sample: Image.Image) -> Tensor:
        # (3, H, W), contiguous: stacking is then a plain copy. NumPy makes it, because torch's copy would start an
        # OpenMP team in each thread. More teams than cores slow the encoder down.
        pixels = torch.from_numpy(np.ascontiguousarray(self._resize(sample).numpy()))
        if self.shape and pixels.shape != self.shape:
            raise BadSampleError(
                f"{_size(sample)} becomes {_by(pixels.shape)} for the encoder, which takes {_by(self.shape)}"
            )
        return pixels

    def _resize(self, sample: Image.Image) -> Tensor:
        """Call the library's transform. What it cannot do with one image is that image's fault: others were probed."""
        if self.crops and _n_pixels_resized(sample, self.shape) > MAX_RESIZED:
            raise BadSampleError(
                f"{_size(sample)} is too narrow for the encoder: with its shorter side resized, it has over "
                f"{MAX_RESIZED:,} pixels"
            )
        try:
            return self.resize(sample)
        except (CachefuseError, OSError, MemoryError):
            raise
        except Exception as error:
            if "memory" in str(error):  # of torch's allocator, a RuntimeError
                raise
            cause = f"{type(error).__name__}: {brief(error)}"
            raise BadSampleError(f"{_size(sample)} can't be prepared for the encoder: {cause}") from error

    def probe(self) -> FrozenTower:
        self.shape = tuple(self.prepare(self.probe_samples()[0]).shape)
        wide = Image.new("RGB", (200, 37))
        ends = wide.copy()
        ends.paste("white", (0, 0, 15, 37))
        self.crops = bool((self.prepare(wide) == self.prepare(ends)).all())
        return super().probe()

    def stack(self, batch: Sequence[Tensor]) -> Tensor:
        """Stack prepared images (3, H, W) to (B, 3, H, W) float32 on the device, normalised. The copy does not wait."""
        shape, dtype = (len(batch), *batch[0].shape), batch[0].dtype
        images = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        images = torch.stack(list(batch), out=images).to(self.device, non_blocking=True)
        return images.float().div_(self.white).sub_(self.mean).div_(self.std)

    def _use(self, split: Split) -> None:
        self.resize, self.white = split.resize, split.white
        self.mean, self.std = (
            torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(-1, 1, 1)
            for value in (split.mean, split.std)
        )

    def _agrees(self, whole: Transform, probe: Image.Image) -> bool:
        expected = whole(probe).float()
        try:
            prepared = self.prepare(probe)
        except Exception:  # some libraries cannot skip a step: they reject the option, or fail on bytes later
            return False
        if prepared.dtype != torch.uint8 or prepared.shape != expected.shape:
            return False
        return torch.allclose(self.stack([prepared])[0].cpu(), expected, rtol=ROUNDING, atol=ROUNDING)


def _probes() -> Iterator[Image.Image]:
    """Yield noise images: they have every byte value, and edges at which resampling overshoots."""
    rng = np.random.default_rng(0)
    for width, height in PROBES:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _size(image: Image.Image) -> str:
    return f"an image of {image.width} x {image.height} px"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _n_pixels_resized(image: Image.Image, shape: Sequence[int]) -> float:
    """Return the pixels of an image whose shorter side is resized to the prepared height and width."""
    scale = max(shape[-2] / image.height, shape[-1] / image.width)
    return scale**2 * image.width * image.height
