import json

from cachefuse.encoders import FAMILIES


def test_lists_the_families(cachefuse, fits):
    result = cachefuse("encoders")
    assert (result.code, result.err) == (0, "")
    assert all(family.example in result.out for family in FAMILIES.values())
    fits(result.out)


def test_as_json(cachefuse):
    assert json.loads(cachefuse("encoders", "--json").out).keys() == FAMILIES.keys()
