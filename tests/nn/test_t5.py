"""T5 against transformers, in float64; and what it does where that is silent."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from cachefuse.errors import ConfigError, EncoderError
from cachefuse.nn.t5 import T5, RelativeBias, T5Settings, distances
from cachefuse.nn.t5_weights import load_t5, read_settings
from fixtures.messages import naming

VOCABULARY, LENGTHS = 24, (200, 3, 1, 60)
MORE = {"vocab_size": 40, "num_decoder_layers": 2, "dropout_rate": 0.5}
CASES = {  # name -> what differs: of version 1.0; of 1.1, where the heads' widths do not add up to the model's
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True, "d_kv": 4},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 6},
}


def save_t5(folder, case="1.0", kind=transformers.T5ForConditionalGeneration, **more):
    """Save a T5 with random weights as transformers does, from 1.1 on with an output layer of its own."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2}
    config = transformers.T5Config(**{**shape, "num_heads": 4, "decoder_start_token_id": 0, **CASES[case], **more})
    model = kind(config)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    if case == "1.1" and hasattr(model, "lm_head"):
        edit(folder, lambda weights: weights.update({"lm_head.weight": torch.randn(VOCABULARY, 16)}))
    return f"hf:{folder}"


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(params=sorted(CASES))
def pair(request, tmp_path, monkeypatch):
    """The same T5 here and there, all in float64: transformers takes the norms' variance in float32."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(T5LayerNorm, "forward", forward)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # transformers 4 takes the softmax in float32 too
    spec = save_t5(tmp_path, request.param)
    return load_t5(spec).double().eval(), reference(tmp_path)


def reference(folder, kind=transformers.T5ForConditionalGeneration):
    return kind.from_pretrained(folder).double().eval()


def texts(n_tokens=0):
    """Return ids (B, T) and the mask (B, T); padding is T5's own."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(n_tokens, *LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(2, VOCABULARY, (len(LENGTHS), 1000), generator=generator)[:, : mask.shape[1]] * mask, mask


def targets(n=150):
    return torch.randint(1, VOCABULARY, (len(LENGTHS), n), generator=torch.Generator().manual_seed(1))


class TestAgainstTransformers:
    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (5, 6), (32, 1000)])
    def test_buckets(self, bidirectional, buckets, distance):
        more = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
        bias = RelativeBias(T5Settings.from_scratch(4, 1, 1, **more), bidirectional=bidirectional)
        away = torch.arange(-1500, 1500)
        expected = T5Attention._relative_position_bucket(away, bidirectional, buckets, distance)
        assert torch.equal(bias.bucket(away), expected)
        assert torch.equal(bias.double().bucket(away), expected)

    def test_encoder(self, pair):
        ours, theirs = pair
        ids, mask = texts()
        expected = theirs.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(ours.encode(ids, mask)[mask], expected[mask], rtol=0, atol=1e-13)

    def test_decoder(self, pair):
        ours, theirs = pair
        ids, mask = texts()
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=targets()).logits
        torch.testing.assert_close(ours(ids, mask, targets()), expected, rtol=0, atol=1e-13)

    def test_what_a_loss_leaves_out_counts_as_padding(self, pair):
        ours, theirs = pair
        ids, mask = texts()
        some = targets(9).index_fill(1, torch.tensor([3, 7]), -100)
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=some).logits
        torch.testing.assert_close(ours(ids, mask, some), expected, rtol=0, atol=1e-13)

    def test_gradients(self, pair):
        ours, theirs = pair
        ids, mask = texts()
        weight = torch.randn(len(LENGTHS), 9, VOCABULARY, dtype=torch.float64)
        (ours(ids, mask, targets(9)) * weight).sum().backward()
        (theirs(input_ids=ids, attention_mask=mask.long(), labels=targets(9)).logits * weight).sum().backward()
        torch.testing.assert_close(ours.embedding.weight.grad, theirs.shared.weight.grad, rtol=1e-10, atol=1e-10)
        table = theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
        torch.testing.assert_close(ours.decoder.bias.table.weight.grad, table, rtol=1e-10, atol=1e-10)

    def test_in_float32(self, tmp_path):
        """As users run it, without any patch."""
        ours, theirs = load_t5(save_t5(tmp_path)).eval(), reference(tmp_path).float()
        ids, mask = texts()
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=targets()).logits
        torch.testing.assert_close(ours(ids, mask, targets()), expected, rtol=1e-4, atol=1e-4)


class TestDecoder:
    def test_does_not_look_ahead(self, pair):
        ours, _ = pair
        ids, mask = texts()
        later = targets(20).index_fill(1, torch.arange(10, 20), 5)
        one, other = ours(ids, mask, targets(20)), ours(ids, mask, later)
        torch.testing.assert_close(one[:, :11], other[:, :11], rtol=0, atol=1e-13)
        assert not torch.allclose(one[:, 11:], other[:, 11:])

    @pytest.mark.parametrize("n", [0, 1, 2])
    def test_its_first_layers(self, n, tmp_path):
        ours, theirs = load_t5(save_t5(tmp_path), n).double().eval(), reference(tmp_path)
        assert ours.settings == replace(read_settings(f"hf:{tmp_path}"), num_decoder_layers=n)
        if not n:
            assert ours.decoder is None
            return
        theirs.decoder.block = theirs.decoder.block[:n]
        ids, mask = texts()
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=targets(9)).logits
        torch.testing.assert_close(ours(ids, mask, targets(9)), expected, rtol=0, atol=1e-5)


class TestPadding:
    def test_changes_nothing(self, pair):
        ours, _ = pair
        ids, mask = texts()
        longer, longer_mask = texts(300)
        longer = longer.masked_fill(~longer_mask, -7)  # an id that there is none of
        memory, long_memory = ours.encode(ids, mask), ours.encode(longer, longer_mask)
        torch.testing.assert_close(long_memory[longer_mask], memory[mask], rtol=0, atol=1e-13)
        spoilt = long_memory.masked_fill(~longer_mask.unsqueeze(-1), torch.nan)
        expected = ours.decode(targets(9), memory, mask)
        torch.testing.assert_close(ours.decode(targets(9), spoilt, longer_mask), expected, rtol=0, atol=1e-13)
        embedded = ours.embedding(longer.clamp(min=0)).masked_fill(~longer_mask.unsqueeze(-1), torch.nan)
        torch.testing.assert_close(ours.encoder(embedded, longer_mask)[longer_mask], memory[mask], rtol=0, atol=1e-13)

    @pytest.mark.parametrize("n_tokens", [1, 7])
    def test_a_sample_without_tokens_is_finite(self, n_tokens):
        torch.manual_seed(0)
        more = {"vocab_size": 9, "num_decoder_layers": 2, "tied": False, "feed_forward_proj": "gated-gelu"}
        model = T5(T5Settings.from_scratch(8, 12, 2, **more))
        mask = torch.zeros(2, n_tokens, dtype=torch.bool)
        mask[1, 0] = True
        logits = model(torch.full_like(mask, 3, dtype=torch.int64), mask, torch.ones(2, 4, dtype=torch.int64))
        logits.square().sum().backward()
        assert logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestFromScratch:
    @pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_gradients_reach_every_parameter(self, kind, tied):
        torch.manual_seed(0)
        model = T5(T5Settings.from_scratch(8, 2, 2, **MORE, feed_forward_proj=kind, tied=tied))
        ids, mask = texts()
        (model(ids, mask, targets(30)) ** 2).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_starts_as_t5_does(self):
        """By the rules of transformers, whose output layer alone, if not tied, starts W^0.5 times larger."""
        torch.manual_seed(0)
        more = {"feed_forward_proj": "gated-gelu", "tied": False}
        model = T5(T5Settings.from_scratch(64, 1, 2, **MORE, **more))
        width, d_kv, inner, hidden = 64, 32, 64, 256
        expected = {
            "embedding.weight": 1.0,
            "lm_head.weight": width**-0.5,
            "bias.table.weight": width**-0.5,
            "q.weight": (width * d_kv) ** -0.5,
            "k.weight": width**-0.5,
            "v.weight": width**-0.5,
            "o.weight": inner**-0.5,
            "wi_0.weight": width**-0.5,
            "wi_1.weight": width**-0.5,
            "wo.weight": hidden**-0.5,
        }
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all()
            else:
                std = next(std for ending, std in expected.items() if name.endswith(f".{ending}") or name == ending)
                assert parameter.std().item() == pytest.approx(std, rel=0.25 if "table" in name else 0.1), name

    def test_hidden_states_and_logits_start_at_unit_scale(self):
        torch.manual_seed(0)
        model = T5(T5Settings.from_scratch(64, 3, 4, **MORE)).eval()
        ids, mask = texts()
        assert 0.5 < model.encode(ids, mask)[mask].std() < 2
        assert 0.5 < model(ids, mask, targets(9)).std() < 2

    def test_dropout_is_drawn_by_the_seed_and_off_in_evaluation(self):
        torch.manual_seed(0)
        model = T5(T5Settings.from_scratch(8, 2, 2, **MORE))
        ids, mask = texts()
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(model(ids, mask, targets(9)))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        model.eval()
        assert torch.equal(model(ids, mask, targets(9)), model(ids, mask, targets(9)))

    def test_distances_are_from_row_to_column(self):
        assert distances(torch.tensor([0, 1, 5])).tolist() == [[0, 1, 5], [-1, 0, 4], [-5, -4, 0]]


class TestSettings:
    def test_are_what_json_can_hold(self, tmp_path):
        settings = read_settings(save_t5(tmp_path, "1.1"))
        assert T5Settings(**json.loads(json.dumps(asdict(settings)))) == settings
        assert (settings.d_kv, settings.num_decoder_layers, settings.tied) == (6, 2, False)

    def test_of_a_config_that_leaves_out_what_is_usual(self):
        config = {"model_type": "t5", "vocab_size": 9, "d_model": 8, "num_layers": 3, "num_heads": 2, "d_kv": 4,
                  "d_ff": 16, "num_decoder_layers": None}  # fmt: skip
        assert T5Settings.from_config(config) == T5Settings(8, 3, 2, 4, 16, vocab_size=9, num_decoder_layers=3)
        assert not T5Settings.from_config({**config, "tie_word_embeddings": False}).tied

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_layers": 0}, "T5 num_layers 1 0"),
            ({"eos_token_id": [1, 2]}, "T5 eos_token_id 0 1 2"),
            ({"num_heads": True}, "T5 num_heads 1 True"),
            ({"feed_forward_proj": "gated-silu"}, "relu gated-gelu gated-silu"),
            ({"dropout_rate": 1}, "T5 dropout_rate 0 1"),
            ({"dropout_rate": "0"}, "T5 dropout_rate 0 1"),
            ({"relative_attention_num_buckets": 2}, "4 2 128"),
            ({"relative_attention_max_distance": 32}, "4 32"),
        ],
    )
    def test_out_of_range(self, changes, message):
        with pytest.raises(ConfigError, match=naming(message)):
            T5Settings(**{**asdict(T5Settings.from_scratch(8, 2, 2)), **changes})

    @pytest.mark.parametrize("heads", [0, 3])
    def test_heads_share_the_width(self, heads):
        with pytest.raises(ConfigError, match=naming(f"width {heads} heads 8")):
            T5Settings.from_scratch(8, 2, heads)


class TestLoading:
    def test_draws_nothing_at_random_and_trains(self, tmp_path):
        spec = save_t5(tmp_path)
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        model = load_t5(spec)
        assert torch.equal(torch.rand(3), expected)
        assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())

    def test_weights_in_several_files_and_in_bfloat16(self, tmp_path):
        spec = save_t5(tmp_path)
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        ours, (ids, mask) = load_t5(spec).eval(), texts()
        assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
        expected = model.float().eval()(input_ids=ids, attention_mask=mask.long(), labels=targets(9)).logits
        torch.testing.assert_close(ours(ids, mask, targets(9)), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("key", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
    def test_the_embedding_by_its_other_names(self, key, tmp_path):
        spec = save_t5(tmp_path)
        expected = load_t5(spec).embedding.weight
        edit(tmp_path, lambda weights: weights.update({key: weights.pop("shared.weight")}))
        assert torch.equal(load_t5(spec).embedding.weight, expected)

    def test_an_output_layer_that_transformers_tied(self, tmp_path):
        """Version 1.1's without weights of its own is the embedding, not scaled."""
        spec = save_t5(tmp_path, "1.1")
        edit(tmp_path, lambda weights: weights.pop("lm_head.weight"))
        ours, theirs, (ids, mask) = load_t5(spec).eval(), reference(tmp_path).float(), texts()
        if transformers.__version__.startswith("4."):  # which leaves it at random
            theirs.lm_head.weight = theirs.shared.weight
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=targets(9)).logits
        torch.testing.assert_close(ours(ids, mask, targets(9)), expected, rtol=1e-4, atol=1e-4)

    def test_an_encoder_alone(self, tmp_path):
        spec = save_t5(tmp_path, kind=transformers.T5EncoderModel)
        ours, theirs, (ids, mask) = load_t5(spec, 0).eval(), reference(tmp_path, transformers.T5EncoderModel), texts()
        expected = theirs.float()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(ours.encode(ids, mask)[mask], expected[mask], rtol=1e-4, atol=1e-4)
        with pytest.raises(EncoderError, match=r"weights.*decoder\.block\.0\.layer\.0"):
            load_t5(spec)

    @pytest.mark.parametrize("n", [-1, 3])
    def test_more_layers_than_there_are(self, n, tmp_path):
        with pytest.raises(EncoderError, match=naming(f"{n} layers 2")):
            load_t5(save_t5(tmp_path), n)

    @pytest.mark.parametrize(
        "key",
        [
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.2.layer.0.SelfAttention.q.weight",
            "encoder.block.1.layer.1.DenseReluDense.wi.weight",
            "decoder.block.1.layer.1.EncDecAttention.o.weight",
            "decoder.block.1.layer.1.layer_norm.weight",
            "decoder.block.0.layer.2.DenseReluDense.wo.weight",
            "decoder.block.0.layer.2.layer_norm.weight",
            "decoder.final_layer_norm.weight",
        ],
    )
    @pytest.mark.one_in(3)
    def test_weights_that_are_missing_or_of_another_shape(self, key, tmp_path):
        spec = save_t5(tmp_path)
        shape = tuple(load_file(tmp_path / "model.safetensors")[key].shape)
        edit(tmp_path, lambda weights: weights.update({key: torch.zeros(3, 5)}))
        with pytest.raises(EncoderError) as error:
            load_t5(spec)
        assert str(error.value) == f"cannot open {spec}: {key} is (3, 5); config.json needs {shape}"
        edit(tmp_path, lambda weights: weights.pop(key))
        with pytest.raises(EncoderError) as error:
            load_t5(spec)
        assert str(error.value) == f"cannot open {spec}: its weights lack 1 of the model's, such as {key}"

    def test_another_model(self, tmp_path):
        save_t5(tmp_path)
        edit_config(tmp_path, model_type="bert")
        with pytest.raises(EncoderError, match=naming("config.json model_type bert t5")):
            read_settings(f"hf:{tmp_path}")

    @pytest.mark.parametrize("key", ["d_model", "num_layers", "num_heads", "d_kv", "d_ff", "vocab_size"])
    def test_a_config_that_lacks_a_size(self, key, tmp_path):
        save_t5(tmp_path)
        edit_config(tmp_path, **{key: None})
        with pytest.raises(EncoderError, match=naming(f"config.json {key}")):
            load_t5(f"hf:{tmp_path}")

    @pytest.mark.parametrize("text", ["[]", "{", ""])
    def test_a_config_that_is_none(self, text, tmp_path):
        save_t5(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(EncoderError, match=naming("hf")):
            load_t5(f"hf:{tmp_path}")

    def test_weights_that_are_damaged(self, tmp_path):
        save_t5(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no such thing")
        with pytest.raises(EncoderError, match=naming("hf")):
            load_t5(f"hf:{tmp_path}")

    def test_pickles_are_refused(self, tmp_path):
        save_t5(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(EncoderError, match=naming("weights pytorch_model.bin")):
            load_t5(f"hf:{tmp_path}")

    def test_no_such_folder_and_no_such_family(self, tmp_path):
        with pytest.raises(EncoderError, match=naming(f"hf:{tmp_path}/no folder")):
            load_t5(f"hf:{tmp_path}/no")
        with pytest.raises(EncoderError, match=naming("T5 clip:ViT-B-32")):
            load_t5("clip:ViT-B-32")

    def test_without_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(EncoderError, match=naming("hf:no/such-t5 no/such-t5")):
            read_settings("hf:no/such-t5")
