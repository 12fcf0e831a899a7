"""Folders of sentence-transformers against its definitions, in float64, and against the library where it is there."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.hf_models import WORDS, save_model
from fixtures.messages import naming

TOLERANCE = 1e-5  # relative to the largest feature; the largest error measures 1.1e-6
PROMPT = "water music "
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS[:10], n)) for n in (1, 30, 2, 7, 3, 12)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_folder(folder, modules, kind="bert", inside="", package="sentence_transformers.models"):
    """Save a model, in a subfolder ``inside``, and modules after it: (type, settings, weights)."""
    (folder / inside).mkdir(exist_ok=True)
    model = save_model(kind, folder / inside).eval()
    rows = [{"idx": 0, "name": "0", "path": inside, "type": f"{package}.Transformer"}]
    for i, (name, settings, weights) in enumerate(modules, 1):
        path = f"{i}_{name}"
        rows.append({"idx": i, "name": str(i), "path": path, "type": f"{package}.{name}"})
        (folder / path).mkdir()
        if settings is not None:
            write(folder / path / "config.json", settings)
        if weights:
            save_file(weights, folder / path / "model.safetensors")
    write(folder / "modules.json", rows)
    return model


def opened(folder, more=""):
    return open_encoder(f"hf:{folder}{more}")["text"]


def pooled(folder, more=""):
    tower = opened(folder, more)
    return tower.encode([tower.prepare(text) for text in TEXTS], ("pooled",))["pooled"]


def tokens_of(model, folder, text):
    """The library's vectors of a text's tokens, alone, in float64."""
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        return model(**inputs).last_hidden_state[0].double().numpy()


def defined(mode, tokens, skip=0):
    """What a mode is, of tokens (T, D), of which the first ``skip`` do not count."""
    weights = np.arange(1, len(tokens) + 1)[skip:, None]
    kept = tokens[skip:]
    return {
        "cls": kept[0],
        "lasttoken": kept[-1],
        "max": kept.max(0),
        "mean": kept.mean(0),
        "mean_sqrt_len_tokens": kept.sum(0) / np.sqrt(len(kept)),
        "weightedmean": (kept * weights).sum(0) / weights.sum(),
    }[mode]


def assert_close(ours, theirs):
    theirs = np.stack(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("modes", [*((mode,) for mode in FLAGS), ("cls", "max", "mean"), ("cls", "lasttoken")])
def test_every_pooling_in_both_spellings(modes, legacy, tmp_path):
    flags = {flag: mode in modes for mode, flag in FLAGS.items()} if legacy else None
    one_or_more = modes[0] if len(modes) == 1 else list(modes)
    settings = {"word_embedding_dimension": 32, **flags} if legacy else {"pooling_mode": one_or_more}
    model = save_folder(tmp_path, [("Pooling", settings, None)])
    expected = [tokens_of(model, tmp_path, text) for text in TEXTS]
    assert_close(pooled(tmp_path), [np.concatenate([defined(mode, one) for mode in modes]) for one in expected])


@pytest.mark.one_in(5)
@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.x"])
@pytest.mark.parametrize("name", ["Tanh", "ReLU", "Identity", None])
def test_dense_layer_norm_and_normalize(name, package, tmp_path):
    generator = torch.Generator().manual_seed(0)
    dense = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in (("linear.weight", (16, 32)), ("linear.bias", (16,)))
    }
    norm = {"norm.weight": torch.rand(16, generator=generator), "norm.bias": torch.rand(16, generator=generator)}
    activation = {"activation_function": f"torch.nn.modules.activation.{name}"} if name else {}
    if name == "Identity":
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    modules = [
        ("Pooling", {"pooling_mode": "mean"}, None),
        ("Dropout", {"dropout": 0.9}, None),
        ("Dense", {"in_features": 32, "out_features": 16, "bias": True, **activation}, dense),
        ("LayerNorm", {"dimension": 16}, norm),
        ("Normalize", None, None),
    ]
    model = save_folder(tmp_path, modules, inside="0_Transformer", package=package)
    rows = []
    for text in TEXTS:
        x = tokens_of(model, tmp_path / "0_Transformer", text).mean(0)
        x = dense["linear.weight"].double().numpy() @ x + dense["linear.bias"].double().numpy()
        x = {"ReLU": np.maximum(x, 0), "Identity": x}.get(name, np.tanh(x))
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x * norm["norm.weight"].double().numpy() + norm["norm.bias"].double().numpy()
        rows.append(x / np.linalg.norm(x))
    assert_close(pooled(tmp_path), rows)
    facts = opened(tmp_path).provenance
    assert facts["pooling"] == "mean"
    assert all(word in facts["modules"] for word in ("dense 32 to 16", name or "Tanh", "layer norm", "normalize"))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("mode", FLAGS)
def test_a_default_prompt_is_written_first_and_pooled_if_it_is_included(mode, included, tmp_path):
    model = save_folder(tmp_path, [("Pooling", {"pooling_mode": mode, "include_prompt": included}, None)])
    write(
        tmp_path / "config_sentence_transformers.json",
        {"prompts": {"q": PROMPT, "p": "a "}, "default_prompt_name": "q"},
    )
    tokens = [tokens_of(model, tmp_path, PROMPT + text) for text in TEXTS]
    assert_close(pooled(tmp_path), [defined(mode, one, 0 if included else 3) for one in tokens])  # [CLS] and two words
    assert PROMPT in opened(tmp_path).provenance["prompt"]


def test_texts_are_cut_and_written_in_lower_case_as_the_folder_says(tmp_path):
    save_folder(tmp_path, [("Pooling", {"pooling_mode": "mean"}, None)])
    plain = opened(tmp_path).provenance
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    tower = opened(tmp_path)
    assert tower.prepare("WATER Music").windows == opened(tmp_path).prepare("water music").windows
    assert tower.length(tower.prepare("water " * 20)) == 9
    assert tower.provenance["tokenizer"] != plain["tokenizer"]
    assert tower.provenance["max_length"] == "9"


def test_the_keys_of_plain_folders_stay(tmp_path):
    """A folder with its pooling alone has the key of a folder of the same model, as ever."""
    save_folder(tmp_path, [("Pooling", {"pooling_mode_mean_tokens": True}, None)])
    facts = dict(opened(tmp_path).provenance)
    assert set(facts) == {"family", "architecture", "weights", "library", "tokenizer", "max_length", "pooling"}
    (tmp_path / "modules.json").unlink()
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert dict(opened(tmp_path).provenance) == facts


def test_an_option_replaces_the_pooling_and_keeps_what_follows(tmp_path):
    model = save_folder(tmp_path, [("Pooling", {"pooling_mode": "mean"}, None), ("Normalize", {}, None)])
    rows = [tokens_of(model, tmp_path, text)[-1] for text in TEXTS]
    assert_close(pooled(tmp_path, ",pooling=last"), [row / np.linalg.norm(row) for row in rows])


def test_an_option_of_another_width_than_the_dense_layer_takes_is_refused(tmp_path):
    weights = {"linear.weight": torch.zeros(8, 64), "linear.bias": torch.ones(8)}
    pooling = ("Pooling", {"pooling_mode": ["mean", "max"]}, None)
    save_folder(tmp_path, [pooling, ("Dense", {"in_features": 64, "out_features": 8}, weights)])
    with pytest.raises(EncoderError, match=naming("pooling 32 64")):
        opened(tmp_path, ",pooling=mean")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "name",
    ["CLIPModel", "Router", "Asym", "WordEmbeddings", "CNN", "LSTM", "WeightedLayerPooling", "BoW", "StaticEmbedding"],
)
def test_modules_that_are_not_done_are_refused_by_name(name, tmp_path):
    save_folder(tmp_path, [(name, {}, None), ("Pooling", {"pooling_mode": "mean"}, None)])
    with pytest.raises(EncoderError, match=name):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"pooling_mode": "attention"}, "attention"),
        ({"pooling_mode_attention_tokens": True}, "pooling_mode_attention_tokens"),
    ],
)
def test_poolings_that_are_not_known_are_refused_by_name(settings, what, tmp_path):
    save_folder(tmp_path, [("Pooling", settings, None)])
    with pytest.raises(EncoderError, match=what):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"activation_function": "mine.Swish"}, "Swish"),
        ({"module_input_name": "token_embeddings"}, "token_embeddings"),
        ({"weights": "pickle"}, "model.safetensors"),
    ],
)
def test_a_dense_layer_that_is_not_done_is_refused(settings, what, tmp_path):
    weights = None if "weights" in settings else {"linear.weight": torch.zeros(8, 32), "linear.bias": torch.zeros(8)}
    dense = ("Dense", {"in_features": 32, "out_features": 8, **settings}, weights)
    save_folder(tmp_path, [("Pooling", {"pooling_mode": "mean"}, None), dense])
    with pytest.raises(EncoderError, match=naming(what)):
        opened(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"transformer_task": "fill-mask"}, {"processing_kwargs": {"text": {"padding": "max_length"}}}]
)
def test_a_transformer_that_is_not_done_is_refused(settings, tmp_path):
    save_folder(tmp_path, [("Pooling", {"pooling_mode": "mean"}, None)])
    write(tmp_path / "sentence_bert_config.json", settings)
    with pytest.raises(EncoderError, match=naming(next(iter(settings)))):
        opened(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("modes", [("mean",), ("lasttoken",), ("cls", "weightedmean")])
def test_vectors_are_those_of_the_library(kind, modes, tmp_path):
    """Of sentence-transformers itself, where it is installed: the same numbers, to the last bit."""
    library = pytest.importorskip("sentence_transformers")
    generator = torch.Generator().manual_seed(0)
    width = 32 * len(modes)
    weights = {"linear.weight": torch.randn(16, width, generator=generator), "linear.bias": torch.ones(16)}
    dense = ("Dense", {"in_features": width, "out_features": 16, "bias": True}, weights)
    flags = {flag: mode in modes for mode, flag in FLAGS.items()}
    pooling = {"word_embedding_dimension": 32, **flags}
    save_folder(tmp_path, [("Pooling", pooling, None), dense, ("Normalize", None, None)], kind)
    (tmp_path / "3_Normalize").rmdir()
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    assert_close(pooled(tmp_path), list(theirs.astype(np.float64)))
