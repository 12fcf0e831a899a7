import json


def test_extracts_then_computes_nothing(cachefuse, fits):
    first = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic")
    assert first.code == 0
    assert "dataset mine: 160 samples" in first.err
    assert "next  cachefuse train-head" in first.out
    fits(first.out)
    again = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic", "--json")
    assert {group["computed"] for group in json.loads(again.out)["features"]} == {0}


def test_says_what_is_unknown(cachefuse):
    assert cachefuse("extract", "--dataset", "shape").error.startswith(
        "unknown dataset 'shape' (did you mean 'shapes'?)"
    )
    assert cachefuse("extract", "--dataset", "shapes", "--encoder", "clasic").error.startswith("unknown encoder family")
    assert cachefuse("extract", "--dataset", "./no.toml").error == "./no.toml: no such manifest file"
