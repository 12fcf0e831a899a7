"""Mid fusion with the weights of a T5."""

import json
from dataclasses import asdict

import pytest
import torch
import transformers
from torch import nn

from cachefuse.errors import ConfigError
from cachefuse.fusion.midfusion import MidFusion
from cachefuse.nn.heads import Linear
from cachefuse.nn.t5_weights import load_t5, read_settings
from fixtures.messages import naming
from fixtures.midfusion import FEATURES, C, build, inputs


class TestPretrained:
    @pytest.fixture(params=["relu", "gated-gelu"])
    def spec(self, request, tmp_path):
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=24, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_decoder_layers=2, num_heads=4,
            decoder_start_token_id=2, feed_forward_proj=request.param,
        )  # fmt: skip
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        return f"hf:{tmp_path}"

    def fuse(self, spec, **options):
        settings = json.loads(json.dumps(asdict(read_settings(spec))))
        torch.manual_seed(1)
        ids = {"text_view": "ids", **options}
        return MidFusion(FEATURES, C, Linear, architecture=settings, width=99, depth=77, heads=55, **ids)

    def test_text_alone_is_the_encoder(self, spec):
        fusion, (features, present) = self.fuse(spec, fusion_spec="0:text").eval(), inputs(dtype=torch.float32)
        fusion.load_t5(load_t5(spec, 0))
        x, mask = fusion.encode(features, present)
        assert torch.equal(mask, present["text_ids"])
        theirs = transformers.T5EncoderModel.from_pretrained(spec.removeprefix("hf:")).eval()
        expected = theirs(input_ids=features["text_ids"], attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(x[mask], expected[mask], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("n", [1, 2])
    def test_text_alone_and_the_decoders_first_step(self, spec, n):
        fusion = self.fuse(spec, fusion_spec="0:text", decoder_layers=n).eval()
        fusion.load_t5(load_t5(spec))
        fusion.head = nn.Identity()
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(spec.removeprefix("hf:")).eval()
        theirs.decoder.block = theirs.decoder.block[:n]
        features, present = inputs(rows=slice(0, 3), dtype=torch.float32)
        ids, mask = features["text_ids"], present["text_ids"].long()
        memory = theirs.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = theirs.decoder(
            input_ids=torch.full((3, 1), 2), encoder_hidden_states=memory, encoder_attention_mask=mask
        ).last_hidden_state
        torch.testing.assert_close(fusion(features, present), expected[:, 0], rtol=1e-4, atol=1e-5)

    def test_other_modalities_and_the_head_keep_their_start(self, spec):
        fusion = self.fuse(spec, decoder_layers=1)
        before = {name: p.detach().clone() for name, p in fusion.named_parameters()}
        fusion.load_t5(load_t5(spec))
        kept = [name for name, p in fusion.named_parameters() if torch.equal(p, before[name]) and "norm" not in name]
        assert kept == ["between", *(f"enter.{m}.{p}" for m in ("audio", "image") for p in ("weight", "bias")),
                        "head.weight", "head.bias"]  # fmt: skip
        fusion(*inputs(dtype=torch.float32)).square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in fusion.parameters())

    def test_another_t5(self, spec):
        with pytest.raises(ConfigError, match=naming("weights T5 T5Settings")):
            build().load_t5(load_t5(spec))
        with pytest.raises(ConfigError, match=naming("weights T5")):
            self.fuse(spec, decoder_layers=2).load_t5(load_t5(spec, 1))

    def test_more_decoder_layers_than_it_has(self, spec):
        with pytest.raises(ConfigError, match=naming("decoder_layers 2 T5 3")):
            self.fuse(spec, decoder_layers=3)

    def test_ids_of_a_larger_vocabulary(self, spec):
        settings = {**asdict(read_settings(spec)), "vocab_size": 19}
        with pytest.raises(ConfigError, match=naming("text_ids 20 tokens T5 19")):
            MidFusion(FEATURES, C, Linear, architecture=settings, text_view="ids")

    def test_settings_that_are_none(self):
        with pytest.raises(ConfigError, match=naming("t5 T5")):
            MidFusion(FEATURES, C, Linear, architecture={"depth": 3})
