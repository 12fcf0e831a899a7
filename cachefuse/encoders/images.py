"""What the image towers share: threads resize and crop to bytes, the device scales and normalises the whole batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

from cachefuse.encoders.frozen import FrozenTower

Transform = Callable[[Image.Image], Tensor]  # an RGB image to (3, H, W)

# Two orders of the same float32 arithmetic differ by less than this, absolute or relative; another formula by more.
ROUNDING = 1e-6
PROBES = ((640, 427), (37, 91))  # width, height: one shrinks and one grows, one is wide and one is tall


@dataclass(frozen=True)
class Split:
    """A library's transform, cut where bytes become floats: ``(resize(image) / white - mean) / std`` is all of it."""

    resize: Transform
    white: float = 1.0
    mean: float | Sequence[float] = 0.0  # a number, or one a channel
    std: float | Sequence[float] = 1.0


def split_compose(transform: Compose) -> Split | None:
    """Cut a torchvision pipeline before the ToTensor and Normalize at its end; None if it ends otherwise."""
    match transform.transforms:
        case [*resize, ToTensor(), Normalize() as normalize]:
            return Split(Compose([*resize, PILToTensor()]), 255.0, normalize.mean, normalize.std)
    return None


class ImageTower(FrozenTower):
    """A tower that takes images as bytes from ``prepare``, a quarter of the floats, and normalises on the device.

    ``whole`` is the library's own transform, to (3, H, W) float32. ``split`` is the same in two parts, which is tried
    on probes: where it does not give bytes, or not the same numbers, threads do all of ``whole`` and hand over floats.
    """

    def __init__(
        self, model: nn.Module, device: str, provenance: Mapping[str, str], whole: Transform, split: Split | None
    ):
        super().__init__("image", model, device, provenance)
        self._use(split or Split(whole))
        if split and not all(self._agrees(whole, probe) for probe in _probes()):
            self._use(Split(whole))

    def prepare(self, sample: Image.Image) -> Tensor:
        # (3, H, W); contiguous, so that stacking is a plain copy. By NumPy: torch's copy would begin an OpenMP team in
        # each thread, and with more of those than there are cores the encoder's own slows down.
        return torch.from_numpy(np.ascontiguousarray(self.resize(sample).numpy()))

    def stack(self, batch: Sequence[Tensor]) -> Tensor:
        """Stack prepared images (3, H, W) to (B, 3, H, W) on the device, float32 and normalised, without waiting."""
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
        except Exception:  # some libraries can't leave a step out: they refuse the option, or fail on bytes further on
            return False
        if prepared.dtype != torch.uint8 or prepared.shape != expected.shape:
            return False
        return torch.allclose(self.stack([prepared])[0].cpu(), expected, rtol=ROUNDING, atol=ROUNDING)


def _probes() -> Iterator[Image.Image]:
    """Noise, which has every byte, and edges that resampling overshoots at."""
    rng = np.random.default_rng(0)
    for width, height in PROBES:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
