import json
from importlib.metadata import EntryPoint

from cachefuse.encoders import FAMILIES


def test_lists_the_families(cachefuse, fits):
    result = cachefuse("encoders")
    assert (result.code, result.err) == (0, "")
    assert all(family.example in result.out for family in FAMILIES.values())
    fits(result.out)


def test_as_json(cachefuse):
    assert json.loads(cachefuse("encoders", "--json").out).keys() == FAMILIES.keys()


def test_one_that_is_broken_hides_no_other(cachefuse, monkeypatch):
    point = EntryPoint("broken", "no_such_module:FAMILY", "cachefuse.encoders")
    monkeypatch.setattr("cachefuse.registry._entry_points", lambda group: {point.name: point})
    result = cachefuse("encoders")
    assert result.code == 0
    assert "broken" in result.err
    assert "classic" in result.out
