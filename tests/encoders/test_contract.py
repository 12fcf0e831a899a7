"""What every encoder promises, checked on one or more models of each family."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cachefuse.encoders import FAMILIES, open_encoder
from fixtures.runs import reseal

# Batches of another size or padding change the order of sums, not more: float32 rounding on values around 1.
ROUNDING = 2e-5


def test_every_family_has_a_case(makers):
    assert {name.partition("-")[0] for name in makers} == set(FAMILIES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixed_precision_on_cuda_changes_little(case, samples):
    """Half precision rounds at about 1e-3: the direction of every feature stays."""
    for modality, tower in open_encoder(case.spec, "cuda").items():
        ours, reference = (encode(x, samples, ("pooled",))["pooled"] for x in (tower, case.towers[modality]))
        cosine = (ours * reference).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(reference, axis=1)
        assert cosine.min() > 0.999


def encode(tower, samples, views=None):
    batch = [tower.prepare(sample) for sample in samples[tower.modality]]
    return tower.encode(batch, views or tower.views)


def test_shapes_and_types(case, samples):
    for modality, tower in case.towers.items():
        assert tower.modality == modality
        features = encode(tower, samples)
        assert set(features) == set(tower.views)
        assert ("pooled" in tower.views) == (tower.width > 0)
        if "pooled" in tower.views:
            assert features["pooled"].shape == (6, tower.width)
            assert features["pooled"].dtype == np.float32
            assert np.isfinite(features["pooled"]).all()
        lengths = [tower.length(tower.prepare(sample)) for sample in samples[modality]]
        assert bool({"ids", "ngrams"} & {*tower.views}) == (tower.vocabulary > 0)
        if "ngrams" in tower.views:
            for row in features["ngrams"]:
                assert (row.shape, row.dtype) == ((len(row), 2), np.int32)
                assert (np.diff(row[:, 0]) > 0).all()
                assert row[:, 0].min() >= 0
                assert row[:, 0].max() < tower.vocabulary
                assert row[:, 1].min() >= 1
        if "ids" in tower.views:
            assert [(ids.shape, ids.dtype) for ids in features["ids"]] == [((n,), np.int32) for n in lengths]
            assert all(0 <= ids.min() <= ids.max() < tower.vocabulary for ids in features["ids"])
        if "tokens" not in tower.views:
            assert tower.token_shape is None
            continue
        tokens = features["tokens"]
        assert [len(row) for row in tokens] == (lengths if tower.ragged else [tokens.shape[1]] * 6)
        assert {row.shape[1] for row in tokens} == {tower.token_shape[1]}
        assert tower.ragged or tokens.shape[1:] == tower.token_shape
        assert all(row.dtype == np.float32 for row in tokens)


def test_only_the_views_asked_for_come_and_are_the_same(case, samples):
    for tower in case.towers.values():
        both = encode(tower, samples)
        for view in tower.views:
            alone = encode(tower, samples, (view,))
            assert list(alone) == [view]
            for one, other in zip(alone[view], both[view], strict=True):
                np.testing.assert_allclose(one, other, atol=ROUNDING)


def test_ids_alone_need_no_model(case, samples, monkeypatch):
    for tower in case.towers.values():
        if "ids" in tower.views:
            both = encode(tower, samples)["ids"]
            monkeypatch.setattr(tower, "model", None)
            for one, other in zip(encode(tower, samples, ("ids",))["ids"], both, strict=True):
                np.testing.assert_array_equal(one, other)


def test_samples_differ_and_encoding_again_gives_the_same(case, samples):
    again = open_encoder(case.spec)
    for modality, tower in case.towers.items():
        view = tower.views[0]
        rows = encode(tower, samples, (view,))[view]
        assert len({row.round(4).tobytes() for row in rows}) == 6
        for row, other in zip(rows, encode(again[modality], samples, (view,))[view], strict=True):
            np.testing.assert_array_equal(row, other)


def test_a_row_does_not_depend_on_its_batch(case, samples, batch_effect):
    """Pooled and tokens, in float32 on the CPU: sums in another order, which measure 9e-7 at most."""
    for modality, tower in case.towers.items():
        assert batch_effect(tower, samples[modality]) < 1e-5


def test_prepare_is_safe_in_threads(case, samples):
    for modality, tower in case.towers.items():
        expected = [tower.prepare(sample) for sample in samples[modality]]
        with ThreadPoolExecutor(8) as pool:
            prepared = list(pool.map(tower.prepare, samples[modality] * 16))
        for i, one in enumerate(prepared):
            assert np.array_equal(one, expected[i % 6]) if modality == "image" else one == expected[i % 6]


def test_provenance_names_no_path_and_survives_a_move(case, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(case.folder, moved)
    towers = open_encoder(case.spec.replace(str(case.folder), str(moved)))
    for modality, tower in case.towers.items():
        assert all(isinstance(text, str) for item in tower.provenance.items() for text in item)
        assert "/" not in "".join(tower.provenance.values())
        assert dict(towers[modality].provenance) == dict(tower.provenance)


def test_provenance_sees_one_weight_change(case, tmp_path):
    if case.name in ("classic", "lexical"):  # they have none
        return
    moved = tmp_path / "moved"
    shutil.copytree(case.folder, moved)
    (path,) = moved.glob("runs/*/*.safetensors" if case.name == "aligned" else "*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    used = [name for name in weights if not name.startswith(("decoder.", "head.", "fc."))]
    largest = max(used, key=lambda name: weights[name].numel())
    weights[largest].view(-1)[0] += 0.1
    save_file(weights, path, metadata)
    if case.name == "aligned":
        reseal(path.parent)
    for modality, tower in open_encoder(case.spec.replace(str(case.folder), str(moved))).items():
        assert tower.provenance["weights"] != case.towers[modality].provenance["weights"]


def test_models_are_frozen(case):
    for tower in case.towers.values():
        model = getattr(tower, "model", None)
        if model is not None:
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
