"""Columns: what each sample has of a modality, in rows of features, hashed as stores know it."""

from dataclasses import replace

import numpy as np
import pytest

from cachefuse.data.column import Column, Value
from cachefuse.data.dataset import Dataset
from cachefuse.data.digests import hash_parts
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import DataError
from fixtures.messages import naming


def make(**modalities):
    n = len(next(iter(modalities.values())))
    manifest = parse_manifest('name = "mine"\ntask = "retrieval"\nreader = { kind = "folder" }', "mine.toml")
    splits, targets = np.array(["train"] * n), np.full(n, -1, np.int32)
    return Dataset(manifest, (), [str(i) for i in range(n)], splits, targets, modalities, name="mine")


def test_one_source_a_sample():
    column = Column.texts(["a", (), ("b",)])
    assert [column[row] for row in range(3)] == [("a",), (), ("b",)]
    assert column.present.tolist() == [True, False, True]
    assert (column.offsets, column.rows) == (None, None)
    assert column.feature_sources() == ["a", None, "b"]
    assert column.owners().tolist() == [0, 1, 2]


def test_several_sources_of_any_kind():
    one, two, three = map(Value, (1, 2, 3))
    column = Column([(one, two), None, three])
    assert column.offsets.tolist() == [0, 2, 2, 3]
    assert column.feature_sources() == [one, two, three]
    assert column.owners().tolist() == [0, 0, 2]


def test_shared_sources_have_one_row_as_they_first_occur():
    column = Column([Value([2]), None, Value([1]), Value([2]), None], shared=True)
    assert column.rows.tolist() == [0, 1, 2, 0, 1]
    assert column.feature_sources() == [Value([2]), None, Value([1])]
    assert column.owners().tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="share"):
        Column([(Value(1), Value(2))], shared=True).rows  # noqa: B018


def test_some_samples():
    column = Column.texts(["a", ("b", "c"), "d"]).take([2, 1])
    assert column == Column.texts(["d", ("b", "c")])


def test_values_are_known_by_their_content():
    assert Value([1.5, 2]) == Value([1.5, 2]) != Value([1.5, 3])
    array = np.arange(4.0)
    assert Value(array).digest() == Value(array.copy()).digest() != Value(array.astype(np.float32)).digest()
    assert Value(array).digest() != Value(array.reshape(2, 2)).digest()
    assert Value([1] * 100).name.startswith("[1, 1, ")
    assert len(Value([1] * 100).name) <= 60


def test_the_hashes_of_stores_that_are_there_stay():
    image = Value("x")
    mark = f"image:{image.digest()}"
    both = make(image=Column([image, None]), text=Column.texts([("a", "b"), "c"]))
    assert both.digests() == [hash_parts("a", "b", mark), hash_parts("c", "")]
    assert make(text=Column.texts([("a",), ()])).digests() == [hash_parts("a", ""), hash_parts("")]
    assert make(image=Column([image, None])).digests() == [hash_parts(mark), hash_parts("")]
    assert both.fingerprints() == both.digests()  # of values; those of files differ


def test_another_modality_is_part_of_the_hash():
    text, numbers = Column.texts([("a",), ("b",)]), Column.values([[1, 2], None])
    dataset = make(text=text, numbers=numbers)
    others = (
        make(text=text),
        make(text=text, numbers=Column.values([[1, 3], None])),
        make(text=text, more=numbers),
        make(text=text, title=Column.texts(["x", ()])),
        make(text=Column.texts([("a", "x"), ("b",)])),
    )
    assert len({dataset.digests()[0], *(other.digests()[0] for other in others)}) == 6
    # A sample without it hashes as if there were no such modality.
    assert {other.digests()[1] for other in (dataset, *others)} == {hash_parts("b", "")}


def test_a_column_of_another_length_or_name():
    dataset = make(text=Column.texts(["a", "b"]))
    with pytest.raises(DataError, match=naming("2 numbers 1")):
        replace(dataset, modalities={"numbers": Column.values([1])})
    with pytest.raises(DataError, match=naming("a/b")):
        replace(dataset, modalities={"a/b": Column.values([1, 2])})
    with pytest.raises(DataError, match=naming("float Column.values")):
        replace(dataset, modalities={"numbers": Column([(1.0, 2.0), (3.0, 4.0)])})
