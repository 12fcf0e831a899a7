"""Text towers against the library's own call on each text alone: of every architecture, pooled and tokens."""

import inspect

import numpy as np
import pytest
import torch
import transformers

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.encoder_table import pooled_in_table
from fixtures.hf_models import TEXTS, WORDS, save_model
from fixtures.messages import naming

LENGTHS = (1, 30, 2, 7, 3, 12, 3, 3)  # in words; side by side, so that padding would show
TOLERANCE = 1e-5  # relative to the largest feature; the largest error of all types measures 3.3e-6


def some_texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS[:10], n)) for n in LENGTHS]


def opened(folder):
    (tower,) = open_encoder(f"hf:{folder}").values()
    return tower


def encoded(folder, texts, more=""):
    tower = open_encoder(f"hf:{folder}{more}")["text"]
    return tower, tower.encode([tower.prepare(text) for text in texts], ("pooled", "tokens"))


def assert_close(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def call(folder, model, text):
    """The library's own call: all that the tokenizer gives and the model takes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    n_most = getattr(model.config, "max_position_embeddings", 0) if "siglip" in model.config.model_type else 0
    padding = {"padding": "max_length", "max_length": n_most, "truncation": True} if n_most else {}
    inputs = tokenizer(text, return_tensors="pt", **padding)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    names = inspect.signature(encoder.forward).parameters
    with torch.inference_mode():
        out = encoder(**{name: value for name, value in inputs.items() if name in names})
    n_tokens = int(inputs["attention_mask"].sum())
    return out, out.last_hidden_state[0, :n_tokens].double().numpy()


@pytest.mark.one_in(12)
@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind in transformers.CONFIG_MAPPING])
def test_features_are_the_library_s(kind, tmp_path):
    model = save_model(kind, tmp_path).eval()
    texts = some_texts()
    tower, features = encoded(tmp_path, texts)
    assert tower.provenance["pooling"] == pooled_in_table()[kind]
    for i, text in enumerate(texts):
        out, tokens = call(tmp_path, model, text)
        assert_close(features["tokens"][i], tokens)
        pooler = tower.provenance["pooling"] == "pooler"
        assert_close(features["pooled"][i], out.pooler_output[0].double() if pooler else tokens.mean(0))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["bert", "roberta", "clip_text_model"])
def test_another_pooling_may_be_asked_for_and_is_part_of_the_key(kind, tmp_path):
    model = save_model(kind, tmp_path).eval()
    texts = some_texts()
    keys = set()
    for pooling in ("cls", "mean", "pooler", "last"):
        if (kind, pooling) == ("clip_text_model", "cls"):
            continue  # of a causal model the first token is the same for every text
        tower, features = encoded(tmp_path, texts, f",pooling={pooling}")
        keys.add(tower.provenance["pooling"])
        for i, text in enumerate(texts):
            out, tokens = call(tmp_path, model, text)
            expected = {"cls": tokens[0], "mean": tokens.mean(0), "last": tokens[-1], "pooler": out.pooler_output[0]}
            assert_close(features["pooled"][i], expected[pooling])
    assert len(keys) == 4 - (kind == "clip_text_model")


def test_the_first_token_of_a_causal_model_is_refused(tmp_path):
    save_model("gpt2", tmp_path)
    with pytest.raises(EncoderError, match=naming("GPT2Model causal last mean")):
        open_encoder(f"hf:{tmp_path},pooling=cls")


@pytest.mark.parametrize(("pooling", "names"), [("cls", "causal last mean text"), ("last", "last mean image")])
def test_a_pooling_that_one_encoder_of_two_lacks_is_refused_by_its_name(pooling, names, tmp_path):
    save_model("clip", tmp_path)
    with pytest.raises(EncoderError, match=naming(names)):
        open_encoder(f"hf:{tmp_path},pooling={pooling}")


@pytest.mark.parametrize("kind", ["t5", "distilbert", "gpt2"])
def test_a_pooler_that_a_model_lacks_is_refused(kind, tmp_path):
    save_model(kind, tmp_path)
    with pytest.raises(EncoderError, match=naming("pooler mean last")):
        open_encoder(f"hf:{tmp_path},pooling=pooler")


def test_t5_is_bfloat16_on_cuda_also_as_an_encoder_alone(tmp_path):
    save_model("t5", tmp_path)
    transformers.T5EncoderModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert opened(tmp_path).half == torch.bfloat16


def test_the_projection_of_a_text_model_is_taken_where_its_folder_has_one(tmp_path):
    save_model("clip_text_model", tmp_path)
    config = transformers.CLIPTextConfig.from_pretrained(tmp_path)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    texts = some_texts()
    _, features = encoded(tmp_path, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        for row, text in zip(features["pooled"], texts, strict=True):
            assert_close(row, model(tokenizer(text, return_tensors="pt")["input_ids"]).text_embeds[0])


@pytest.mark.parametrize(("kind", "what"), [("layoutlm", "bbox"), ("lilt", "bbox"), ("markuplm", "xpath_tags_seq")])
def test_a_model_of_more_than_texts_is_refused(kind, what, tmp_path):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=naming(f"{kind} {what}")):
        open_encoder(f"hf:{tmp_path}")
