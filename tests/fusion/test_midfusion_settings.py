"""Mid fusion's settings: how they are given, what does not fit, what it starts as, and what it costs."""

import pytest
import torch

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.fusion.midfusion import MidFusion, read_fusion_spec
from cachefuse.nn.heads import Linear
from cachefuse.nn.pooling import read_pool
from fixtures.messages import naming
from fixtures.specs import specs_of

WIDTHS = {
    "audio_tokens": (3, 4), "image": 7, "image_tokens": (5, 6), "text": 4,
    "text_ids": (20, 8), "text_tokens": (4, 8),
}  # fmt: skip
SPECS = specs_of(WIDTHS)
C = 3
SIZES = {"width": 8, "depth": 4, "heads": 2}


def build(**options):
    return MidFusion(SPECS, C, Linear, **SIZES, text_view="ids", **options)


class TestSettings:
    def test_what_is_read(self):
        assert MidFusion.views("text", {}) == ("tokens",)
        assert MidFusion.views("text", {"t5": "hf:t5-small"}) == ("ids",)
        assert MidFusion.views("text", {"text_view": "ids"}) == ("ids",)
        assert MidFusion.views("text", {"text_view": "tokens"}) == ("tokens",)
        assert MidFusion.views("image", {"text_view": "ids"}) == ("tokens",)
        assert MidFusion.views("image", {"fusion_spec": "0:text"}) == ()
        assert list(build().specs) == ["audio_tokens", "image_tokens", "text_ids"]
        assert build().names == {"text": "text_ids", "audio": "audio_tokens", "image": "image_tokens"}

    def test_forms_of_a_fusion_spec(self):
        expected = {"text": 0, "image": 6, "audio": 6}
        assert read_fusion_spec("0:text,6:image,6:audio") == expected
        assert read_fusion_spec(" 0: text, 6 :image,6:audio ") == expected
        assert read_fusion_spec({0: ["text"], 6: ("image", "audio")}) == expected
        assert read_fusion_spec({"0": "text", "6": ["image", "audio"]}) == expected

    def test_forms_of_a_pool(self):
        expected = {"image": ("attention", 14), "text": ("mean", 8)}
        assert read_pool("image=attention:14,text=mean:8") == expected
        assert read_pool(" image = attention : 14 , text=mean:8") == expected
        assert read_pool({"image": ("attention", 14), "text": ["mean", 8]}) == expected
        assert read_pool({"image": "attention:14", "text": "mean:8"}) == expected
        assert read_pool("") == read_pool({}) == {}

    def test_without_text_all_join_at_once(self):
        fusion = MidFusion(specs_of({"image_tokens": (5, 6), "audio_tokens": (3, 4)}), C, Linear)
        assert fusion.joins == {0: ("audio", "image")}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fusion_spec": "0:text,5:image"}, "image layer 5 0 4"),
            ({"fusion_spec": "0:text,1:imgae"}, "fusion_spec imgae audio image text"),
            ({"fusion_spec": "0:text,1:image,2:text"}, "fusion_spec text"),
            ({"fusion_spec": {0: ["text", "text"]}}, "fusion_spec text"),
            ({"fusion_spec": "1:text,2:image"}, "layer 0 1:text,2:image"),
            ({"fusion_spec": "text"}, "fusion_spec 0:text,6:image text"),
            ({"fusion_spec": "0:text,"}, "fusion_spec 0:text,6:image 0:text"),
            ({"fusion_spec": {-1: ["text"]}}, "fusion_spec 0:text,6:image {-1"),
            ({"pool": "image=mean:7"}, "image 7 6"),
            ({"pool": "image=mean:0"}, "pooling 1 0"),
            ({"pool": "imgae=mean:2"}, "imgae text audio image"),
            ({"pool": "image=mean:2", "fusion_spec": "0:text"}, "pool image text"),
            ({"pool": "image=mean:2,image=max:2"}, "pool image"),
            ({"pool": "image=mean"}, "pool image=attention:14,text=mean:8 image=mean"),
            ({"pool": "mean:2"}, "pool image=attention:14,text=mean:8 mean:2"),
            ({"width": 9}, "width 2 heads 9"),
            ({"depth": 0}, "T5 num_layers 1 0"),
            ({"decoder_layers": -1}, "T5 num_decoder_layers 0 -1"),
            ({"dropout": 1.0}, "T5 dropout_rate 0 1 1.0"),
            ({"text_view": "pooled"}, "text_view ids tokens pooled"),
        ],
    )
    def test_that_do_not_fit(self, options, message):
        with pytest.raises(ConfigError, match=naming(message)):
            MidFusion(SPECS, C, Linear, **{**SIZES, **options})

    def test_an_unknown_pooling(self):
        with pytest.raises(UnknownNameError, match=naming("atention attention")):
            build(pool="image=atention:2")

    def test_features_that_are_not_there(self):
        with pytest.raises(ConfigError, match=naming("fusion midfusion image_tokens image")):
            MidFusion(specs_of({"image": 7}), C, Linear)
        with pytest.raises(ConfigError, match=naming("fusion midfusion")):
            MidFusion(specs_of({}), C, Linear)


def test_starts_without_a_bias_between_modalities():
    torch.manual_seed(0)
    fusion = MidFusion(SPECS, C, Linear)
    assert not fusion.between.any()
    assert fusion.between.shape == (3, 3, 4)
    bias = fusion.bias([8, 4, 6])  # text, audio and image
    assert bias.shape == (1, 4, 18, 18)
    assert not bias[..., :8, 8:].any()
    assert torch.equal(bias[..., 8:12, 8:12], bias[..., :4, :4])  # each by its own positions


def test_what_joins_starts_at_the_scale_of_the_embedding():
    torch.manual_seed(0)
    fusion = MidFusion(specs_of({"image_tokens": (100, 50), "text_ids": (200, 50)}), C, Linear, text_view="ids")
    mask = torch.ones(4, 50, dtype=torch.bool)
    features = {"image_tokens": torch.randn(4, 50, 100), "text_ids": torch.randint(200, (4, 50))}
    for modality in ("image", "text"):
        tokens, _ = fusion.tokens(modality, features, dict.fromkeys(features, mask))
        assert tokens.std().item() == pytest.approx(1, rel=0.1)


class TestCost:
    """Each layer sees only what has joined before it."""

    def seen(self, **options):
        fusion, lengths = build(**options), []
        features = {
            "text_ids": torch.zeros(1, 8, dtype=torch.long),
            "image_tokens": torch.randn(1, 6, 5),
            "audio_tokens": torch.randn(1, 4, 3),
        }
        for layer in fusion.encoder.layers:
            layer.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
        fusion(features, {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in features.items()})
        return lengths

    @pytest.mark.parametrize(
        ("spec", "lengths"),
        [
            ("0:text,0:image", [14, 14, 14, 14]),
            ("0:text,1:image", [8, 14, 14, 14]),
            ("0:text,3:image", [8, 8, 8, 14]),
            ("0:text,4:image", [8, 8, 8, 8]),
            ("0:image,1:audio,3:text", [6, 10, 10, 18]),
        ],
    )
    def test_falls_with_later_fusion(self, spec, lengths):
        assert self.seen(fusion_spec=spec) == lengths

    def test_falls_with_stronger_pooling(self):
        assert self.seen(fusion_spec="0:text,2:image", pool="image=mean:3") == [8, 8, 11, 11]
        assert self.seen(fusion_spec="0:text,2:image", pool="image=mean:1,text=max:2") == [2, 2, 3, 3]

    def test_the_bias_is_made_once_for_each_set_of_modalities(self, monkeypatch):
        made, bias = [], MidFusion.bias
        monkeypatch.setattr(MidFusion, "bias", lambda self, lengths: made.append(list(lengths)) or bias(self, lengths))
        self.seen(fusion_spec="0:text,2:image,4:audio")
        assert made == [[8], [8, 6]]  # those that join after the last layer need none
