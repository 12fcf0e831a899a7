"""Modalities dropped in training: with their tokens, never the last, and the same ones whatever is read."""

from dataclasses import replace

import pytest
import torch

from cachefuse.fusion.model import FusionModel
from cachefuse.runs.train import train_head
from cachefuse.training.batches import drop_modalities
from fixtures.specs import specs_of

SPECS = specs_of({"image": 5, "image_tokens": (5, 2), "text": 5, "text_tokens": (5, 3)})


def many(n=4000, **absent):
    """Rows with both modalities but where told; texts of 0 to 3 tokens, images of 2."""
    here = {m: torch.ones(n, dtype=torch.bool) for m in ("image", "text")}
    for modality, rows in absent.items():
        here[modality][rows] = False
    lengths = {"image": torch.full((n,), 2), "text": torch.arange(n) % 4}
    masks = {f"{m}_tokens": (torch.arange(3) < lengths[m][:, None]) & here[m][:, None] for m in here}
    return {**here, **masks}, lengths


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_a_modality_is_dropped_with_its_tokens_and_never_the_last(p):
    present, lengths = many(image=slice(0, 500), text=slice(400, 1000))
    before = {name: x.clone() for name, x in present.items()}
    found = drop_modalities(present, SPECS, p, torch.Generator().manual_seed(0))
    assert list(found) == list(present)
    for modality in ("image", "text"):
        mask = torch.arange(3) < lengths[modality][:, None]
        assert torch.equal(found[f"{modality}_tokens"], mask & found[modality][:, None])
        assert not (found[modality] & ~present[modality]).any()
    assert all(torch.equal(x, before[name]) for name, x in present.items())
    stay = found["image"] | found["text"]
    assert torch.equal(stay, present["image"] | present["text"])
    # One of two stays alone where it is the other that goes, or both would and it is the one spared.
    alone = (found["image"] ^ found["text"])[1000:].float().mean()
    assert alone == pytest.approx(2 * p * (1 - p) + p * p, abs=0.03)
    assert found["image"][1000:].float().mean() == pytest.approx(1 - p + p * p / 2, abs=0.03)


def test_nothing_is_dropped_at_0_and_draws_are_the_generators():
    present, _ = many(100, text=slice(0, 50))
    found = drop_modalities(present, SPECS, 0.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(x, present[name]) for name, x in found.items())
    one, two, other = (drop_modalities(present, SPECS, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert any(not torch.equal(x, other[name]) for name, x in one.items())


def test_which_features_are_read_makes_no_difference_to_what_is_dropped():
    """So that a fusion of tokens and one without, from the same seed, miss the same modalities."""
    present, _ = many(500)
    found = [
        drop_modalities({name: present[name] for name in names}, SPECS, 0.5, torch.Generator().manual_seed(0))
        for names in (present, ["image", "text"], ["text_tokens", "text", "image"])
    ]
    assert all(torch.equal(found[0]["image"], other["image"]) for other in found)
    assert all(torch.equal(found[0]["text"], other["text"]) for other in found)


def test_tokens_alone_are_dropped_by_the_row():
    """Of a modality of which tokens only are read, rows without any count as absent."""
    present, lengths = many(2000)
    tokens = {name: present[name] for name in ("image_tokens", "text_tokens")}
    found = drop_modalities(tokens, SPECS, 0.5, torch.Generator().manual_seed(0))
    whole = {name: mask.sum(1) for name, mask in found.items()}
    assert set(whole["image_tokens"].tolist()) == {0, 2}
    assert ((whole["text_tokens"] == 0) | (whole["text_tokens"] == lengths["text"])).all()
    assert (whole["image_tokens"] + whole["text_tokens"] > 0).all()
    assert whole["image_tokens"][::4].eq(2).all()  # of rows without a token of text the image is the last


def test_training_drops_tokens_with_their_modality(token_store, monkeypatch, cma):
    seen = []
    real = FusionModel.objective

    def objective(self, features, present, *others):
        seen.append(present)
        return real(self, features, present, *others)

    monkeypatch.setattr(FusionModel, "objective", objective)
    train_head(token_store, replace(cma, modality_dropout=0.5))
    assert sum(len(present["image"]) for present in seen) == 2 * 40
    for present in seen:
        for modality in ("image", "text"):
            assert torch.equal(present[f"{modality}_tokens"].any(1), present[modality])
    gone = 1 - torch.cat([present["image"] for present in seen]).float().mean()
    assert 0.2 < gone < 0.6
