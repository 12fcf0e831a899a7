"""Heads over token features: fixed and ragged ones, from the store to a prediction of raw samples."""

import numpy as np
import pytest
import torch

from cachefuse.data.readers.base import Samples
from cachefuse.errors import CacheError, ConfigError, RunError
from cachefuse.feature_spec import FLAT
from cachefuse.runs.predict import predict_samples, predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.rows import FlatTokens
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table, one_view, select_features
from fixtures.columns import columns, images_of, texts_of
from fixtures.messages import naming
from fixtures.runs import edit

side_by_side = one_view(FLAT)
TOKENS = TrainConfig(views="tokens", head="gmlp", layers=(8,), epochs=2, batch_size=16)


def test_tokens_lie_side_by_side_with_zeros_where_a_text_is_shorter(captioned_store):
    table = load_table(captioned_store, select_features(captioned_store, views=side_by_side), side_by_side)
    index = torch.tensor([3, 0, 70])
    for modality, features in table.features.items():
        (stored,) = select_features(captioned_store, views=side_by_side)[modality]
        rows = stored.rows("tokens")
        longest = max(len(rows[row]) for row in range(len(rows)))
        assert features.shape == (72, longest * rows.shape[-1])
        assert features.n_tokens == longest
        spec = table.specs[modality]
        assert (spec.view, spec.width, spec.n_tokens) == (FLAT, features.shape[1], longest)
        for row, flat in zip(index.tolist(), features.index_select(0, index).numpy(), strict=True):
            tokens = rows[row]
            np.testing.assert_array_equal(flat[: tokens.size], tokens.reshape(-1))
            assert not flat[tokens.size :].any()
    ragged = select_features(captioned_store, views=side_by_side)["text"][0].rows("tokens")
    cut = FlatTokens(ragged, n_tokens=2)
    np.testing.assert_array_equal(cut.index_select(0, index)[1].numpy(), ragged[0][:2].reshape(-1))
    assert FlatTokens(ragged, n_tokens=99).index_select(0, index).shape == (3, 99 * ragged.shape[-1])


@pytest.mark.parametrize("fusion", ["sum", "gated", "text", "concat"])
@pytest.mark.one_in(2)
def test_a_run_on_tokens_predicts_stored_and_raw_samples_alike(fusion, captioned_store, captioned, tmp_path):
    run = train_head(captioned_store, TrainConfig(**{**vars(TOKENS), "fusion": fusion}))
    again = load_run(save_run(run, tmp_path / "runs"))
    stored = predict_split(again, captioned_store, "test")
    np.testing.assert_array_equal(stored.scores, predict_split(run, captioned_store, "test").scores)
    rows = np.flatnonzero(captioned_store.splits == "test")
    samples = Samples(
        ids=[captioned.ids[row] for row in rows],
        modalities=columns([images_of(captioned)[row] for row in rows], [texts_of(captioned)[row] for row in rows]),
    )
    np.testing.assert_allclose(predict_samples(again, samples).scores, stored.scores, atol=2e-3)
    tokens = {m: [used.tokens for used in group] for m, group in again.features.items()}
    assert tokens == ({"text": [14]} if fusion == "text" else {"image": [4], "text": [14]})
    gates = [name for name, _ in run.members[0].model.named_modules() if name.endswith("gate.linear")]
    widths = {run.members[0].model.get_submodule(name).in_features for name in gates}
    assert widths == {"text": {14}, "concat": {4}}.get(fusion, {4, 14})


def test_says_what_tokens_need(captioned_store, make_store):
    pooled = make_store({"text": np.eye(4, dtype=np.float16)}, np.array([0, 1, 0, 1]), ["train"] * 4, task="multiclass")
    with pytest.raises(CacheError, match=naming("tokens --views pooled,tokens")):
        train_head(pooled, TOKENS)
    chosen = select_features(captioned_store, views=side_by_side)
    twice = {"text": chosen["text"] * 2}
    with pytest.raises(ConfigError, match=naming("text tokens --encoder")):
        load_table(captioned_store, twice, side_by_side)


@pytest.mark.parametrize("tokens", [11, -1, 10**9])
def test_a_number_of_tokens_edited_into_nonsense_is_refused(tokens, captioned_store, tmp_path):
    path = save_run(train_head(captioned_store, TOKENS), tmp_path / "runs")
    edit(path / "run.json", lambda values: values["members"][0]["features"]["text"][0].update(tokens=tokens))
    with pytest.raises(RunError, match=naming("run.json tokens")):
        load_run(path)
