"""Samples that share images, as questions about one do: its features are kept once, and every sample finds them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.plan import plan
from cachefuse.extraction.verify import repair, verify
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TrainingData
from cachefuse.training.selection import load_table, one_view
from fixtures.columns import columns, images_of, texts_of, with_columns
from fixtures.messages import naming

N_IMAGES = 90  # two blocks of rows


def numbers_of(n):
    """Which image each of n questions is about: three an image, but now and then one about the first."""
    return [0 if i % 50 == 49 else i // 3 for i in range(n)]


def make(tools, shapes, n=3 * N_IMAGES, bad=None, texts=None, numbers=None):
    numbers = numbers_of(n) if numbers is None else numbers
    images = [None if (bad or {}).get(i) == "none" else tools.FakeImage(i, (bad or {}).get(i, "")) for i in numbers]
    texts = [(f"question {i} about {image}",) for i, image in enumerate(numbers)] if texts is None else texts
    return tools.make_dataset(shapes, images=images, texts=texts, shared=True)


@pytest.fixture
def questions(shapes, tools):
    return make(tools, shapes)


def run(dataset, store_path, *encoders, **options):
    options = {"views": ("pooled", "tokens"), "batch_size": 8, **options}
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def open_image(store_path, encoder="toy"):
    return FeatureStore(store_path).open_features(encoder, "image")


def assert_found(store_path, dataset, view="pooled"):
    """Check that every sample's row is that of its own image."""
    store, tower = FeatureStore(store_path), open_encoder("toy")["image"]
    stored = store.open_features("toy", "image").read(view)
    rows = store.feature_rows("image")
    for i, image in enumerate(images_of(dataset)):
        prepared = [tower.prepare(image.load())] if image is not None and not image.bad else []
        expected = tower.encode(prepared, (view,))[view][0] if prepared else np.zeros_like(stored[0])
        np.testing.assert_array_equal(stored[rows[i]], expected)


def test_an_image_is_encoded_and_kept_once(questions, store_path, toy):
    report = run(questions, store_path)
    assert report.rows == report.computed == {("toy", "image"): N_IMAGES, ("toy", "text"): 270}
    assert sum(len(batch) for modality, batch, _ in toy.batches if modality == "image") == N_IMAGES
    features = open_image(store_path)
    assert features.n_rows == len(features.rows()) == N_IMAGES
    for view in ("pooled", "tokens"):
        assert_found(store_path, questions, view)


def test_the_rows_of_samples(questions, store_path, toy):
    run(questions, store_path)
    store = FeatureStore(store_path)
    expected = np.array(numbers_of(270))
    rows = store.feature_rows("image")
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(store.feature_rows("image", np.array([269, 0, 49])), expected[[269, 0, 49]])
    np.testing.assert_array_equal(store.feature_rows("text"), np.arange(270))
    np.testing.assert_array_equal(store.feature_rows("text", np.array([269, 3])), [269, 3])
    assert store.shared_rows("text") is None
    assert (store.n_items("image"), store.n_items("text")) == (N_IMAGES, 270)
    assert store.sample_of("image", 2) == "row-6"
    np.testing.assert_array_equal(zarr.open_group(store_path, mode="r")["samples/rows/image"][:], expected)


def test_samples_with_rows_of_their_own(shapes, store_path, toy, tools):
    texts = [("a", "b")] * 80
    run(tools.make_dataset(shapes, images=[tools.FakeImage(1)] * 80, texts=texts), store_path)
    store = FeatureStore(store_path)
    np.testing.assert_array_equal(store.feature_rows("image"), np.arange(80))  # equal images, not said to be shared
    assert store.open_features("toy", "image").n_rows == 80
    with pytest.raises(ConfigError, match=naming("small texts")):
        store.feature_rows("text")
    assert not (store_path / "samples" / "rows").exists()


def test_a_second_extract_computes_nothing_and_writes_nothing(questions, store_path, toy, tools):
    run(questions, store_path)
    before = tools.files(store_path)
    assert not any(run(questions, store_path).computed.values())
    assert tools.files(store_path) == before


@pytest.mark.parametrize("n_batches", [3, 10, 12, 20])
@pytest.mark.one_in(4)
def test_an_interrupted_run_ends_with_the_same_bytes(questions, same_when_interrupted, n_batches):
    same_when_interrupted(lambda path: run(questions, path), n_batches)


def test_a_plan_counts_images_once(questions, store_path, toy):
    planned = plan(questions, ["toy"], store_path, device="cpu")
    assert [(view.modality, view.rows, view.pending) for view in planned.views] == [
        ("image", N_IMAGES, N_IMAGES), ("text", 270, 270),
    ]  # fmt: skip
    run(questions, store_path)
    assert [view.pending for view in plan(questions, ["toy"], store_path, device="cpu").views] == [0, 0]


def test_a_trial_has_the_images_of_its_samples(questions, store_path, toy):
    few = questions.limit(30)
    run(few, store_path)
    assert open_image(store_path).n_rows == 10
    assert_found(store_path, few)


# Rows that come, and samples that change


def test_questions_that_come_read_the_images_that_are_there(shapes, store_path, toy, tools):
    n = 3 * N_IMAGES
    numbers = [*numbers_of(n), 5, 5, 0, 200, 201, 200]
    grown = make(tools, shapes, numbers=numbers)
    run(tools.head(grown, n), store_path)
    before = open_image(store_path).read()
    assert run(grown, store_path).computed == {("toy", "image"): 2, ("toy", "text"): 6}
    np.testing.assert_array_equal(open_image(store_path).read()[:N_IMAGES], before)
    assert FeatureStore(store_path).feature_rows("image")[n:].tolist() == [5, 5, 0, 90, 91, 90]
    assert_found(store_path, grown)


def test_questions_that_come_without_a_new_image(shapes, store_path, toy, tools):
    n = 3 * N_IMAGES
    grown = make(tools, shapes, numbers=[*numbers_of(n), 5, 5, 0])
    run(tools.head(grown, n), store_path)
    assert run(grown, store_path).computed == {("toy", "image"): 0, ("toy", "text"): 3}
    more = make(tools, shapes, numbers=[*numbers_of(n), 5, 5, 0, 300])
    assert run(more, store_path).computed == {("toy", "image"): 1, ("toy", "text"): 1}
    assert_found(store_path, more)


def test_refresh_computes_an_image_once_for_all_its_questions(questions, store_path, toy):
    run(questions, store_path)
    texts = [("another question",) if i in (3, 5, 200) else text for i, text in enumerate(texts_of(questions))]
    changed = with_columns(questions, texts=texts)
    with pytest.raises(CacheError, match=naming("3 row-3 row-5 row-200 --refresh")):
        run(changed, store_path)
    assert run(changed, store_path, refresh=True).computed == {("toy", "image"): 2, ("toy", "text"): 3}
    assert_found(store_path, changed)


def test_a_question_about_another_image_is_refused(shapes, store_path, toy, tools):
    run(make(tools, shapes), store_path)
    numbers = numbers_of(270)
    numbers[100] = 7
    with pytest.raises(CacheError, match="image"):
        run(make(tools, shapes, numbers=numbers), store_path, refresh=True)


@pytest.mark.parametrize("first", [True, False])
def test_images_that_come_to_be_shared_are_refused(questions, store_path, toy, first):
    run(replace(questions, modalities=columns(images_of(questions), texts_of(questions), first)), store_path)
    with pytest.raises(CacheError, match="images"):
        run(replace(questions, modalities=columns(images_of(questions), texts_of(questions), not first)), store_path)


# Images that can't be used


def test_a_bad_image_is_absent_from_every_question_about_it(shapes, store_path, toy, tools):
    dataset = make(tools, shapes, bad={4: "is damaged", 70: "none", 71: "none"})
    report = run(dataset, store_path)
    about = [i for i, number in enumerate(numbers_of(270)) if number in (4, 70, 71)]
    assert [(line.id, line.modality, line.reason) for line in report.bad] == [
        (f"row-{i}", "image", "is damaged" if i < 100 else "has no image") for i in about
    ]
    store = FeatureStore(store_path)
    np.testing.assert_array_equal(np.flatnonzero(~store.present("image")), about)
    assert store.n_items("image") == N_IMAGES - 1  # those without an image share a row
    np.testing.assert_array_equal(np.flatnonzero(~store.present_rows("image")), [4, 70])
    assert_found(store_path, dataset)
    assert [view.zero for view in verify(store).views] == [0, 0, 0, 0]


def test_too_many_questions_about_bad_images_are_an_error(shapes, store_path, toy, tools):
    dataset = make(tools, shapes, numbers=[0] * 30 + list(range(1, 71)), bad={0: "is damaged"})
    with pytest.raises(CacheError, match=naming("30 100 image 5%")):
        run(dataset, store_path)


def test_questions_that_come_about_a_bad_image_are_listed_too(shapes, store_path, toy, tools):
    numbers = [*numbers_of(270), 4, 5]
    grown = make(tools, shapes, numbers=numbers, bad={4: "is damaged"})
    run(tools.head(grown, 270), store_path)
    report = run(grown, store_path)
    assert report.computed == {("toy", "image"): 0, ("toy", "text"): 2}
    store = FeatureStore(store_path)
    assert np.flatnonzero(~store.present("image")).tolist() == [12, 13, 14, 270]
    assert [(line.id, line.reason) for line in store.bad_samples()] == [
        (f"row-{i}", "is damaged") for i in (12, 13, 14, 270)
    ]
    mended = make(tools, shapes, numbers=numbers)
    assert not any(run(mended, store_path).computed.values())  # FakeImage's digest does not tell that it was mended


def test_a_bad_image_that_is_mended_is_there_for_every_question(shapes, store_path, toy, tools, monkeypatch):
    fake = type(tools.FakeImage(0))
    monkeypatch.setattr(fake, "fingerprint", lambda image: f"{image.number} {image.bad}")
    monkeypatch.setattr(fake, "digest", lambda image: f"{image.number} {image.bad}")
    run(make(tools, shapes, bad={4: "is damaged"}), store_path)
    mended = make(tools, shapes)
    assert run(mended, store_path, refresh=True).computed == {("toy", "image"): 1, ("toy", "text"): 3}
    store = FeatureStore(store_path)
    assert store.present("image").all()
    assert store.bad_samples() == []
    assert_found(store_path, mended)


def test_a_question_that_changes_leaves_the_others_image_bad(shapes, store_path, toy, tools):
    dataset = make(tools, shapes, bad={4: "is damaged"})
    run(dataset, store_path)
    texts = [("another question",) if i == 13 else text for i, text in enumerate(texts_of(dataset))]
    run(with_columns(dataset, texts=texts), store_path, refresh=True)
    store = FeatureStore(store_path)
    assert np.flatnonzero(~store.present("image")).tolist() == [12, 13, 14]
    assert sorted(line.id for line in store.bad_samples()) == ["row-12", "row-13", "row-14"]


# Damage


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_damaged_rows_of_samples_are_found_and_mended(questions, store_path, toy, tools, how):
    run(questions, store_path)
    before = tools.files(store_path)
    folder = store_path / "samples" / "rows" / "image"
    if how == "gone":
        shutil.rmtree(folder)
    else:
        (chunk,) = [path for path in (folder / "c").rglob("*") if path.is_file()]
        data = bytearray(chunk.read_bytes())
        data[12] ^= 4
        chunk.write_bytes(data)
    with pytest.raises(CacheError, match="samples/rows/image"):
        FeatureStore(store_path).feature_rows("image")
    found = verify(FeatureStore(store_path))
    assert ("", "samples/rows/image", None) in [(damage.modality, damage.view, damage.block) for damage in found.damage]
    repair(FeatureStore(store_path), found, questions, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()
    assert tools.files(store_path) == before


def test_a_damaged_block_of_images_is_computed_again(questions, store_path, toy):
    run(questions, store_path)
    shard = open_image(store_path).path / "pooled" / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 4
    shard.write_bytes(data)
    toy.batches.clear()
    repair(FeatureStore(store_path), verify(FeatureStore(store_path)), questions, device="cpu")
    assert {modality for modality, _, _ in toy.batches} == {"image"}
    assert verify(FeatureStore(store_path)).damage == ()
    assert_found(store_path, questions)


# Readers that take one row a sample can't mistake a row for another's


def test_whoever_asks_for_items_is_told(questions, store_path, toy):
    run(questions, store_path)
    store = FeatureStore(store_path)
    with pytest.raises(ConfigError, match=naming("small image")):
        store.items("image")


@pytest.mark.parametrize("view", ["pooled", "flat", "tokens"])
def test_each_question_is_read_with_its_own_image(questions, store_path, toy, view):
    run(questions, store_path)
    store = FeatureStore(store_path)
    table = load_table(store, {"image": [open_image(store_path)]}, one_view(view))
    (name,) = table.features
    stored = open_image(store_path).read("pooled" if view == "pooled" else "tokens")[store.feature_rows("image")]
    found = table.batch(torch.arange(len(store)))[0][name].numpy()
    np.testing.assert_array_equal(found, stored.reshape(found.shape))


def test_folds_keep_an_image_together_and_no_image_is_none(questions, store_path, toy, shapes, tools):
    run(make(tools, shapes, bad={0: "none"}), store_path)
    store = FeatureStore(store_path)
    training = TrainingData.of(store, load_table(store, {"text": [store.open_features("toy", "text")]}))
    rows = torch.arange(len(store))
    folds, images = training.folds(rows, 5, 0).numpy(), store.feature_rows("image")
    alone = ~store.present("image")
    assert alone.any()
    for image in np.unique(images[~alone]):
        assert len({*folds[images == image]}) == 1
    assert len({*folds[alone]}) > 1
    assert training.n_groups(rows) == len(np.unique(images[~alone])) + alone.sum()
