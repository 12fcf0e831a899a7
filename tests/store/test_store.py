import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr

from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.store.features import Features
from cachefuse.store.format import append_lines, n_damaged_lines, read_lines
from cachefuse.store.samples import BadSample
from cachefuse.store.store import FeatureStore
from cachefuse.workspace import WorkspacePaths
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def pooled(store_path, modality="image", encoder="toy"):
    return FeatureStore(store_path).open_features(encoder, modality).read()


# What is there is not computed again


def test_a_second_extract_computes_nothing(shapes, store_path, toy, tools):
    report = run(shapes, store_path)
    assert report.computed == {("toy", "image"): 80, ("toy", "text"): 80}
    before = tools.files(store_path)
    toy.batches.clear()
    report = run(shapes, store_path)
    assert report.computed == {("toy", "image"): 0, ("toy", "text"): 0}
    assert report.rows == {("toy", "image"): 80, ("toy", "text"): 80}
    assert toy.batches == []
    assert tools.files(store_path) == before


def test_another_encoder_is_added(shapes, store_path, toy):
    run(shapes, store_path)
    toy.batches.clear()
    report = run(shapes, store_path, "classic", "toy")
    assert report.computed[("classic", "image")] == 80
    assert toy.batches == []


def test_tokens_are_added_to_pooled_alone(shapes, store_path, toy):
    run(shapes, store_path)
    before = pooled(store_path)
    toy.batches.clear()
    run(shapes, store_path, views=("pooled", "tokens"))
    assert toy.n_encoded == 160
    np.testing.assert_array_equal(pooled(store_path), before)
    toy.batches.clear()
    run(shapes, store_path, views=("tokens",))
    assert toy.batches == []


def test_views_asked_for_together_are_encoded_in_one_pass(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled", "tokens"), batch_size=16)
    assert {views for _, _, views in toy.batches} == {("pooled", "tokens")}
    assert toy.n_encoded == toy.prepared == 160


def test_appended_rows_alone_are_computed(shapes, store_path, toy, tools):
    grown = tools.make_shapes(test=90)
    small = tools.head(grown, 80)
    run(small, store_path, views=("pooled", "tokens"), batch_size=16)
    before = FeatureStore(store_path).open_features("toy", "text").read("tokens")
    first = {m: pooled(store_path, m) for m in ("image", "text")}
    toy.batches.clear()
    report = run(grown, store_path, views=("pooled", "tokens"), batch_size=16)
    assert report.computed == {("toy", "image"): 70, ("toy", "text"): 70}
    assert toy.n_encoded == 2 * 70
    after = FeatureStore(store_path).open_features("toy", "text").read("tokens")
    for old, new in zip(before, after, strict=False):
        np.testing.assert_array_equal(old, new)
    for modality, rows in first.items():
        np.testing.assert_array_equal(pooled(store_path, modality)[:80], rows)
    fresh = store_path.with_name("fresh.zarr")
    run(grown, fresh, views=("pooled", "tokens"))
    for modality in ("image", "text"):
        np.testing.assert_array_equal(pooled(store_path, modality), pooled(fresh, modality))
    for grown_tokens, tokens in zip(
        after, FeatureStore(fresh).open_features("toy", "text").read("tokens"), strict=True
    ):
        np.testing.assert_array_equal(grown_tokens, tokens)


def test_before_appended_rows_are_computed_reading_says_so(shapes, store_path, toy, tools):
    run(shapes, store_path)
    open_store(store_path, tools.make_shapes(test=25))
    with pytest.raises(CacheError, match=naming("toy image pooled 80 85")):
        pooled(store_path)


def test_labels_and_splits_change_without_computing(shapes, store_path, toy):
    run(shapes, store_path)
    toy.batches.clear()
    targets = shapes.targets.copy()
    targets[0] = 1 - targets[0]
    splits = np.array(["holdout", *shapes.splits[1:]])
    classes = tuple(name.upper() for name in shapes.classes)
    run(replace(shapes, targets=targets, splits=splits, classes=classes), store_path)
    assert toy.batches == []
    store = FeatureStore(store_path)
    np.testing.assert_array_equal(store.targets, targets)
    assert store.splits.tolist() == splits.tolist()
    assert store.classes == classes
    narrower = replace(shapes, targets=targets[:, :3], classes=shapes.classes[:3])
    run(narrower, store_path)
    np.testing.assert_array_equal(FeatureStore(store_path).targets, targets[:, :3])


def test_a_store_knows_its_dataset(shapes, store_path):
    store = open_store(store_path, shapes)
    assert len(store) == 80
    assert store.dataset == "small"
    assert store.manifest == shapes.manifest
    assert store.classes == shapes.classes
    assert store.features() == []
    assert store.open_features("toy", "image") is None
    assert not store.present("sound").any()


def test_removed_rows_are_refused(shapes, store_path, tools):
    open_store(store_path, shapes)
    with pytest.raises(CacheError, match=naming("80 00079")):
        open_store(store_path, tools.head(shapes, 79))


def test_reordered_rows_are_refused(shapes, store_path):
    open_store(store_path, shapes)
    order = ["00001", "00000", *shapes.ids[2:]]
    with pytest.raises(CacheError, match=naming("1 00000 00001")):
        open_store(store_path, replace(shapes, ids=order))


def test_changed_texts_are_refused(shapes, store_path):
    open_store(store_path, shapes)
    texts = [(f"{text[0]}!",) if i in (3, 5) else text for i, text in enumerate(texts_of(shapes))]
    with pytest.raises(CacheError, match=naming("2 00003 00005 --refresh")):
        open_store(store_path, with_columns(shapes, texts=texts))


def test_several_texts_where_all_had_one_are_refused(shapes, store_path, tools):
    open_store(store_path, shapes)
    grown = tools.make_shapes(test=21)
    with pytest.raises(CacheError, match="texts"):
        open_store(store_path, with_columns(grown, texts=[*texts_of(grown)[:-1], ("one", "two")]))


def test_features_made_differently_under_one_name_are_refused(shapes, store_path, toy):
    run(shapes, store_path)
    toy.version = "2"
    with pytest.raises(CacheError, match=naming("toy image weights 1 2")):
        run(shapes, store_path)
    toy.version = "1"
    with pytest.raises(CacheError, match=naming("dtype float16 float32 --workspace")):
        run(shapes, store_path, dtype="float32")


def test_a_moved_or_copied_store_is_complete(shapes, store_path, toy, tmp_path):
    run(shapes, store_path)
    values = pooled(store_path)
    moved = tmp_path / "elsewhere" / "other.zarr"
    shutil.copytree(store_path, tmp_path / "copy.zarr")
    moved.parent.mkdir()
    store_path.rename(moved)
    toy.batches.clear()
    for path in (moved, tmp_path / "copy.zarr"):
        assert not any(run(shapes, path).computed.values())
        np.testing.assert_array_equal(pooled(path), values)
    assert toy.batches == []


def test_a_store_of_another_version_is_refused(shapes, store_path):
    open_store(store_path, shapes)
    group = zarr.open_group(store_path, mode="a")
    group.attrs["cachefuse"] = {**group.attrs["cachefuse"], "format": 99}
    for open_it in (lambda: FeatureStore(store_path), lambda: open_store(store_path, shapes)):
        with pytest.raises(CacheError, match=naming("version 99 2")):
            open_it()


def test_a_foreign_group_is_refused(store_path):
    zarr.create_group(store_path)
    with pytest.raises(CacheError, match=naming("None 2")):
        FeatureStore(store_path)


def test_a_missing_store_says_what_to_do(store_path):
    with pytest.raises(CacheError, match=naming("small.zarr extract")):
        FeatureStore(store_path)


# Never trust a fill value


def test_a_view_that_was_not_extracted_says_how_to_make_it(shapes, store_path, toy):
    run(shapes, store_path)
    features = FeatureStore(store_path).open_features("toy", "image")
    with pytest.raises(CacheError, match=naming("tokens --dataset small --encoder toy --views")):
        features.read("tokens")


@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("image", "pooled/c/0/0"),
        ("image", "tokens/c/0/0/0"),
        ("text", "tokens/block-000000/c/0/0"),
        ("text", "offsets/c/0/0"),
    ],
)
@pytest.mark.one_in(3)
def test_a_damaged_block_is_computed_again_and_never_read(shapes, store_path, toy, tools, modality, name, damage):
    run(shapes, store_path, views=("pooled", "tokens"))
    before = tools.files(store_path)
    file = store_path / "features" / "toy" / modality / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-5] if damage == "short" else b"")
    view = "pooled" if name.startswith("pooled") else "tokens"
    with pytest.raises(CacheError, match=naming("16 80")):
        FeatureStore(store_path).open_features("toy", modality).read(view)
    assert run(shapes, store_path, views=("pooled", "tokens")).computed[("toy", modality)] == 64
    after = tools.files(store_path)
    journal = f"features/toy/{modality}/journal.jsonl"
    assert after.pop(journal) != before.pop(journal)
    assert after == before


def test_a_damaged_shard_that_the_journal_lacks_is_no_obstacle(shapes, store_path, toy):
    run(shapes, store_path)
    values = pooled(store_path)
    folder = store_path / "features" / "toy" / "image"
    (folder / "journal.jsonl").unlink()
    shard = folder / "pooled" / "c" / "0" / "0"
    shard.write_bytes(b"torn" * 50)
    run(shapes, store_path)
    np.testing.assert_array_equal(pooled(store_path), values)


def test_a_view_that_was_deleted_is_made_again(shapes, store_path, toy):
    run(shapes, store_path, views=("pooled", "tokens"))
    values = pooled(store_path)
    shutil.rmtree(store_path / "features" / "toy" / "image" / "pooled")
    assert run(shapes, store_path, views=("pooled", "tokens")).computed[("toy", "image")] == 80
    np.testing.assert_array_equal(pooled(store_path), values)


# The journal and the ledger


def test_a_torn_last_line_costs_that_block_alone(shapes, store_path, toy, tools):
    run(shapes, store_path)
    before = tools.files(store_path)
    journal = store_path / "features" / "toy" / "image" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert run(shapes, store_path).computed == {("toy", "image"): 16, ("toy", "text"): 0}
    assert [json.loads(line)["block"] for line in journal.read_bytes().splitlines()] == [0, 1]
    assert run(shapes, store_path).computed == {("toy", "image"): 0, ("toy", "text"): 0}
    assert tools.files(store_path) == before


def test_lines_survive_any_text_and_a_torn_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert list(read_lines(path)) == []
    lines = [{"a": "naïve\u2028\n\r"}, {"a": "\ud800 alone"}, {"a": "last"}]
    append_lines(path, lines[:2])
    path.write_bytes(path.read_bytes() + b'{"a": "tor')
    assert n_damaged_lines(path) == 0
    append_lines(path, lines[2:])
    append_lines(path, [])
    assert list(read_lines(path)) == lines
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    append_lines(path, lines[:1])
    assert list(read_lines(path)) == [*lines, lines[0]]
    path.write_bytes(whole.replace(b"last", b"lost"))
    assert n_damaged_lines(path) == 1


def test_the_ledger_lists_a_sample_once(shapes, store_path):
    store = open_store(store_path, shapes)
    bad = BadSample("00003", "image", "a.png", "is damaged")
    store.mark_bad([bad, replace(bad, reason="again")])
    store.mark_bad([bad, replace(bad, modality="text")])
    assert [(line.id, line.modality) for line in store.bad_samples()] == [("00003", "image"), ("00003", "text")]
    assert store.n_bad == {"image": 1, "text": 1}
    assert FeatureStore(store_path).bad_samples() == store.bad_samples()
    store.update_present("image")
    np.testing.assert_array_equal(np.flatnonzero(~FeatureStore(store_path).present("image")), [3])


def test_presence_follows_the_ledger_even_if_a_kill_came_between(shapes, store_path):
    open_store(store_path, shapes).mark_bad([BadSample("00003", "image", "a.png", "is damaged")])
    assert FeatureStore(store_path).present("image").all()
    open_store(store_path, shapes)
    np.testing.assert_array_equal(np.flatnonzero(~FeatureStore(store_path).present("image")), [3])
    assert len(FeatureStore(store_path).bad_samples()) == 1


# Killed while the store or its samples were being made


def test_what_a_killed_process_left_is_swept_and_is_no_store(shapes, store_path, toy):
    left = store_path.parent / f".{store_path.name}.abc123" / store_path.name
    left.mkdir(parents=True)
    (left / "zarr.json").write_text("{")
    assert WorkspacePaths(store_path.parents[1]).stores == []
    run(shapes, store_path)
    partial = store_path / "features" / "toy" / "image" / "pooled" / "c" / "0" / "0.12ab.partial"
    partial.write_bytes(b"half")
    run(shapes, store_path)
    assert not left.parent.exists()
    assert not partial.exists()
    assert WorkspacePaths(store_path.parents[1]).stores == [store_path]


def test_an_update_of_the_samples_is_whole_or_not_at_all(shapes, store_path, monkeypatch):
    open_store(store_path, shapes).mark_bad([BadSample("00003", "image", "a.png", "is damaged")])
    changed = replace(shapes, splits=np.array(["holdout"] * 80))
    real = os.replace

    def killed_at(name):
        def replace_or_die(source, target):
            if source == store_path / name:
                raise KeyboardInterrupt
            real(source, target)

        return replace_or_die

    monkeypatch.setattr("os.replace", killed_at("samples"))
    with pytest.raises(KeyboardInterrupt):
        open_store(store_path, changed)
    assert FeatureStore(store_path).splits.tolist() == shapes.splits.tolist()
    monkeypatch.setattr("os.replace", killed_at(".samples.new"))
    with pytest.raises(KeyboardInterrupt):
        open_store(store_path, changed)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="extract"):
        FeatureStore(store_path)
    store = open_store(store_path, changed)
    assert set(store.splits.tolist()) == {"holdout"}
    assert len(store.bad_samples()) == 1
    assert not [path for path in store_path.iterdir() if path.name.startswith(".")]


def test_a_kill_between_making_an_array_and_noting_it_is_no_obstacle(shapes, store_path, toy, monkeypatch):
    def killed(features, view):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Features, "begin", killed)
        with pytest.raises(KeyboardInterrupt):
            run(shapes, store_path, views=("tokens",))
    assert (store_path / "features" / "toy" / "image" / "tokens" / "zarr.json").is_file()
    run(shapes, store_path, views=("tokens",))
    assert len(FeatureStore(store_path).open_features("toy", "text").read("tokens")) == 80
