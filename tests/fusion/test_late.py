import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError
from cachefuse.fusion.late import ConcatFusion, ImageOnly, MixedFusion, SumFusion, TextOnly
from cachefuse.nn.heads import Linear
from fixtures.messages import naming
from fixtures.specs import specs_of

WIDTHS = {"text": 3, "image": 2}
SPECS = specs_of(WIDTHS)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(5, width, generator=generator) for m, width in WIDTHS.items()}


@pytest.fixture
def present():
    return {m: torch.ones(5, dtype=torch.bool) for m in WIDTHS}


def test_concat_reads_both_side_by_side(features, present):
    fusion = ConcatFusion(SPECS, 4, Linear)
    expected = fusion.head(torch.cat([features["image"], features["text"]], dim=1))
    assert torch.equal(fusion(features, present), expected)


@pytest.mark.parametrize(("kind", "modality"), [(ImageOnly, "image"), (TextOnly, "text")])
def test_one_modality_alone(kind, modality, features, present):
    fusion = kind(SPECS, 4, Linear)
    assert fusion.specs == {modality: SPECS[modality]}
    expected = fusion.head(features[modality])
    assert torch.equal(fusion(features, present), expected)
    assert torch.equal(fusion({modality: features[modality]}, {modality: present[modality]}), expected)


def test_sum_starts_as_the_plain_sum(features, present):
    fusion = SumFusion(SPECS, 4, Linear)
    expected = fusion.heads["image"](features["image"]) + fusion.heads["text"](features["text"])
    torch.testing.assert_close(fusion(features, present), expected)


def test_mixed_adds_the_concatenation(features, present):
    fusion = MixedFusion(SPECS, 4, Linear)
    joined = fusion.concat(torch.cat([features["image"], features["text"]], dim=1))
    alone = fusion.heads["image"](features["image"]) + fusion.heads["text"](features["text"])
    torch.testing.assert_close(fusion(features, present), joined + alone)


def test_sum_without_an_image_is_the_text_alone(features, present):
    fusion = SumFusion(SPECS, 4, Linear)
    nn.init.normal_(fusion.meta.weight)
    nn.init.normal_(fusion.meta.bias)
    present["image"][:] = False
    torch.testing.assert_close(fusion(features, present), fusion.meta(fusion.heads["text"](features["text"])))


def test_absence_is_by_row(features, present):
    fusion = SumFusion(SPECS, 4, Linear)
    whole = fusion(features, present)
    present["image"][2] = False
    partial = fusion(features, present)
    torch.testing.assert_close(partial[2], fusion.heads["text"](features["text"])[2])
    assert torch.equal(partial[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_concat_takes_an_absent_row_for_the_training_mean(features, present):
    fusion = ConcatFusion(SPECS, 4, Linear)
    present["text"][:] = False
    zeroed = {**features, "text": torch.zeros(5, 3)}
    everywhere = {m: torch.ones(5, dtype=torch.bool) for m in WIDTHS}
    assert torch.equal(fusion(features, present), fusion(zeroed, everywhere))


def test_the_order_of_modalities_does_not_matter(features, present):
    for kind in (ConcatFusion, SumFusion, MixedFusion):
        torch.manual_seed(0)
        one = kind(SPECS, 4, Linear)
        torch.manual_seed(0)
        other = kind(dict(reversed(SPECS.items())), 4, Linear)
        assert torch.equal(one(features, present), other(dict(reversed(features.items())), present))


@pytest.mark.parametrize("kind", [ConcatFusion, SumFusion, MixedFusion])
def test_any_number_of_modalities(kind):
    for modalities in (["text"], ["image", "text"], ["audio", "image", "text", "video"]):
        fusion = kind(specs_of(dict.fromkeys(modalities, 3)), 4, Linear)
        x = {m: torch.randn(5, 3) for m in modalities}
        assert fusion(x, {m: torch.ones(5, dtype=torch.bool) for m in modalities}).shape == (5, 4)


def test_a_modality_that_is_not_there():
    with pytest.raises(ConfigError, match=naming("fusion image text")):
        ImageOnly({"text": 3}, 4, Linear)
    with pytest.raises(ConfigError, match=naming("fusion text audio image")):
        TextOnly({"image": 3, "audio": 2}, 4, Linear)
    with pytest.raises(ConfigError, match=naming("fusion sum")):
        SumFusion(specs_of({}), 4, Linear)


class TestHeadsAlone:
    """What the staged scheme trains first: each head, by itself, is the fusion without the others."""

    def test_of_a_sum(self, features, present):
        fusion = SumFusion(SPECS, 4, Linear)
        nn.init.normal_(fusion.meta.weight)  # which has no part in them
        alone = fusion.unimodal_heads()
        assert list(alone) == ["image", "text"]
        for modality, head in alone.items():
            only = {m: present[m] if m == modality else ~present[m] for m in WIDTHS}
            torch.testing.assert_close(head(features, present), fusion.total(features, only))
            torch.testing.assert_close(head(features, present), fusion.heads[modality](features[modality]))

    def test_of_a_mixed_one(self, features, present):
        fusion = MixedFusion(SPECS, 4, Linear)
        alone = fusion.unimodal_heads()
        assert list(alone) == ["image", "text", "concat"]
        for modality in WIDTHS:
            torch.testing.assert_close(alone[modality](features, present), fusion.heads[modality](features[modality]))
        joined = fusion.total(features, present) - sum(alone[m](features, present) for m in WIDTHS)
        torch.testing.assert_close(alone["concat"](features, present), joined)

    @pytest.mark.parametrize("kind", [ConcatFusion, ImageOnly, TextOnly])
    def test_there_are_none_where_one_head_reads_all(self, kind):
        assert kind(SPECS, 4, Linear).unimodal_heads() == {}

    @pytest.mark.parametrize("kind", [SumFusion, MixedFusion])
    def test_they_are_the_fusions_own_and_all_but_what_joins_them(self, kind, features, present):
        fusion = kind(SPECS, 4, Linear)
        of_heads = {parameter for head in fusion.unimodal_heads().values() for parameter in head.parameters()}
        assert set(fusion.parameters()) - of_heads == set(fusion.meta.parameters())

    @pytest.mark.parametrize("kind", [SumFusion, MixedFusion])
    def test_absent_rows_have_no_influence(self, kind, features, present):
        present = {m: x.clone() for m, x in present.items()}
        present["image"][2] = False
        spoilt = {**features, "image": features["image"].index_fill(0, torch.tensor(2), torch.nan)}
        for head in kind(SPECS, 4, Linear).unimodal_heads().values():
            assert torch.equal(head(spoilt, present), head(features, present))
            assert head(spoilt, present).isfinite().all()
