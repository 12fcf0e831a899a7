"""The trained model of an alignment: stored features of either side to unit vectors in one space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.alignment import METHODS
from cachefuse.alignment.config import AlignConfig
from cachefuse.nn.losses import TINY_NORM, contrastive
from cachefuse.nn.scaling import Standardize
from cachefuse.registry import lookup

TEMPERATURE = 0.07  # initial value (arXiv 2103.00020)
BOUNDS = math.log(0.01), math.log(1.0)  # of the temperature's logarithm

Side = tuple[Tensor, Tensor]  # features (B, T, D_m) of any float dtype, and the mask (B, T) of real tokens


class Aligner(nn.Module):
    """Stored features (B, T, D_m) of side m to unit vectors (B, W); and the temperature of their contrastive loss.

    The state includes the mean and deviation that standardise each side's features: see ``fit_statistics``.
    """

    def __init__(self, widths: Sequence[int], config: AlignConfig):
        super().__init__()
        self.standardize = nn.ModuleList(Standardize(width) for width in widths)
        encoder = lookup(METHODS, config.method, "method")
        self.encoder = encoder(tuple(widths), config.width, operation=config.op, dropout=config.dropout)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))

    @property
    def temperature(self) -> Tensor:
        """The temperature, between 0.01 and 1."""
        return self.log_temperature.clamp(*BOUNDS).exp()

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def size_mb(self) -> float:
        """The size in MB (10^6 bytes), statistics included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()) / 1e6

    def forward(self, side: int, features: Side) -> Tensor:
        x, mask = features
        embeddings = self.encoder(self.standardize[side](x), mask, side)
        return F.normalize(embeddings, dim=-1, eps=TINY_NORM)

    def loss(self, x: Tensor, y: Tensor, targets: str) -> Tensor:
        """Return the contrastive loss of the embeddings of M pairs, (M, W) for each side."""
        return contrastive(x, y, self.temperature, targets=targets)

    @torch.no_grad()
    def bound_temperature(self) -> None:
        """Clamp the temperature to its bounds after a step: outside of them it would get no gradient."""
        self.log_temperature.clamp_(*BOUNDS)
