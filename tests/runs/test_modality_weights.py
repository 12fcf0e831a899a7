"""How much each modality counts in a fusion of tokens, and what is left where one is taken away with its tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cachefuse.errors import ConfigError, UnknownNameError
from cachefuse.metrics import METRICS
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming

CMA = TrainConfig(
    fusion="cma", fusion_options={"depth": 1, "width": 8, "heads": 2, "dropout": 0.0}, head="linear", dropout=0.0,
    epochs=8, lr=0.02, batch_size=16,
)  # fmt: skip
MODALITIES = ("image", "text")


@pytest.fixture(scope="module")
def data(make_data, tmp_path_factory):
    """120 rows with 3 tokens an image, and texts of 0 to 4; rows 3, 62, 95 lack the image, 4, 63, 95 the text."""
    path = tmp_path_factory.mktemp("weights") / "made.zarr"
    data = make_data(path)
    rng = np.random.default_rng(1)
    n = len(data.hot)
    data.tokens = {
        "image": [rng.normal(size=(3, 4)).astype(np.float16) for _ in range(n)],
        "text": [rng.normal(size=(row % 5, 3)).astype(np.float16) for row in range(n)],
    }
    for modality, rows in data.tokens.items():
        made_by = {"dtype": "float16", "family": "made up"}
        features = data.store.require_features("toy", modality, made_by, "toy", {"tokens": "float16"})
        ragged = modality == "text"
        shape = (2, 3) if ragged else (3, 4)
        features.begin(features.new_view("tokens", shape, ragged=ragged, dtype="float16"))
        with ViewWriter(features, "tokens", ragged=ragged, dtype="float16") as writer:
            for block in features.pending("tokens"):
                numbers = np.array(features.rows_of("tokens", block))
                writer.add(numbers, [rows[row] for row in numbers])
    data.store = FeatureStore(path)
    return data


@pytest.fixture(scope="module")
def run(data):
    return train_head(data.store, CMA)


def of_row(member, data, row, gone=()):
    """One row as a member's model reads it, by itself: no padding, and nothing of what it lacks."""
    features, present = {}, {}
    for m in MODALITIES:
        here = bool(data.store.present(m)[row]) and m not in gone
        features[m] = torch.from_numpy(data.x[m][row : row + 1])
        present[m] = torch.tensor([here])
        tokens = torch.from_numpy(data.tokens[m][row])[None]
        if not here or not tokens.shape[1]:
            tokens = torch.full((1, 1, tokens.shape[2]), torch.nan)
        features[f"{m}_tokens"] = tokens
        present[f"{m}_tokens"] = torch.full(tokens.shape[:2], here and len(data.tokens[m][row]) > 0)
    names = member.model.specs
    return {name: features[name] for name in names}, {name: present[name] for name in names}


@torch.inference_mode()
def one_by_one(member, data, rows, gone=()):
    """Scores (n, C) and weights (n, 2) of some rows."""
    model = member.model.eval()
    given = [of_row(member, data, row, gone) for row in rows]
    scores = torch.cat([model(*one).sigmoid() for one in given])
    return scores.numpy(), torch.cat([model.modality_weights(*one) for one in given]).double().numpy()


@pytest.mark.parametrize("gone", [(), ("text",), ("image",)], ids=str)
def test_figures_and_weights_are_those_of_each_row_by_itself(gone, run, data):
    rows = run.held_out.rows
    scores, weights = one_by_one(run.members[0], data, rows, gone)
    found = evaluate(run, data.store, without=gone, n_resamples=0)
    y = data.hot[rows]
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert found.metrics["macro_ap"] == pytest.approx(METRICS["macro_ap"](y, scores, y), abs=1e-6)
    for m, modality in enumerate(MODALITIES):
        assert found.gates[modality] == pytest.approx(weights[:, m].mean(), abs=1e-6)
        by_class = [weights[positive, m].mean() if positive.any() else np.nan for positive in y.T]
        assert found.gates_per_class[modality] == pytest.approx(by_class, abs=1e-6, nan_ok=True)
    whole = np.isin(rows, (62, 63), invert=True)  # val has a row without its image, and one without its text
    assert (~whole).sum() == 2
    if not gone:
        assert weights[whole].std(axis=0).min() > 0.01  # they differ from row to row
        assert sum(found.gates.values()) == pytest.approx(1)


@pytest.mark.parametrize(("gone", "left"), [("text", "image"), ("image", "text")])
def test_without_a_modality_the_other_counts_alone(gone, left, run, data):
    found = evaluate(run, data.store, without=[gone], n_resamples=0)
    assert found.gates[gone] == 0
    assert not np.nan_to_num(found.gates_per_class[gone]).any()
    assert found.gates[left] == pytest.approx(data.store.present(left)[run.held_out.rows].mean())
    assert found.without == (gone,)


def test_no_token_of_what_is_without_is_read(data, monkeypatch):
    """A run without the text scores as if every text, pooled and token by token, were another."""
    run = train_head(data.store, CMA)
    expected = evaluate(run, data.store, without=["text"], n_resamples=0).scores
    other = replace(run, members=[replace(run.members[0])])
    model, real = other.members[0].model, type(run.members[0].model).standardized

    def spoilt(self, features):
        return real(self, {name: x + 100 if "text" in name else x for name, x in features.items()})

    monkeypatch.setattr(type(model), "standardized", spoilt)
    assert not np.allclose(evaluate(other, data.store, n_resamples=0).scores, expected)
    np.testing.assert_array_equal(evaluate(other, data.store, without=["text"], n_resamples=0).scores, expected)


@pytest.mark.slow
def test_weights_by_folds_and_members_are_their_mean(data):
    run = train_head(data.store, replace(CMA, folds=2, members=2, epochs=3))
    rows = run.held_out.rows
    expected = np.mean([one_by_one(member, data, rows, ["text"])[1] for member in run.members], axis=0)
    found = evaluate(run, data.store, without=["text"], n_resamples=0)
    for m, modality in enumerate(MODALITIES):
        assert found.gates[modality] == pytest.approx(expected[:, m].mean(), abs=1e-6)
    blind = np.zeros_like(found.scores)
    for fold in (0, 1):
        mine = run.held_out.parts == fold
        own = [member for member in run.members if member.fold == fold]
        blind[mine] = np.mean([one_by_one(member, data, rows[mine], ["text"])[0] for member in own], axis=0)
    np.testing.assert_allclose(found.scores, blind, atol=1e-6)


def test_without_modality_attention_what_is_there_counts_alike(data):
    run = train_head(data.store, replace(CMA, ablate=("modality-attention",)))
    present = np.stack([data.store.present(m)[run.held_out.rows] for m in MODALITIES], axis=1)
    expected = (present / present.sum(1, keepdims=True)).mean(0)
    gates = evaluate(run, data.store, n_resamples=0).gates
    assert [gates[m] for m in MODALITIES] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("gone", [(), ("text",)], ids=str)
def test_without_sequence_attention_weights_are_of_pooled_features(gone, data):
    run = train_head(data.store, replace(CMA, ablate=("sequence-attention",)))
    assert sorted(run.features) == ["image", "text"]
    scores, weights = one_by_one(run.members[0], data, run.held_out.rows, gone)
    found = evaluate(run, data.store, without=gone, n_resamples=0)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert [found.gates[m] for m in MODALITIES] == pytest.approx(weights.mean(0), abs=1e-6)


def telling_store(data, path, view):
    """Add features of which one view of the text tells the class, and nothing else does."""
    rng, n = np.random.default_rng(2), len(data.store)
    for modality in MODALITIES:
        made_by = {"dtype": "float16", "family": "told"}
        views = {"pooled": "float16", "tokens": "float16"}
        features = data.store.require_features("told", modality, made_by, "told", views)
        for name, shape in (("pooled", (n, 7)), ("tokens", (n, 2, 7))):
            values = rng.normal(size=shape)
            if (modality, name) == ("text", view):
                told = 3 * np.eye(7)[np.maximum(data.store.targets, 0)]
                values = 0.3 * values + (told if name == "pooled" else told[:, None])
            values = values.astype(np.float16)
            features.begin(features.new_view(name, shape[1:], ragged=False, dtype="float16"))
            with ViewWriter(features, name, ragged=False, dtype="float16") as writer:
                for block in features.pending(name):
                    numbers = np.array(features.rows_of(name, block))
                    writer.add(numbers, list(values[numbers]))
    return FeatureStore(path)


def test_relevance_leans_to_the_modality_that_tells_the_labels(make_data, tmp_path):
    path = tmp_path / "made.zarr"
    store = telling_store(make_data(path, task="multiclass"), path, "pooled")
    run = train_head(store, replace(CMA, ablate=("sequence-attention",), epochs=30), encoders=["told"])
    assert evaluate(run, store, n_resamples=0).gates["text"] > 0.7


def test_what_tokens_tell_is_lost_with_their_modality(make_data, tmp_path):
    path = tmp_path / "made.zarr"
    store = telling_store(make_data(path, task="multiclass"), path, "tokens")
    run = train_head(store, replace(CMA, epochs=30), encoders=["told"])
    accuracy = {m: evaluate(run, store, without=[m], n_resamples=0).metrics["accuracy"] for m in MODALITIES}
    assert evaluate(run, store, n_resamples=0).metrics["accuracy"] > 0.9
    assert accuracy["image"] > 0.8  # the text's own class token has seen them
    assert accuracy["text"] < 0.5


def test_an_ensemble_has_the_weights_of_those_that_weigh(run, data):
    plain = train_head(data.store, TrainConfig(head="linear", epochs=3))
    gated = train_head(data.store, TrainConfig(fusion="gated", head="linear", epochs=3))
    alone = evaluate(run, data.store, n_resamples=0).gates
    assert evaluate(ensemble([plain, run], data.store), data.store, n_resamples=0).gates == pytest.approx(alone)
    both = evaluate(ensemble([gated, run, plain], data.store), data.store, n_resamples=0)
    other = evaluate(gated, data.store, n_resamples=0).gates
    assert both.gates == pytest.approx({m: (alone[m] + other[m]) / 2 for m in MODALITIES})
    assert evaluate(plain, data.store, n_resamples=0).gates == {}


def test_an_ensemble_without_a_modality(run, data):
    plain = train_head(data.store, TrainConfig(head="linear", epochs=3))
    joined = ensemble([run, plain], data.store)
    found, one, two = (evaluate(x, data.store, without=["text"], n_resamples=0) for x in (joined, run, plain))
    np.testing.assert_allclose(found.scores, (one.scores + two.scores) / 2, atol=1e-6)


def test_a_run_that_was_saved_has_the_same_weights(run, data, tmp_path):
    path = save_run(run, tmp_path / "runs")
    one, two = (evaluate(x, data.store, without=["text"], n_resamples=0) for x in (run, load_run(path)))
    assert one == replace(two, run=one.run)
    assert one.as_dict()["gates"] == two.as_dict()["gates"]


def test_modalities_are_named_not_features(run, data):
    with pytest.raises(UnknownNameError, match=naming("text_tokens image text")):
        evaluate(run, data.store, without=["text_tokens"], n_resamples=0)
    with pytest.raises(ConfigError, match=naming("image text")):
        evaluate(run, data.store, without=["text", "image"], n_resamples=0)


def test_pieces_make_no_difference(run, data, monkeypatch):
    expected = evaluate(run, data.store, n_resamples=0)
    asked = StoreTables([run], data.store, "cpu")(run.members[0])
    assert asked.lengths is not None
    monkeypatch.setattr("cachefuse.training.feature_table.PIECE_FLOATS", 1000)
    found = evaluate(run, data.store, n_resamples=0)
    assert found.gates == pytest.approx(expected.gates)
    assert found.gates_per_class["text"] == pytest.approx(expected.gates_per_class["text"], nan_ok=True)
