import pytest

from cachefuse.data.manifest import HashSplit
from cachefuse.data.readers.base import Samples
from cachefuse.data.splits import apply_hash_splits, hash_unit
from cachefuse.errors import DataError
from fixtures.messages import naming


def rule(source="train", fraction=0.2):
    return HashSplit(**{"from": source, "fraction": fraction})


def samples(n, split="train", **columns):
    return Samples(ids=[f"{i:05d}" for i in range(n)], splits=[split] * n, labels=[None] * n, **columns)


def test_hash_is_the_same_on_every_machine():
    assert hash_unit("val/00000") == 0.27191435125219643
    assert 0 <= hash_unit("\ud800") < 1


def test_known_ids_fall_into_known_splits():
    splits = apply_hash_splits({"val": rule()}, samples(20))
    assert [i for i, split in enumerate(splits) if split == "val"] == [16, 17]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_the_fraction_is_about_right(fraction):
    splits = apply_hash_splits({"val": rule(fraction=fraction)}, samples(20_000))
    assert splits.count("val") / 20_000 == pytest.approx(fraction, abs=0.01)


def test_added_rows_move_no_others():
    rules = {"val": rule(), "held-out": rule(fraction=0.5)}
    few, many = samples(1000), samples(3000)
    expected = dict(zip(few.ids, apply_hash_splits(rules, few), strict=True))
    assert set(expected.values()) == {"train", "val", "held-out"}
    many.ids.reverse()
    splits = dict(zip(many.ids, apply_hash_splits(rules, many), strict=True))
    assert {sample: splits[sample] for sample in expected} == expected


def test_groups_stay_together():
    groups = [f"product {i // 5}" for i in range(1000)]
    splits = apply_hash_splits({"val": rule()}, samples(1000, groups=groups))
    assert all(len(set(splits[i : i + 5])) == 1 for i in range(0, 1000, 5))
    assert 100 < splits.count("val") < 300


def test_rows_without_a_group_are_not_one_group():
    splits = apply_hash_splits({"val": rule()}, samples(1000, groups=[""] * 1000))
    assert splits == apply_hash_splits({"val": rule()}, samples(1000))


def test_other_splits_and_the_input_stay_as_they_are():
    given = samples(100)
    given.splits[50:] = ["test"] * 50
    splits = apply_hash_splits({"val": rule(fraction=0.5)}, given)
    assert splits[50:] == ["test"] * 50
    assert "val" in splits[:50]
    assert "val" not in given.splits


def test_no_rules():
    assert apply_hash_splits({}, samples(3)) == ["train"] * 3


def test_source_without_rows():
    with pytest.raises(DataError, match=naming("splits.val all train")):
        apply_hash_splits({"val": rule("all")}, samples(3))
