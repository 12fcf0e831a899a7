"""What every fusion must do with every head, alone and inside a FusionModel."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.fusion import FUSIONS
from cachefuse.fusion.model import FusionModel
from cachefuse.registry import HEADS, lookup

WIDTHS = {"image": 6, "text": 4}
B, C = 8, 3


def build(fusion, head, seed=0):
    torch.manual_seed(seed)
    layers = {} if head == "linear" else {"layers": (8, 4)}
    return lookup(FUSIONS, fusion, "fusion")(WIDTHS, C, partial(lookup(HEADS, head, "head"), **layers))


def inputs(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(B, width, generator=generator).to(dtype) for m, width in WIDTHS.items()}
    present = {m: torch.ones(B, dtype=torch.bool) for m in WIDTHS}
    present["image"][[0, 3]] = False
    present["text"][[1, 3]] = False
    return features, present


def spoil_absent(features, present, value):
    return {m: torch.where(present[m][:, None], x, value) for m, x in features.items()}


pytestmark = [
    pytest.mark.parametrize("fusion", sorted(FUSIONS)),
    pytest.mark.parametrize("head", sorted(HEADS)),
]


def test_shape_and_dtype(fusion, head):
    logits = build(fusion, head)(*inputs())
    assert logits.shape == (B, C)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_goes_by_its_name_in_the_table(fusion, head):
    assert build(fusion, head).name == fusion


def test_gradients_reach_every_parameter(fusion, head):
    model = build(fusion, head)
    model(*inputs()).square().sum().backward()
    unreached = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert unreached == []


def test_same_seed_same_logits(fusion, head):
    features, present = inputs()
    assert torch.equal(build(fusion, head)(features, present), build(fusion, head)(features, present))
    assert not torch.equal(build(fusion, head)(features, present), build(fusion, head, seed=1)(features, present))


@pytest.mark.parametrize("value", [1e3, torch.inf, torch.nan])
def test_absent_rows_have_no_influence(fusion, head, value):
    features, present = inputs()
    outcomes = []
    for x in (features, spoil_absent(features, present, value)):
        model = build(fusion, head)
        logits = model(x, present)
        logits.square().sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(clean, spoilt) for clean, spoilt in zip(*outcomes, strict=True))
    assert outcomes[0][0].isfinite().all()


def test_rows_do_not_influence_one_another(fusion, head):
    model = build(fusion, head)
    features, present = inputs()
    few = {m: x[:3] for m, x in features.items()}, {m: x[:3] for m, x in present.items()}
    torch.testing.assert_close(model(*few), model(features, present)[:3])


def test_model_standardises_raw_features(fusion, head):
    features, present = inputs(dtype=torch.float16)
    model = FusionModel(build(fusion, head))
    assert sorted(model.standardize) == sorted(model.fusion.widths)
    for modality, standardize in model.standardize.items():
        standardize.fit(features[modality], present[modality].nonzero()[:, 0])
    x = {m: (features[m].float() - s.mean) * s.scale for m, s in model.standardize.items()}
    logits = model(features, present)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.fusion(x, present))
    assert torch.equal(model(spoil_absent(features, present, torch.nan), present), logits)


def test_saves_and_loads(fusion, head, tmp_path):
    features, present = inputs()
    saved, loaded = FusionModel(build(fusion, head)), FusionModel(build(fusion, head, seed=1))
    for modality, standardize in saved.standardize.items():
        standardize.fit(2 * features[modality] + 1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(saved(features, present), loaded(features, present))
