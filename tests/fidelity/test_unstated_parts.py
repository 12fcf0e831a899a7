"""What a folder does not state, or states otherwise than it is, is refused: the library would fill in its defaults."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from cachefuse.encoders import open_encoder
from cachefuse.encoders.sentence_folder import Dense
from cachefuse.errors import BadSampleError, EncoderError
from fixtures.hf_models import save_model
from fixtures.messages import naming

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LETTERS = [chr(i) for i in range(33, 127)] + [f"##{chr(i)}" for i in range(33, 127)]


def save_bert(folder, layers=2, more_rows=0, lower=True):
    """Save a BERT with a tokenizer of single letters."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *LETTERS))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token")
    special = dict(zip(names, SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab) + more_rows,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return tokenizer


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, words):
    with pytest.raises(EncoderError, match=naming(words)):
        open_encoder(f"hf:{folder}")


def test_a_tokenizer_without_settings_that_the_library_would_change(tmp_path):
    save_bert(tmp_path, lower=False)
    (tmp_path / "tokenizer_config.json").unlink()
    refused(tmp_path, "tokenizer_config.json")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    tokenizer = save_bert(tmp_path)
    tokenizer.add_tokens(["zebra", "lion"])
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "tokenizer tokens 192")


@pytest.mark.parametrize("kind", ["bert", "clip", "groupvit"])
def test_a_token_of_every_text_that_the_model_does_not_know(kind, tmp_path):
    """The library does not say of all of these how many tokens they know."""
    save_model(kind, tmp_path)
    assert open_encoder(f"hf:{tmp_path}")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [50_000]
    path.write_text(json.dumps(content))
    refused(tmp_path, "tokenizer tokens")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_padding_token_that_the_model_does_not_know(kind, tmp_path):
    """As some chat models have it. Padding is masked, so that any other token is as good."""
    model = save_model(kind, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    model.resize_token_embeddings(tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    tower = open_encoder(f"hf:{tmp_path}")["text"]
    texts = ["water", "green table river house", "night bread"]
    rows = tower.encode([tower.prepare(text) for text in texts], ("pooled",))["pooled"]
    for text, row in zip(texts, rows, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(0), atol=1e-5)


def test_a_padding_token_that_a_model_reads_and_does_not_know(tmp_path):
    """SigLIP reads its padding, so no other token will do."""
    model = save_model("siglip_text_model", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    assert open_encoder(f"hf:{tmp_path}")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(model.config.vocab_size)]})
    tokenizer.pad_token = f"<{model.config.vocab_size - 1}>"
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "pads token")


def test_a_text_with_a_special_token_that_the_model_does_not_know(tmp_path):
    tokenizer = save_bert(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path)
    tower = open_encoder(f"hf:{tmp_path}")["text"]
    assert tower.prepare("a dog")
    with pytest.raises(BadSampleError, match="token"):
        tower.prepare("a <extra> dog")


def test_weights_of_more_layers_than_the_configuration(tmp_path):
    save_bert(tmp_path)
    assert open_encoder(f"hf:{tmp_path}")
    change(tmp_path / "config.json", num_hidden_layers=1)
    refused(tmp_path, "layers config.json")


@pytest.mark.parametrize("name", ["image_mean", "image_std", "size"])
def test_preprocessing_that_is_not_stated(tmp_path, name):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert open_encoder(f"hf:{tmp_path}")
    path = tmp_path / "preprocessor_config.json"
    stated = json.loads(path.read_text())
    del stated[name]
    path.write_text(json.dumps(stated))
    refused(tmp_path, f"preprocessing {name}")


def as_sentence_folder(folder, **settings):
    """Add what sentence-transformers writes: a Transformer and the mean of its tokens."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


def pooled(folder, text):
    tower = open_encoder(f"hf:{folder}")["text"]
    return tower.encode([tower.prepare(text)], ("pooled",))["pooled"]


def test_a_folder_may_keep_the_first_features_only(tmp_path):
    save_bert(tmp_path)
    as_sentence_folder(tmp_path)
    whole = pooled(tmp_path, "a dog")
    key = dict(open_encoder(f"hf:{tmp_path}")["text"].provenance)
    as_sentence_folder(tmp_path, truncate_dim=8)
    np.testing.assert_array_equal(pooled(tmp_path, "a dog"), whole[:, :8])
    assert dict(open_encoder(f"hf:{tmp_path}")["text"].provenance) == {**key, "modules": "first 8"}


def test_a_folder_of_another_kind_of_model(tmp_path):
    save_bert(tmp_path)
    as_sentence_folder(tmp_path, model_type="SparseEncoder")
    refused(tmp_path, "SparseEncoder SentenceTransformer")


@pytest.mark.parametrize("modules", ["[]", "null", '["Transformer"]', '[{"path": "", "type": "x.Transformer"}]', "[{"])
def test_a_list_of_modules_that_is_none(tmp_path, modules):
    save_bert(tmp_path)
    as_sentence_folder(tmp_path)
    (tmp_path / "modules.json").write_text(modules)
    refused(tmp_path, "modules.json")


@pytest.mark.parametrize("mode", ["[]", "null"])
def test_a_pooling_without_a_mode(tmp_path, mode):
    save_bert(tmp_path)
    as_sentence_folder(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode": {mode}}}')
    refused(tmp_path, "pooling_mode")


def test_the_length_that_a_folder_states_comes_before_its_tokenizers(tmp_path):
    save_bert(tmp_path)
    as_sentence_folder(tmp_path)
    change(tmp_path / "tokenizer_config.json", model_max_length=16)
    assert open_encoder(f"hf:{tmp_path}")["text"].max_tokens == 16
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    assert open_encoder(f"hf:{tmp_path}")["text"].max_tokens == 48


def test_an_activation_with_weights_has_the_librarys_name_for_them():
    layer = Dense(4, 2, True, nn.PReLU(), residual=False)
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias", "activation_function.weight"}
