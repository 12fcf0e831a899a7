"""What every fusion must do with every head, alone and inside a FusionModel."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from cachefuse.fusion import FUSIONS
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn import HEADS
from fixtures.specs import specs_of

# All that a store may have; each fusion takes what it reads.
SPECS = specs_of({
    "image": 6, "image_tokens": (5, 4), "text": 4, "text_tokens": (3, 7),
    "text_ids": (11, 7), "text_ngrams": (6, 5),
})  # fmt: skip
B, C = 8, 3


@pytest.fixture
def build(small_options):
    def build(fusion, head, seed=0):
        torch.manual_seed(seed)
        layers = {} if head == "linear" else {"layers": (8, 4)}
        make_head = partial(HEADS[head], **layers)
        model = FUSIONS[fusion](SPECS, C, make_head, **small_options.get(fusion, {}))
        return solved(model) if model.solved else model

    return build


def solved(model):
    """A model whose weights are no longer 0; how it is initialised decides on the targets."""
    features, present = inputs(seed=1)
    targets = (torch.randn(B, C) > 0).float()
    task = TaskSlice("", "multilabel", slice(0, C))
    model.solve(lambda name, rows: (features[name][rows], present[name][rows]), torch.arange(B), targets, [task])
    return model


def inputs(seed=0, dtype=torch.float32):
    """Rows 0 and 3 lack the image, 1 and 3 the text; rows differ in their number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    here = {"image": torch.ones(B, dtype=torch.bool), "text": torch.ones(B, dtype=torch.bool)}
    here["image"][[0, 3]] = False
    here["text"][[1, 3]] = False
    features, present = {}, {}
    for name, spec in SPECS.items():
        if spec.view == "pooled":
            features[name] = torch.randn(B, spec.width, generator=generator).to(dtype)
            present[name] = here[spec.modality]
        elif spec.view == "tokens":
            features[name] = torch.randn(B, spec.n_tokens, spec.width, generator=generator).to(dtype)
            present[name] = mask_of(spec.modality, here, spec.n_tokens)
        else:
            shape = (B, spec.n_tokens, 2) if spec.view == "ngrams" else (B, spec.n_tokens)
            features[name] = torch.randint(spec.vocabulary, shape, generator=generator)
            present[name] = mask_of(spec.modality, here, spec.n_tokens)
    return features, present


def mask_of(modality, here, n_tokens):
    lengths = torch.full((B,), n_tokens) if modality == "image" else torch.arange(B) % n_tokens + 1
    return (torch.arange(n_tokens) < lengths[:, None]) & here[modality][:, None]


def spoil_absent(features, present, value):
    return {
        m: x if x.dtype == torch.int64 else torch.where(present[m].unsqueeze(-1), x, value) for m, x in features.items()
    }


def padded(features, present, by=3):
    """The same rows with more padding, which holds NaN."""
    pads = {m: (0, by) if x.ndim == 2 else (0, 0, 0, by) for m, x in features.items()}
    return (
        {m: x if present[m].ndim == 1 else pad(x, pads[m], value=0 if x.dtype == torch.int64 else torch.nan)
         for m, x in features.items()},
        {m: x if x.ndim == 1 else pad(x, (0, by)) for m, x in present.items()},
    )  # fmt: skip


pytestmark = [
    pytest.mark.parametrize("fusion", sorted(FUSIONS)),
    pytest.mark.parametrize("head", sorted(HEADS)),
]


def test_shape_and_dtype(fusion, head, build):
    logits = build(fusion, head)(*inputs())
    assert logits.shape == (B, C)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_goes_by_its_name_in_the_table(fusion, head, build):
    assert build(fusion, head).name == fusion


def test_gradients_reach_every_parameter(fusion, head, build):
    model = build(fusion, head)
    if model.solved:
        assert all(parameter.any() and not parameter.requires_grad for parameter in model.parameters())
        return
    model(*inputs()).square().sum().backward()
    unreached = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert unreached == []


def test_same_seed_same_logits(fusion, head, build):
    features, present = inputs()
    assert torch.equal(build(fusion, head)(features, present), build(fusion, head)(features, present))
    assert not torch.equal(build(fusion, head)(features, present), build(fusion, head, seed=1)(features, present))


@pytest.mark.parametrize("value", [1e3, torch.inf, torch.nan])
def test_absent_rows_have_no_influence(fusion, head, value, build):
    features, present = inputs()
    outcomes = []
    for x in (features, spoil_absent(features, present, value)):
        model = build(fusion, head)
        logits = model(x, present)
        if not model.solved:
            logits.square().sum().backward()
        outcomes.append([logits, *(x.grad for x in model.parameters() if x.requires_grad)])
    assert all(torch.equal(clean, spoilt) for clean, spoilt in zip(*outcomes, strict=True))
    assert outcomes[0][0].isfinite().all()


def test_rows_do_not_influence_one_another(fusion, head, build):
    model = build(fusion, head).eval()
    features, present = inputs()
    few = {m: x[:3] for m, x in features.items()}, {m: x[:3] for m, x in present.items()}
    torch.testing.assert_close(model(*few), model(features, present)[:3])


def test_padding_has_no_influence(fusion, head, build):
    model = build(fusion, head).eval()
    features, present = inputs()
    torch.testing.assert_close(model(*padded(features, present)), model(features, present))


def test_model_standardises_raw_features(fusion, head, build):
    features, present = inputs(dtype=torch.float16)
    model = FusionModel(build(fusion, head)).eval()
    assert sorted(model.standardize) == sorted(name for name in model.specs if not name.endswith(("_ids", "_ngrams")))
    for name, standardize in model.standardize.items():
        standardize.fit(features[name][present[name]])
    x = {m: (features[m].float() - s.mean) * s.scale for m, s in model.standardize.items()}
    logits = model(features, present)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.fusion({**features, **x}, present))
    assert torch.equal(model(spoil_absent(features, present, torch.nan), present), logits)


def test_saves_and_loads(fusion, head, tmp_path, build):
    features, present = inputs()
    saved, loaded = FusionModel(build(fusion, head)), FusionModel(build(fusion, head, seed=1))
    for modality, standardize in saved.standardize.items():
        standardize.fit(2 * features[modality].flatten(0, -2) + 1)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(saved.eval()(features, present), loaded.eval()(features, present))
