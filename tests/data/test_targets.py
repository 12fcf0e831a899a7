import numpy as np
import pytest

from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers.base import Samples
from cachefuse.data.targets import encode_labels, encode_scores, encode_targets, find_classes, is_labelled
from cachefuse.errors import DataError
from fixtures.columns import columns
from fixtures.messages import naming


def samples(*labels):
    return Samples(ids=[f"s{i}" for i in range(len(labels))], splits=["train"] * len(labels), labels=list(labels))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([("10", "9"), ("1",), None], ("1", "9", "10")),
        ([("10", "9"), ("x",)], ("10", "9", "x")),
        ([("01",), ("1",)], ("01", "1")),
        ([("²",), ("1",)], ("1", "²")),
        ([("9" * 5000,), ("1",)], ("1", "9" * 5000)),
        ([("-1",), ("1",)], ("-1", "1")),
        ([("b", "a"), (), ("a",)], ("a", "b")),
        ([None, ()], ()),
        ([], ()),
    ],
)
def test_classes_that_occur(labels, classes):
    assert find_classes(labels) == classes


def test_multilabel():
    targets = encode_labels(samples(("b",), ("c", "a"), (), None), ("a", "b", "c"), "multilabel")
    assert targets.dtype == np.int8
    assert targets.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0], [-1, -1, -1]]
    assert is_labelled(targets).tolist() == [True, True, True, False]


def test_a_row_without_a_label_is_unlabelled_where_each_must_have_one():
    targets = encode_labels(samples(("b",), (), None), ("a", "b"), "multilabel", min_labels=1)
    assert targets.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert encode_labels(samples(("b",), (), None), ("a", "b"), "multiclass").tolist() == [1, -1, -1]


def test_multiclass():
    targets = encode_labels(samples(("b",), None, ("a",)), ("a", "b"), "multiclass")
    assert targets.dtype == np.int32
    assert targets.tolist() == [1, -1, 0]
    assert is_labelled(targets).tolist() == [True, False, True]


def test_retrieval_has_no_targets():
    targets = encode_labels(samples(("x",), None), (), "retrieval")
    assert targets.tolist() == [-1, -1]
    assert not is_labelled(targets).any()


def test_no_rows():
    assert encode_labels(samples(), ("a", "b"), "multilabel").shape == (0, 2)
    assert encode_labels(samples(), ("a", "b"), "multiclass").shape == (0,)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_label_that_is_no_class(task):
    with pytest.raises(DataError, match=naming("s1 cow cat dog")):
        encode_labels(samples(("cat",), ("cow",)), ("cat", "dog"), task)


def test_long_lists_of_classes_are_cut():
    with pytest.raises(DataError, match=naming("28 29")):
        encode_labels(samples(("x",)), tuple(map(str, range(100))), "multiclass")


def test_several_labels_in_a_multiclass_row():
    with pytest.raises(DataError, match=naming("s0 2")):
        encode_labels(samples(("cat", "dog")), ("cat", "dog"), "multiclass")


def test_a_split_whose_labels_are_all_empty_is_unlabelled():
    rows = samples(("x",), (), (), ())
    rows.splits = ["train", "train", "test", "test"]
    assert encode_labels(rows, ("x",), "multilabel").tolist() == [[1], [0], [-1], [-1]]


# Pairs of sentences


def pair_manifest(task="similarity", options="scale = [-1, 5]"):
    reader = 'reader = { kind = "sentence_pairs", files = { train = "a.tsv" } }'
    return parse_manifest(f'name = "mine"\ntask = "{task}"\n{options}\n{reader}\n', "mine.toml")


def pairs(*labels):
    rows = samples(*labels)
    rows.modalities = columns(texts=[("a", "")] * len(labels))
    return rows


def test_scores():
    targets = encode_scores(samples(("5",), None, (), ("-1.0",), (" 2.5e0 ",)), (-1, 5))
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, np.float32([5, np.nan, np.nan, -1, 2.5]))
    assert is_labelled(targets).tolist() == [True, False, False, True, True]
    assert encode_scores(samples(), (0, 1)).shape == (0,)


@pytest.mark.parametrize("labels", [("5.01",), ("-2",), ("nan",), ("-inf",), ("1_0",), ("good",), ("1", "2")])
def test_what_is_no_score(labels):
    with pytest.raises(DataError, match=naming(f"s1 {' '.join(labels)} -1 5")):
        encode_scores(samples(("1",), labels), (-1, 5))


def test_similarity_has_scores_and_no_classes():
    classes, targets = encode_targets(pairs(("1",), None), pair_manifest())
    assert classes == ()
    assert targets.dtype == np.float32


def test_paraphrases_are_of_two_classes():
    manifest = pair_manifest("paraphrase", 'classes = ["no", "yes"]')
    classes, targets = encode_targets(pairs(("yes",), None, (), ("no",)), manifest)
    assert classes == ("no", "yes")
    assert targets.dtype == np.int32
    assert targets.tolist() == [1, -1, -1, 0]
    with pytest.raises(DataError, match=naming("s0 2")):
        encode_targets(pairs(("yes", "no")), manifest)


@pytest.mark.parametrize("texts", [None, [("a", "b"), ("a",)], [("a", "b"), ("a", "b", "c")], [("a", "b"), ()]])
@pytest.mark.parametrize(
    "manifest", [pair_manifest(), pair_manifest("paraphrase", 'classes = ["no", "yes"]')], ids=lambda made: made.task
)
def test_a_row_that_is_no_pair(manifest, texts):
    rows = samples(None, None)
    rows.modalities = columns(texts=texts)
    row, n = (0, 0) if texts is None else (1, len(texts[1]))
    with pytest.raises(DataError, match=naming(f"mine {manifest.task} {n} s{row}")):
        encode_targets(rows, manifest)
