"""Mined pairs of texts against a greedy matching in plain loops, and the dataset that they are written as."""

import json

import numpy as np
import pytest

from cachefuse.alignment import pairs as module
from cachefuse.alignment.pairs import Pairs, mine_pairs, write_pairs
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import ConfigError, DataError
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of
from fixtures.messages import naming


def crowded(counts, width=6, spread=0.6, seed=0):
    """Return texts' features near to a few centres: N arrays (n_i, D), float16."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, width))
    return [
        (centres[rng.integers(5, size=n)] + spread * rng.normal(size=(n, width))).astype(np.float16) for n in counts
    ]


def by_loops(texts, splits, words, threshold, usable):
    """The nearest pair of all first, then the nearest of the samples that are left: {(row, row): cosine} by split."""
    flat = [(sample, x.astype(np.float64)) for sample, own in enumerate(texts) for x in own]
    spoken = [" ".join(word.lower().split()) for own in words for word in own]
    possible = []
    for i, (a, x) in enumerate(flat):
        for j, (b, y) in enumerate(flat[:i]):
            cosine = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            if splits[a] == splits[b] and usable[a] and usable[b] and spoken[i] != spoken[j] and cosine >= threshold:
                possible.append((-cosine, j, i))
    taken, found = set(), {}
    for negative, j, i in sorted(possible):
        samples = {flat[i][0], flat[j][0]}
        if not samples & taken:
            taken |= samples
            found.setdefault(splits[flat[i][0]], {})[(j, i)] = -negative
    return found


def found_in(pairs):
    return {
        split: dict(zip(map(tuple, rows.tolist()), pairs.cosines[split].tolist(), strict=True))
        for split, rows in pairs.rows.items()
    }


def mine(store, threshold=0.7, encoder="toy", **options):
    return mine_pairs(store.open_features(encoder, "text"), texts_of(store.raw), threshold, device="cpu", **options)


def assert_same(pairs, expected):
    found = found_in(pairs)
    assert {split: set(of) for split, of in found.items()} == {split: set(of) for split, of in expected.items()}
    for split, of in found.items():
        for rows, cosine in of.items():
            assert cosine == pytest.approx(expected[split][rows], abs=1e-5)


@pytest.fixture(scope="module")
def captions():
    """60 samples of two splits with 0 to 4 captions each, some of which are said twice."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 60)
    words, n = [], 0
    for count in counts:
        words.append(
            tuple(f"A text  no {(n + i) % 70}" if i % 2 else f"a TEXT no {(n + i) % 70} " for i in range(count))
        )
        n += count
    return crowded(counts), ["train"] * 40 + ["val"] * 20, words


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("block", [7, 40, 2048])
@pytest.mark.one_in(3)
def test_is_the_greedy_matching(make_store, captions, monkeypatch, threshold, block):
    texts, splits, words = captions
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "CANDIDATES", 1000)
    store = make_store(splits, texts={"toy": texts}, words=words)
    expected = by_loops(texts, splits, words, threshold, [len(own) > 0 for own in texts])
    assert set(expected) == {"train", "val"}
    assert_same(mine(store, threshold), expected)


@pytest.mark.parametrize("block", [5, 64, 2048])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.one_in(3)
def test_with_a_few_candidates_each_no_pair_is_wrong(make_store, monkeypatch, block, seed):
    """300 texts about 5 things, where most of a text's nearest are taken by others."""
    monkeypatch.setattr(module, "BLOCK", block)
    counts, splits = [3] * 100, np.repeat(["train", "val", "test"], [60, 30, 10])
    texts = crowded(counts, seed=seed)
    store = make_store(splits, texts={"toy": texts})
    pairs = mine(store, 0.7)
    flat = np.concatenate(texts).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    owners = np.repeat(np.arange(100), 3)
    for split, rows in pairs.rows.items():
        assert (rows[:, 0] < rows[:, 1]).all()
        assert (splits[owners[rows]] == split).all()
        cosines = (flat[rows[:, 0]] * flat[rows[:, 1]]).sum(1)
        np.testing.assert_allclose(pairs.cosines[split], cosines, atol=1e-5)
        assert (cosines >= 0.7 - 1e-5).all()
        assert (np.diff(pairs.cosines[split]) <= 0).all()
    used = np.concatenate([rows.ravel() for rows in pairs.rows.values()])
    assert len(used) == len({*used.tolist()}) == 2 * len(pairs)
    assert len(pairs) >= 0.85 * sum(map(len, by_loops(texts, splits, texts_of(store.raw), 0.7, [True] * 100).values()))


def test_by_hand(make_store):
    """b is nearest to a, and then c is left with d; e is too far from all."""
    angles = {"a": 0, "b": 10, "c": 22, "d": 40, "e": 120}
    texts = [np.array([[np.cos(t), np.sin(t)]], np.float32) * 3 for t in np.radians([*angles.values()])]
    words = [(word,) for word in angles]
    store = make_store(["train"] * 5, texts={"toy": texts}, words=words, dtype="float32")
    pairs = mine(store, 0.9)
    assert found_in(pairs)["train"] == pytest.approx({(0, 1): np.cos(np.radians(10)), (2, 3): np.cos(np.radians(18))})
    assert len(pairs) == 2
    assert len(mine(store, 0.96)) == 1
    assert len(mine(store, 1.0)) == 0


def test_the_threshold_is_met_by_equality(make_store):
    x = [np.array([[1.0, 0]], np.float16), np.array([[2.0, 0]], np.float16)]
    store = make_store(["train"] * 2, texts={"toy": x})
    assert found_in(mine(store, 1.0)) == {"train": {(0, 1): 1.0}}


def test_the_same_words_are_no_pair(make_store):
    """Whatever their case and spaces; and then the next nearest is."""
    x = [np.array([[1.0, 0]]), np.array([[1.0, 0.01]]), np.array([[1.0, 0.5]])]
    words = [("A dog  runs ",), (" a DOG\truns",), ("a dog",)]
    store = make_store(["train"] * 3, texts={"toy": x}, words=words)
    assert list(found_in(mine(store, 0.8))["train"]) == [(1, 2)]
    store = make_store(["train"] * 3, texts={"toy": x}, words=[("Say it",)] * 3, name="other")
    assert len(mine(store, 0.8)) == 0


def test_never_across_splits(make_store):
    x = [np.array([[1.0, 0]])] * 4
    store = make_store(["train", "val", "test", "train"], texts={"toy": x})
    assert found_in(mine(store, 0.9)) == {"train": {(0, 3): 1.0}}


def test_texts_of_one_sample_may_pair(make_store):
    texts = [np.array([[1.0, 0], [1, 0.1]]), np.array([[0, 1.0], [1, -1]])]
    store = make_store(["train"] * 2, texts={"toy": texts})
    assert list(found_in(mine(store, 0.9))["train"]) == [(0, 1)]


class TestAbsentSamples:
    def test_have_no_pair(self, make_store):
        """Their rows are zeros where a sample has one text; and are not there where some have several."""
        x = [np.empty((0, 2))] + [np.array([[1.0, 0]])] * 2 + [np.empty((0, 2))] * 2
        store = make_store(["train"] * 5, texts={"toy": x})
        assert store.items("text") is None
        assert list(found_in(mine(store, 0.9))["train"]) == [(1, 2)]

    def test_nor_those_found_to_be_unusable(self, make_store, monkeypatch):
        x = [np.array([[1.0, 0], [0, 1]])] * 3
        store = make_store(["train"] * 3, texts={"toy": x})
        monkeypatch.setattr(FeatureStore, "present", lambda self, modality: np.array([True, False, True]))
        assert set(found_in(mine(store, 0.9))["train"]) == {(0, 4)}  # and no other, though (1, 5) are as near

    def test_leave_the_texts_of_others_in_place(self, make_store, tmp_path):
        x = [np.empty((0, 2))] + [np.array([[1.0, 0]])] * 2
        store = make_store(["train"] * 3, texts={"toy": x}, words=[(), ("one",), ("two",)])
        path = write_pairs(mine(store, 0.9), store.raw, tmp_path / "out", "toy")
        assert texts_of(load_dataset(*load_manifest(str(path)))) == [("one", "two")]


def test_vectors_of_zeros_are_near_to_none(make_store):
    store = make_store(["train"] * 3, texts={"toy": [np.zeros((2, 3))] * 3})
    assert len(mine(store, 1e-6)) == 0


def test_tells_how_far_it_is(make_store, captions, monkeypatch):
    texts, splits, words = captions
    monkeypatch.setattr(module, "BLOCK", 10)
    told = []
    mine(make_store(splits, texts={"toy": texts}, words=words), on_rows=lambda done, total: told.append((done, total)))
    n = sum(map(len, texts))
    assert told[-1] == (n, n)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_thresholds_out_of_range_are_refused(make_store, threshold):
    store = make_store(["train"] * 2, texts={"toy": [np.ones((1, 2))] * 2})
    with pytest.raises(ConfigError, match=naming(f"threshold 0 1 {threshold:g}")):
        mine(store, threshold)


def test_texts_that_are_not_those_of_the_features_are_refused(make_store):
    store = make_store(["train"] * 2, texts={"toy": [np.ones((2, 2))] * 2})
    with pytest.raises(DataError, match=naming("3 4")):
        mine_pairs(store.open_features("toy", "text"), [("a", "b"), ("c",)], 0.7)


class TestWriting:
    def write(self, make_store, words, splits=None, folder="out pairs", **options):
        """Write the pairs of texts of two that follow one another, and return the dataset as it is read back."""
        n = len(words)
        splits = splits or ["train"] * n
        directions = np.eye((n + 1) // 2, dtype=np.float16)
        store = make_store(splits, texts={"toy": [directions[[i // 2]] for i in range(n)]}, words=[(w,) for w in words])
        path = write_pairs(mine(store, 0.9), store.raw, store.path.parent / folder, options.get("source", "toy"))
        manifest, root = load_manifest(str(path))
        return load_dataset(manifest, root), path

    def test_is_read_back_as_pairs(self, make_store):
        words = ["a dog", "the dog", "a cat", "the cat", "one", "two"]
        read, path = self.write(make_store, words, ["train", "train", "val", "val", "train", "train"])
        assert path.name == "out-pairs.toml"
        assert read.name == "out-pairs"
        assert read.manifest.task == "retrieval"
        assert read.manifest.title == "3 pairs of texts of made, by toy"
        found = {split: set() for split in ("train", "val")}
        for split, texts in zip(read.splits.tolist(), texts_of(read), strict=True):
            found[split].add(texts)
        assert found == {"train": {("a dog", "the dog"), ("one", "two")}, "val": {("a cat", "the cat")}}
        assert sorted(read.ids) == ["0-1", "2-3", "4-5"]
        assert "image" not in read.modalities

    def test_tells_where_each_is_from(self, make_store):
        _, path = self.write(make_store, ["a", "b", "c", "d"])
        lines = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()]
        assert lines == [
            {"id": "0-1", "texts": ["a", "b"], "from": ["row0", "row1"], "cosine": 1.0},
            {"id": "2-3", "texts": ["c", "d"], "from": ["row2", "row3"], "cosine": 1.0},
        ]

    def test_of_captions_of_several_texts(self, make_store, captions, tmp_path):
        texts, splits, words = captions
        store = make_store(splits, texts={"toy": texts}, words=words)
        pairs = mine(store, 0.8)
        read = load_dataset(*load_manifest(str(write_pairs(pairs, store.raw, tmp_path / "new" / "out", "toy"))))
        flat = [text for own in words for text in own]
        expected = [(split, (flat[i], flat[j])) for split, rows in pairs.rows.items() for i, j in rows.tolist()]
        assert list(zip(read.splits.tolist(), texts_of(read), strict=True)) == expected
        assert len(read) == len(pairs) > 10
        assert all(len(own) == 2 for own in texts_of(read))

    def test_hostile_texts_come_back_as_they_are(self, make_store):
        words = ['say "it"\\', "tab\t, {id} [x]", "two\nlines", "of\r\nWindows",
                 "line\u2028and\u2029paragraph", "next\x85\x0b\x0c\x1c",
                 "\U0001f600 é \u4e2d", "\x00\x1b[31m\x7f", "' or '' = '", "\ufeffmark \u202e back"]  # fmt: skip
        read, _ = self.write(make_store, words)
        assert [text for own in texts_of(read) for text in own] == words

    def test_half_a_surrogate_pair_becomes_a_question_mark(self, make_store):
        """JSON may hold one, and no file can."""
        read, _ = self.write(make_store, ["half \ud83d of one", "whole"])
        assert texts_of(read) == [("half ? of one", "whole")]

    @pytest.mark.parametrize(
        "folder", ["Пары", "with space", "UPPER.case", "a-b_c.d", "x" * 64, "q\"uo'te", "train.jsonl"]
    )
    def test_any_folder_will_do(self, make_store, folder):
        read, path = self.write(make_store, ["a", "b"], folder=folder)
        assert len(read) == 1
        assert path.parent.name == folder

    @pytest.mark.parametrize("folder", ["_pairs", "x" * 65])
    def test_folders_that_are_no_name_will_do_too(self, make_store, folder):
        read, _ = self.write(make_store, ["a", "b"], folder=folder)
        assert len(read) == 1

    @pytest.mark.parametrize("split", ["été", 'q"uo\\te', "a.b", "../up", "x = 1\n[reader]", ""])
    def test_any_split_will_do(self, make_store, split):
        read, path = self.write(make_store, ["a", "b"], [split] * 2)
        assert read.splits.tolist() == [split]
        assert len([*path.parent.iterdir()]) == 2

    @pytest.mark.parametrize("place", ["split", "source"])
    def test_names_beyond_the_basic_plane_will_do(self, make_store, place):
        splits, source = (["\U0001f600"] * 2, "toy") if place == "split" else (None, "hf:\U0001f600")
        read, _ = self.write(make_store, ["a", "b"], splits, source=source)
        assert len(read) == 1

    def test_splits_that_would_share_a_file_have_their_own(self, make_store):
        read, _ = self.write(make_store, ["a", "b", "c", "d"], ["a b", "a b", "a-b", "a-b"])
        assert sorted(zip(read.splits.tolist(), texts_of(read), strict=True)) == [
            ("a b", ("a", "b")),
            ("a-b", ("c", "d")),
        ]

    def test_writing_again_replaces(self, make_store):
        _, path = self.write(make_store, ["a", "b", "c", "d"])
        store = make_store(["train"] * 2, texts={"toy": [np.ones((1, 2))] * 2}, words=[("e",), ("f",)], name="next")
        write_pairs(mine(store, 0.9), store.raw, path.parent, "toy")
        assert texts_of(load_dataset(*load_manifest(str(path)))) == [("e", "f")]

    def test_nothing_found_is_nothing_written(self, make_store, tmp_path):
        store = make_store(["train"] * 2, texts={"toy": [np.eye(2)[[i]] for i in range(2)]})
        pairs = mine(store, 0.9)
        assert len(pairs) == 0
        with pytest.raises(DataError, match="--threshold"):
            write_pairs(pairs, store.raw, tmp_path / "out", "toy")
        assert not (tmp_path / "out").exists()

    def test_pairs_count_over_all_splits(self):
        assert len(Pairs({"train": np.zeros((3, 2)), "val": np.zeros((2, 2))}, {})) == 5
