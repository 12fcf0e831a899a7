import json


def test_lists_the_datasets(cachefuse, fits):
    result = cachefuse("datasets")
    assert (result.code, result.err) == (0, "")
    assert all(name in result.out for name in ("comp5329", "flickr8k", "food101", "mmimdb", "shapes"))
    fits(result.out)


def test_as_json(cachefuse):
    rows = {row["name"]: row for row in json.loads(cachefuse("datasets", "--json").out)}
    assert rows["shapes"]["data"] is True
    assert rows["mmimdb"]["data"] is False
    assert rows["mmimdb"]["classes"] == 23
