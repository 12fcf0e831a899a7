"""What a store must have for a fusion of tokens, and which encoder's are taken."""

from dataclasses import replace

import numpy as np
import pytest

from cachefuse.errors import CacheError, ConfigError
from cachefuse.feature_spec import pooled_specs
from cachefuse.runs.train import train_head
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({}, "made.zarr tokens image --dataset made --encoder toy --views pooled,tokens"),
        ({"image"}, "made.zarr tokens text --dataset made --encoder toy --views pooled,tokens"),
    ],
    ids=["none", "one"],
)  # fmt: skip
def test_a_store_without_tokens_says_how_to_make_them(tokens, message, make_store, cma):
    rng = np.random.default_rng(0)
    x = {m: rng.normal(size=(20, 3)).astype(np.float16) for m in ("image", "text")}
    kept = {m: {"tokens": rng.normal(size=(20, 2, 3)).astype(np.float16)} for m in tokens}
    store = make_store(x, np.ones((20, 2), np.int8), ["train"] * 20, others=kept)
    for encoders in ((), ("toy",)):
        with pytest.raises(CacheError, match=naming(message)):
            train_head(store, cma, encoders=encoders)
    train_head(store, replace(cma, ablate=("sequence-attention",)))  # which reads none
    train_head(store, replace(cma, fusion="sum", fusion_options={}))


def test_every_encoder_that_could_give_tokens_is_named(make_store, add_features, cma):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype(np.float16)
    store = make_store({"text": x}, np.ones((20, 2), np.int8), ["train"] * 20)
    add_features(store, "hf:bert", "text", x, source="hf:/models/bert")
    command = "--dataset made --encoder hf:/models/bert --encoder toy --views pooled,tokens"
    with pytest.raises(CacheError, match=command):
        train_head(store, cma)
    with pytest.raises(CacheError, match=naming("--dataset made --encoder hf:/models/bert --views pooled,tokens")):
        train_head(store, cma, encoders=["bert"])


def test_features_without_tokens_are_left_out_where_others_have_them(token_store, add_features, cma):
    add_features(token_store, "hf:bert", "text", np.ones((60, 4), np.float16))
    chosen = select_features(token_store, views=cma.reads)
    assert {m: [f.encoder for f in group] for m, group in chosen.items()} == {"image": ["toy"], "text": ["toy"]}
    assert train_head(token_store, cma).encoders == (("toy", "image"), ("toy", "text"))


def test_tokens_of_two_encoders_do_not_go_together(token_store, add_features, cma):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(60, 2, 3)).astype(np.float16)
    add_features(token_store, "hf:bert", "text", np.ones((60, 4), np.float16), tokens=tokens)
    with pytest.raises(ConfigError, match=naming("text tokens --encoder")):
        train_head(token_store, cma)
    assert train_head(token_store, cma, encoders=["bert"]).modalities == ("text",)


def test_two_features_of_one_name_are_refused(make_store):
    """The ids of "text" and the pooled features of "text_ids"."""
    x = np.zeros((4, 3), np.float16)
    ids = [np.array([1, 2], np.int32)] * 4
    store = make_store(
        {"text": x, "text_ids": x},
        np.array([0, 1, 0, 1]),
        ["train"] * 4,
        task="multiclass",
        others={"text": {"ids": ids}},
    )

    def views(modality):
        return ("ids",) if modality == "text" else ("pooled",)

    chosen = select_features(store, views=views)
    assert list(chosen) == ["text", "text_ids"]
    with pytest.raises(ConfigError, match=naming("made ids text pooled text_ids")):
        load_table(store, chosen, views)
    one = load_table(store, {"text_ids": chosen["text_ids"]}, views)
    assert one.specs == pooled_specs({"text_ids": 3})
