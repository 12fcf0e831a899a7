"""CMA-CLIP's parts for each of several tasks, against single-task models that share the sequence attention."""

from functools import partial

import pytest
import torch

from cachefuse.fusion.cma import MODALITY_ATTENTION, TUNING, WARM_UP, CMAFusion
from cachefuse.nn.heads import MLP
from fixtures.specs import specs_of

WIDTHS = {"image": 6, "image_tokens": (5, 4), "text": 4, "text_tokens": (3, 7)}
SPECS = specs_of(WIDTHS)
TASKS = {"color": 3, "type": 2, "keys": 4}
B, W = 9, 8
head = partial(MLP, layers=(5,))


def build(tasks=TASKS, ablate=(), **options):
    torch.manual_seed(0)
    classes = sum(tasks.values()) if tasks else 9
    fusion = CMAFusion(SPECS, classes, head, width=W, heads=2, ablate=ablate, tasks=tasks, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return fusion.double().eval()


def inputs(fusion):
    generator = torch.Generator().manual_seed(1)
    here = {"image": torch.arange(B) % 3 > 0, "text": torch.arange(B) % 4 > 0}  # row 0 has nothing
    features, present = {}, {}
    for name in fusion.specs:
        modality, _, tokens = name.partition("_")
        n = (SPECS[name].n_tokens,) if tokens else ()
        features[name] = torch.randn(B, *n, SPECS[name].width, generator=generator, dtype=torch.float64)
        present[name] = here[modality][:, None].expand(B, *n) if tokens else here[modality]
    return features, present


def test_each_task_is_as_a_model_of_its_own(ablate):
    fusion = build(ablate=ablate)
    features, present = inputs(fusion)
    logits, weights = fusion(features, present), fusion.weights(features, present)
    assert (logits.shape, weights.shape) == ((B, 9), (B, 3, 2))
    start = 0
    for k, (name, n) in enumerate(TASKS.items()):
        alone = CMAFusion(SPECS, n, head, width=W, heads=2, ablate=ablate).double().eval()
        shared = {key: x for key, x in fusion.state_dict().items() if not key.startswith(("heads.", "relevance"))}
        own = {f"head.{key}": x for key, x in fusion.heads[k].state_dict().items()}
        own |= {} if fusion.relevance is None else {"relevance": fusion.relevance[k].detach()}
        alone.load_state_dict({**shared, **own})
        torch.testing.assert_close(logits[:, start : start + n], alone(features, present), msg=name)
        torch.testing.assert_close(weights[:, k], alone.weights(features, present), msg=name)
        start += n


@torch.no_grad()
def test_lambda_by_the_papers_formula():
    fusion = build()
    features, present = inputs(fusion)
    summaries, here = fusion.summaries(features, present)
    weights = fusion.weights(features, present)
    for row in range(B):
        for k in range(3):
            powers = [
                torch.exp(sum(w * c for w, c in zip(fusion.relevance[k], summaries[row, m], strict=True)))
                * here[row, m]
                for m in range(2)
            ]
            total = sum(powers)
            expected = [power / total if total else torch.zeros(()) for power in powers]
            assert weights[row, k].tolist() == pytest.approx([float(x) for x in expected])
    assert not weights[0].any()
    assert len({tuple(weights[5, k].tolist()) for k in range(3)}) == 3


def test_gradients_reach_every_parameter(ablate):
    fusion = build(ablate=ablate).train()
    fusion(*inputs(fusion)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_a_tasks_loss_leaves_the_others_parts_alone():
    fusion = build()
    fusion(*inputs(fusion))[:, :3].square().sum().backward()
    assert fusion.relevance.grad[0].any()
    assert not fusion.relevance.grad[1:].any()
    assert all(p.grad is None or not p.grad.any() for one in fusion.heads[1:] for p in one.parameters())


@pytest.mark.parametrize("tasks", [TASKS, {"color": 3}, None])
def test_the_tuning_stage_trains_modality_attention_and_heads(tasks):
    fusion = build(tasks)
    tuned = {id(p) for p in fusion.trained_in(TUNING)}
    names = {name for name, p in fusion.named_parameters() if id(p) in tuned}
    assert names == {name for name, _ in fusion.named_parameters() if name.startswith(("relevance", "head"))}
    assert len(list(fusion.trained_in(WARM_UP))) == len(list(fusion.parameters()))
    assert len(build(tasks, ablate=(MODALITY_ATTENTION,)).trained_in(TUNING)) == len(tuned) - 1


def test_one_task_keeps_its_form():
    fusion = build(None)
    assert fusion.relevance.shape == (W,)
    assert fusion.weights(*inputs(fusion)).shape == (B, 2)
    assert "tasks" not in CMAFusion.options()
    assert build({"color": 9}).weights(*inputs(fusion)).shape == (B, 1, 2)
