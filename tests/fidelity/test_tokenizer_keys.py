"""Two folders whose settings make other features have other keys; the usual settings leave a key as it was."""

import json

import numpy as np
import pytest

from cachefuse.encoders import open_encoder
from cachefuse.encoders.frozen import fingerprint
from fixtures.hf_models import WORDS, save_model

LONG = " ".join(WORDS[i % 10] for i in range(200))
UNMASKED = {"model_input_names": ["input_ids"]}


def opened(folder, more=""):
    return open_encoder(f"hf:{folder}{more}")["text"]


def pooled(tower, texts):
    return tower.encode([tower.prepare(text) for text in texts], ("pooled",))["pooled"]


def change(folder, settings):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("kind", "usual", "settings"),
    [
        ("bert", {}, {"truncation_side": "left"}),
        ("bert", {}, {"split_special_tokens": True}),
        ("xlnet", {}, {"model_input_names": ["input_ids", "attention_mask"]}),
        ("siglip", UNMASKED, {"pad_token": "[MASK]"}),
        ("siglip", UNMASKED, {"padding_side": "left"}),
        ("siglip", UNMASKED, {"model_input_names": ["input_ids", "attention_mask"]}),
    ],
)
@pytest.mark.one_in(3)
def test_a_setting_that_changes_features_changes_the_key(kind, usual, settings, tmp_path):
    save_model(kind, tmp_path)
    change(tmp_path, usual)
    texts = [f"{LONG} river", "water [SEP] music", "water"]
    before, after = opened(tmp_path), None
    rows = pooled(before, texts)
    change(tmp_path, settings)
    after = opened(tmp_path)
    assert np.abs(pooled(after, texts) - rows).max() > 0.01 * np.abs(rows).max()
    assert dict(after.provenance) != dict(before.provenance)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "siglip"])
@pytest.mark.one_in(3)
def test_usual_settings_leave_the_key_as_it_was(kind, tmp_path):
    """The tokenizer's name and the digest of its rules, as in stores of older versions."""
    save_model(kind, tmp_path)
    change(tmp_path, UNMASKED)
    before = opened(tmp_path)
    assert before.provenance["tokenizer"].split(" ")[1:] == [fingerprint(_rules(before.tokenizer, tmp_path))]
    assert before.provenance.keys() == {
        *("family", "architecture", "weights", "library", "tokenizer", "pooling", "max_length")
    }
    change(tmp_path, {"truncation_side": "right", "split_special_tokens": False, "padding_side": "right"})
    assert dict(opened(tmp_path).provenance) == dict(before.provenance)


def _rules(tokenizer, folder):
    return type(tokenizer).from_pretrained(folder).backend_tokenizer.to_str()


def test_the_merges_of_a_slow_tokenizer_are_in_the_key(tmp_path):
    save_model("ctrl", tmp_path)
    for path in tmp_path.glob("*tok*"):
        path.unlink()
    vocabulary = ("<unk>", "a@@", "b@@", "ab@@", "c", "bc", "a", "b", "abc", "ab", *"defghi")
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}')
    keys, rows = [], []
    for merges in ("a b\nab c</w>", "b c</w>", "b c</w>"):
        (tmp_path / "merges.txt").write_text(f"#version\n{merges}\n")
        tower = opened(tmp_path)
        keys.append(dict(tower.provenance))
        rows.append(pooled(tower, ["abc", "a abc d e"]))
    assert np.abs(rows[0] - rows[1]).max() > 0.01
    assert keys[0] != keys[1] == keys[2]
