"""Verification finds every kind of damage and names its block; repair computes those blocks again and no others."""

import shutil

import numpy as np
import pytest
import zarr

from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.extraction.verify import repair, verify
from cachefuse.store.features import Features
from cachefuse.store.format import checksum
from cachefuse.store.store import FeatureStore
from cachefuse.training.selection import select_features
from fixtures.damage import features_of, flip, places
from fixtures.messages import naming

VIEWS = ("pooled", "tokens")


def test_a_whole_store_is_sound(store):
    seen = []
    found = verify(store, on_progress=lambda done, total: seen.append((done, total)))
    assert found.damage == ()
    assert [(view.modality, view.view, view.finished, view.blocks) for view in found.views] == [
        (modality, view, 2, 2) for modality in ("image", "text") for view in VIEWS
    ]
    assert seen == [(i, 8) for i in range(1, 9)]
    for view in found.views:
        names = {view.view, "offsets"} if (view.view, view.modality) == ("tokens", "text") else {view.view}
        folders = [store.path / "features" / "toy" / view.modality / name for name in names]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert view.n_bytes == sum(path.stat().st_size for path in files if path.name != "zarr.json")


@pytest.mark.parametrize(
    ("modality", "view", "file", "place", "reason"),
    [
        ("image", "pooled", "pooled/c/1/0", 3, "its checksum does not fit"),
        ("image", "pooled", "pooled/c/1/0", -1, "its index or its size is wrong"),
        ("image", "pooled", "pooled/c/1/0", -20, "its index or its size is wrong"),
        ("image", "tokens", "tokens/c/1/0/0", 40, "its checksum does not fit"),
        ("text", "tokens", "tokens/block-000001/c/0/0", 9, "its checksum does not fit"),
        ("text", "tokens", "offsets/c/1/0", 16, "its offsets have changed"),
        ("text", "tokens", "tokens/block-000001/zarr.json", 0, "Zarr cannot read tokens"),
    ],
)
@pytest.mark.one_in(2)
def test_a_flipped_bit_is_found_named_and_mended(shapes, store, tools, toy, modality, view, file, place, reason):
    before = tools.files(store.path)
    flip(store.path / "features" / "toy" / modality / file, place)
    found = verify(store)
    assert places(found) == [(modality, view, 1)]
    assert reason in found.damage[0].reason
    toy.batches.clear()
    repair(store, found, shapes, device="cpu")
    assert {kind for kind, _, _ in toy.batches} == {modality}
    assert verify(FeatureStore(store.path)).damage == ()
    after = tools.files(store.path)
    journal = f"features/toy/{modality}/journal.jsonl"
    assert after.pop(journal).startswith(before.pop(journal))
    assert after == before


def test_a_file_that_is_gone_or_cut_short_is_found(shapes, store, toy):
    folder = store.path / "features" / "toy" / "image"
    (folder / "pooled" / "c" / "0" / "0").unlink()
    shard = folder / "tokens" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-40])
    found = verify(store)
    assert places(found) == [("image", "pooled", 0), ("image", "tokens", 1)]
    assert {damage.reason for damage in found.damage} == {"it is lost, cut short or changed"}
    repair(store, found, shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()


def test_an_array_without_metadata_is_found_and_mended(shapes, store, toy):
    file = store.path / "features" / "toy" / "image" / "pooled" / "zarr.json"
    data = file.read_bytes()
    file.write_bytes(b"")
    values = store.open_features("toy", "image").read()  # our own reader does without it
    found = verify(store)
    assert places(found) == [("image", "pooled", None)]
    toy.batches.clear()
    repair(store, found, shapes, device="cpu")
    assert toy.batches == []
    assert file.read_bytes() == data
    np.testing.assert_array_equal(zarr.open_array(file.parent, mode="r")[:], values)


@pytest.mark.parametrize("data", [None, b"{}"])
def test_a_group_whose_description_is_lost_is_damage_and_is_not_thrown_away(shapes, store, toy, data):
    file = store.path / "features" / "toy" / "image" / "zarr.json"
    file.unlink() if data is None else file.write_bytes(data)
    found = verify(store)
    assert places(found) == [("", "features/toy/image", None)]
    assert [view.modality for view in found.views] == ["text", "text"]
    toy.batches.clear()
    with pytest.raises(CacheError, match=naming("image/zarr.json")):
        extract(shapes, ["toy"], store.path, views=VIEWS, device="cpu", batch_size=8)
    assert toy.batches == []


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_features_in_the_folder_of_another_name_are_damage(shapes, store, toy, how):
    folder = store.path / "features"
    how(folder / "toy" / "text", folder / "toy" / "image2")
    found = verify(FeatureStore(store.path))
    assert ("", "features/toy/image2", None) in places(found)
    assert any("toy (text), whose place is" in damage.reason for damage in found.damage)
    with pytest.raises(CacheError, match=naming("toy/image2 toy/text")):
        select_features(FeatureStore(store.path), [])
    shutil.rmtree(folder / "toy" / "image2")
    how(folder / "toy", folder / "other")
    moved = {("", f"features/other/{path.name}", None) for path in (folder / "other").iterdir() if path.is_dir()}
    assert moved
    assert moved <= {*places(verify(FeatureStore(store.path)))}


@pytest.mark.parametrize("folder", ["toy/text", "toy", ""])
def test_features_that_were_asked_for_and_are_gone_are_missing(shapes, store, toy, tools, folder):
    before = tools.files(store.path)
    shutil.rmtree(store.path / "features" / folder)
    lost = FeatureStore(store.path)
    modalities = ["text"] if folder == "toy/text" else ["image", "text"]
    found = verify(lost)
    assert [(damage.encoder, damage.modality, damage.missing) for damage in found.damage] == [
        ("toy", modality, True) for modality in modalities
    ]
    for encoders in ([], ["toy"]):
        with pytest.raises(CacheError if folder == "toy/text" or not encoders else (CacheError, ConfigError)):
            select_features(lost, encoders)
    extract(shapes, ["toy"], store.path, views=VIEWS, device="cpu", batch_size=8)
    assert verify(FeatureStore(store.path)).damage == ()
    after = tools.files(store.path)
    assert {name: data for name, data in after.items() if "journal" not in name and name != "zarr.json"} == {
        name: data for name, data in before.items() if "journal" not in name and name != "zarr.json"
    }


def test_an_extract_that_ended_before_its_first_block_is_missed(shapes, store_path, toy, monkeypatch):
    def ended(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "require_features", ended)
        with pytest.raises(KeyboardInterrupt):
            extract(shapes, ["toy"], store_path, device="cpu")
    assert [(d.encoder, d.modality) for d in verify(FeatureStore(store_path)).damage] == [
        ("toy", "image"),
        ("toy", "text"),
    ]


def test_an_encoder_that_is_forgotten_is_not_missed(shapes, store, toy):
    extract(shapes, ["classic"], store.path, device="cpu")
    shutil.rmtree(store.path / "features" / "classic" / "text")
    with pytest.raises(CacheError, match=naming("classic text --forget")):
        select_features(FeatureStore(store.path))
    FeatureStore(store.path).forget_encoder("classic")
    assert verify(FeatureStore(store.path)).damage == ()
    assert {features.encoder for features in FeatureStore(store.path).features()} == {"toy"}
    assert sorted(select_features(FeatureStore(store.path))) == ["image", "text"]
    for unknown in ("classic", "", "..", "toy/image"):
        with pytest.raises(CacheError, match=naming("no encoder it has: toy")):
            FeatureStore(store.path).forget_encoder(unknown)


def test_an_encoder_is_forgotten_by_the_name_of_its_folder_too(shapes, store_path):
    open_store(store_path, shapes, asked={"hf:toy": {"text": "hf:./toy"}})
    assert [damage.encoder for damage in verify(FeatureStore(store_path)).damage] == ["hf:toy"]
    FeatureStore(store_path).forget_encoder("hf-toy")
    assert verify(FeatureStore(store_path)).damage == ()


def test_repair_computes_the_damaged_view_of_the_damaged_modality_alone(shapes, store, toy):
    flip(store.path / "features" / "toy" / "image" / "tokens" / "c" / "0" / "0" / "0", 3)
    toy.batches.clear()
    repair(store, verify(store), shapes, device="cpu")
    assert {(modality, views) for modality, _, views in toy.batches} == {("image", ("tokens",))}


def test_the_cosine_of_a_block_is_that_of_all_its_rows_after_some_were_computed_again(shapes, store_path, toy):
    toy.change = lambda rows: rows + np.sin(rows * 1.7)
    extract(shapes, ["toy"], store_path, views=("tokens",), dtype="int8", device="cpu")
    features = FeatureStore(store_path).open_features("toy", "image")
    before = features.written("tokens", 0).cosine
    features.forget("tokens", [5])
    extract(shapes, ["toy"], store_path, views=("tokens",), dtype="int8", device="cpu")
    after = FeatureStore(store_path).open_features("toy", "image").written("tokens", 0).cosine
    assert after == pytest.approx(before, abs=1e-4)
    assert after[1] <= before[1]


def test_all_that_was_asked_for_is_missing_until_it_is_computed(shapes, store_path, toy, tools):
    undisturbed = store_path.with_name("undisturbed.zarr")
    extract(shapes, ["toy"], undisturbed, views=VIEWS, device="cpu", batch_size=8)
    toy.batches.clear()
    toy.interrupt_after(9, store_path, n_blocks=2)
    with pytest.raises(KeyboardInterrupt):
        extract(shapes, ["toy"], store_path, views=VIEWS, device="cpu", batch_size=8)
    found = verify(FeatureStore(store_path))
    assert places(found) == [
        ("image", "pooled", 1),
        ("image", "tokens", 1),
        ("text", "pooled", None),
        ("text", "tokens", None),
    ]
    assert all(damage.missing for damage in found.damage)
    assert [(view.finished, view.blocks) for view in found.views] == [(1, 2)] * 2
    repair(FeatureStore(store_path), found, shapes, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()
    assert features_of(tools, store_path) == features_of(tools, undisturbed)


def test_appended_samples_are_missing_from_the_encoders_that_have_not_seen_them(shapes, store_path, toy, tools):
    extract(tools.head(shapes, 70), ["toy"], store_path, device="cpu")
    extract(tools.head(shapes, 70), ["classic"], store_path, device="cpu")
    extract(shapes, ["classic"], store_path, device="cpu")
    found = verify(FeatureStore(store_path))
    assert places(found) == [("image", "pooled", 1), ("text", "pooled", 1)]
    assert {(damage.encoder, damage.missing) for damage in found.damage} == {("toy", True)}
    repair(FeatureStore(store_path), found, shapes, device="cpu")
    assert verify(FeatureStore(store_path)).damage == ()


@pytest.mark.parametrize("moment", ["forget", "note_written"])
def test_an_interrupted_repair_is_not_forgotten(shapes, store, toy, monkeypatch, moment):
    flip(store.path / "features" / "toy" / "image" / "pooled" / "c" / "0" / "0", 3)
    expected = FeatureStore(store.path).open_features("toy", "image").read("tokens").tobytes()
    real = getattr(Features, moment)

    def interrupted(*arguments):
        if moment == "forget":
            real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Features, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            repair(store, verify(store), shapes, device="cpu")
    found = verify(FeatureStore(store.path))
    assert places(found) == [("image", "pooled", 0)]
    with pytest.raises(CacheError, match=naming("16 80")):
        FeatureStore(store.path).open_features("toy", "image").read("pooled")
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()
    assert FeatureStore(store.path).open_features("toy", "image").read("tokens").tobytes() == expected


@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_line_of_the_journal_is_damage_and_is_mended(shapes, store, toy, tools, line):
    before = features_of(tools, store.path)
    journal = store.path / "features" / "toy" / "image" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"block"', b'"blocc"')
    journal.write_bytes(b"".join(lines))
    found = verify(FeatureStore(store.path))
    (view,) = {damage.view for damage in found.damage} - {"journal.jsonl"}
    assert ("image", "journal.jsonl", None) in places(found)
    assert not any(damage.missing for damage in found.damage)
    with pytest.raises(CacheError, match=naming("damaged journal.jsonl --repair")):
        FeatureStore(store.path).open_features("toy", "image").read(view)
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert verify(FeatureStore(store.path)).damage == ()
    assert features_of(tools, store.path) == before


def test_the_metadata_of_another_array_is_damage(store):
    other = store.path / "samples" / "stamp" / "zarr.json"
    shutil.copy(other, store.path / "features" / "toy" / "image" / "pooled" / "zarr.json")
    assert {place[:2] for place in places(verify(FeatureStore(store.path)))} == {("image", "pooled")}
    with pytest.raises(CacheError, match=naming("damaged --repair")):
        FeatureStore(store.path).open_features("toy", "image").read()


@pytest.mark.parametrize("name", ["features", "features/toy", "samples/present"])
def test_damaged_metadata_of_a_group_is_found_and_mended(shapes, store, toy, name):
    file = store.path / name / "zarr.json"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"3", b"4", 1))
    found = verify(FeatureStore(store.path))
    assert places(found) == [("", name, None)]
    toy.batches.clear()
    repair(FeatureStore(store.path), found, shapes, device="cpu")
    assert toy.batches == []
    assert verify(FeatureStore(store.path)).damage == ()
    assert file.read_bytes() == data


def test_rows_of_zeros_count_where_their_sample_is_present(shapes, store_path, toy, tools):
    images = [None if i in (2, 70) else tools.FakeImage(i) for i in range(80)]
    toy.change = lambda rows: rows * (rows[0, 0] not in (11, 12))  # two images whose features are zero
    extract(tools.make_dataset(shapes, images=images), ["toy"], store_path, views=VIEWS, device="cpu")
    pooled = FeatureStore(store_path).open_features("toy", "image").read()
    zero = int((~pooled.any(axis=1)).sum())
    assert zero > 2
    assert [view.zero for view in verify(FeatureStore(store_path)).views] == [zero - 2] * 2


def test_values_that_are_not_finite_are_damage(store):
    """Nothing writes such values; a checksum that fits them is made here."""
    features = store.open_features("toy", "image")
    shard = features.path / "pooled" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[0:4] = np.array([np.nan, np.inf], "<f2").tobytes()
    shard.write_bytes(data)
    written = features.written("pooled", 0)
    size, _ = written.files["pooled"]
    files = {"pooled": (size, checksum(bytes(data[: 64 * 4 * 2])))}
    features.note_written("pooled", 0, type(written)(64, files))
    found = verify(FeatureStore(store.path))
    assert [damage.reason for damage in found.damage] == ["it holds 1 NaN and 1 infinite values"]
    assert (found.views[0].nan, found.views[0].inf) == (1, 1)


def test_quantised_tokens_report_their_cosine_and_are_repaired_as_they_were(shapes, store_path, toy, tools):
    extract(shapes, ["toy"], store_path, views=VIEWS, dtype="int8", device="cpu", batch_size=8)
    before = tools.files(store_path)
    store = FeatureStore(store_path)
    flip(store_path / "features" / "toy" / "text" / "scales" / "block-000000" / "c" / "0", 5)
    found = verify(store)
    assert places(found) == [("text", "tokens", 0)]
    repair(store, found, shapes, device="cpu")
    found = verify(FeatureStore(store_path))
    assert found.damage == ()
    for view in found.views:
        if view.view == "pooled":
            assert view.cosine is None
        else:
            mean, least = view.cosine
            assert 0.999 < least <= mean <= 1.0001
    after = tools.files(store_path)
    for name in before:
        assert name.endswith("journal.jsonl") or after[name] == before[name]
