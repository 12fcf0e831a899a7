"""CMA-CLIP, which several files test: how it is built, and what it is given."""

from types import SimpleNamespace

import pytest
import torch

from cachefuse.feature_spec import feature_name
from cachefuse.fusion.cma import MODALITY_ATTENTION, SEQUENCE_ATTENTION, CMAFusion
from cachefuse.nn.heads import Linear
from fixtures.specs import specs_of

WIDTHS = {
    "text_tokens": (3, 7), "text": 4, "image": 6, "audio_tokens": (2, 3),
    "image_tokens": (5, 4), "audio": 3,
}  # fmt: skip
SPECS = specs_of(WIDTHS)
MODALITIES = ("audio", "image", "text")


def build_cma(ablate=(), modalities=MODALITIES, depth=2, dtype=torch.float64, **options):
    """A fusion as after some training: its relevance is no longer 0, nor any bias, nor a norm the identity."""
    torch.manual_seed(0)
    specs = {name: spec for name, spec in SPECS.items() if name.partition("_")[0] in modalities}
    fusion = CMAFusion(specs, 3, Linear, width=8, heads=2, depth=depth, ablate=ablate, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return fusion.to(dtype).eval()


def inputs(dtype=torch.float64, filler=0.0):
    """Ten rows, in which modalities are absent in every combination; texts have 0 to 7 tokens, images all 4.

    What is absent, and padding, holds ``filler``.
    """
    generator = torch.Generator().manual_seed(0)
    here = {
        "audio": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, 1, 0]).bool(),
        "image": torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 0]).bool(),
        "text": torch.tensor([1, 0, 1, 0, 1, 0, 1, 1, 1, 0]).bool(),
    }
    lengths = {"audio": [3, 1, 2, 3, 3, 3, 1, 1, 0, 3], "image": [4] * 10, "text": [7, 5, 1, 2, 3, 6, 4, 0, 0, 7]}
    features, present = {}, {}
    for modality in MODALITIES:
        name = feature_name(modality, "tokens")
        features[modality] = torch.randn(10, WIDTHS[modality], generator=generator, dtype=dtype)
        present[modality] = here[modality]
        width, n = WIDTHS[name]
        features[name] = torch.randn(10, n, width, generator=generator, dtype=dtype)
        present[name] = (torch.arange(n) < torch.tensor(lengths[modality])[:, None]) & here[modality][:, None]
    features = {name: torch.where(present[name].unsqueeze(-1), x, filler) for name, x in features.items()}
    return features, present


def of(fusion, features, present):
    """The inputs that a fusion reads."""
    return {name: features[name] for name in fusion.specs}, {name: present[name] for name in fusion.specs}


@pytest.fixture(scope="session")
def cma():
    return SimpleNamespace(SPECS=SPECS, build=build_cma, inputs=inputs, of=of)


@pytest.fixture(
    params=[(), (MODALITY_ATTENTION,), (SEQUENCE_ATTENTION,), (MODALITY_ATTENTION, SEQUENCE_ATTENTION)],
    ids=lambda parts: "-".join(parts) or "whole",
)
def ablate(request):
    """Every ablation of CMA-CLIP."""
    return request.param
