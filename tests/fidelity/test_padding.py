"""A row's features do not depend on its batch, of any architecture: what opening finds, and what follows from it."""

import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from cachefuse.encoders import open_encoder
from cachefuse.errors import BadSampleError, EncoderError
from fixtures.hf_models import TEXT_SIZES, WORDS, save_model, save_tokenizer
from fixtures.messages import naming

# How far features of a text alone are from those beside a long one, in parts of the largest, if all are padded:
# fnet .79, canine .26, convbert .09, nystromformer 1.1, reformer .20, yoso .30. The others: 3e-7 at most.
PADDED = ("bert", "deberta-v2", "gpt2", "longformer", "t5", "xlnet")
EQUAL = ("fnet", "canine", "convbert", "nystromformer", "reformer", "yoso")


def opened(folder):
    (tower,) = open_encoder(f"hf:{folder}").values()
    return tower


def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS[:10], n)) for n in (3, 40, 3, 3, 11, 40, 1)]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("cachefuse")]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", EQUAL + PADDED)
def test_texts_are_padded_only_where_it_does_not_show(kind, tmp_path, caplog):
    save_model(kind, tmp_path)
    with caplog.at_level(logging.WARNING, "cachefuse.encoders"):
        tower = opened(tmp_path)
    assert tower.together == ("equal lengths" if kind in EQUAL else "all")
    said = messages(caplog)
    assert len(said) == (kind in EQUAL)
    assert all("equal length" in line and type(tower.model).__name__ in line for line in said)
    prepared = [tower.prepare(text) for text in texts()]
    together = tower.encode(prepared, tower.views)
    for i, one in enumerate(prepared):
        alone = tower.encode([one], tower.views)
        for view in tower.views:
            expected = alone[view][0]
            assert together[view][i].shape == expected.shape
            assert np.abs(together[view][i] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert messages(caplog) == said  # once


@pytest.mark.parametrize("kind", ["convbert", "fnet"])
def test_padding_would_show(kind, tmp_path):
    """What the probe is for: without it, these features are others."""
    save_model(kind, tmp_path)
    tower = opened(tmp_path)
    prepared = [tower.prepare(text) for text in texts()]
    alone = tower.encode(prepared[:1], ("pooled",))["pooled"][0]
    tower.together = "all"
    assert np.abs(tower.encode(prepared, ("pooled",))["pooled"][0] - alone).max() > 1e-3 * np.abs(alone).max()


def test_images_whose_batch_shows_are_encoded_alone(tmp_path):
    """Pixtral takes all images of a batch as one sequence."""
    save_model("pixtral", tmp_path)
    tower = opened(tmp_path)
    assert tower.together == "one"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    prepared = [tower.prepare(image) for image in images]
    together = tower.encode(prepared, tower.views)
    for i, one in enumerate(prepared):
        alone = tower.encode([one], tower.views)
        for view in tower.views:
            np.testing.assert_array_equal(together[view][i], alone[view][0])


@pytest.mark.slow
def test_a_text_that_is_too_short_for_its_model_is_a_bad_sample(tmp_path):
    """CANINE shortens texts by 4."""
    save_model("canine", tmp_path)
    tower = opened(tmp_path)
    assert tower.encode([tower.prepare("ab")], ("pooled",))["pooled"].shape == (1, 32)
    with pytest.raises(BadSampleError, match=naming("3 tokens 4")):
        tower.prepare("a")


LSH = {"attn_layers": ["lsh", "local"], "lsh_attn_chunk_length": 128, "num_buckets": 4, "hash_seed": None}
LOCAL = {"attn_layers": ["local", "local"]}
CHUNKS = {"local_attn_chunk_length": 128, "axial_pos_embds": False, "max_position_embeddings": 1024}
WINDOW = {"attention_window": 64, "max_position_embeddings": 514}
SPARSE = {"attention_type": "block_sparse", "block_size": 8, "num_random_blocks": 2, "max_position_embeddings": 512}


def save_other(kind, folder, options):
    """Save the small model of a type with other settings, and return what loads it afresh."""
    known = transformers.AutoConfig.for_model(kind).to_dict()
    config = transformers.AutoConfig.for_model(
        kind, **{**{name: size for name, size in TEXT_SIZES.items() if isinstance(known.get(name), int)}, **options}
    )
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)

    def fresh():
        model = transformers.AutoModel.from_pretrained(folder).eval()
        return model.get_encoder() if config.is_encoder_decoder else model

    return fresh


@pytest.mark.parametrize(
    ("kind", "options"),
    [("reformer", {**LOCAL, **CHUNKS}), ("big_bird", SPARSE), ("bigbird_pegasus", SPARSE), ("longformer", WINDOW)],
)
@pytest.mark.one_in(2)
def test_long_texts_are_tried_before_they_are_encoded(kind, options, tmp_path):
    """Opening tries short texts. These models read longer ones in chunks, or BigBird sparsely, in place of itself."""
    fresh = save_other(kind, tmp_path, options)
    tower = opened(tmp_path)
    assert tower.together == "all"
    samples = [" ".join(WORDS[(i * n) % 7] for i in range(n)) for n in (5, 300, 200, 100, 300, 5)]
    rows = tower.encode([tower.prepare(text) for text in samples], ("pooled",))["pooled"]
    assert tower.together == ("all" if kind == "longformer" else "equal lengths")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, row in zip(samples, rows, strict=True):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            expected = fresh()(**inputs).last_hidden_state[0].double().mean(0).numpy()
        assert np.abs(row - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_model_that_is_random_for_long_texts_is_refused_with_them(tmp_path):
    save_other("reformer", tmp_path, {**LSH, **CHUNKS})
    tower = opened(tmp_path)
    long = tower.prepare(" ".join(WORDS[i % 7] for i in range(300)))
    for batch, names in (([long], "ReformerModel different"), ([long] * 2, "ReformerModel different 62 tokens")):
        for _ in range(2):
            with pytest.raises(EncoderError, match=naming(names)):
                tower.encode(batch, ("pooled",))
    assert tower.encode([tower.prepare("water")], ("pooled",))["pooled"].shape[0] == 1


def test_a_model_that_changes_itself_says_so_in_its_key(tmp_path):
    save_other("big_bird", tmp_path, SPARSE)
    key = dict(opened(tmp_path).provenance)
    assert key.pop("passes")
    save_other("big_bird", tmp_path, {**SPARSE, "attention_type": "original_full"})
    assert dict(opened(tmp_path).provenance).keys() == key.keys()
