import json


def test_lists_the_datasets(cachefuse, fits):
    result = cachefuse("datasets")
    assert (result.code, result.err) == (0, "")
    assert all(name in result.out for name in ("comp5329", "flickr8k", "food101", "mmimdb", "shapes"))
    assert all(name in result.out for name in ("cifar10", "cifar100", "coco_captions", "tiny_imagenet"))
    rows = {line.split()[0]: line.split() for line in result.out.splitlines()}
    assert rows["stsb"][1:] == ["similarity", "8,628", "train,", "val,", "test", "no"]
    assert rows["mrpc"][1:] == ["paraphrase", "5,801", "train,", "test", "no"]
    fits(result.out)


def test_as_json(cachefuse):
    rows = {row["name"]: row for row in json.loads(cachefuse("datasets", "--json").out)}
    assert rows["shapes"]["data"] is True
    assert rows["mmimdb"]["data"] is False
    assert rows["mmimdb"]["classes"] == 23
    assert (rows["qqp"]["task"], rows["qqp"]["classes"]) == ("paraphrase", 2)
    assert (rows["stsb"]["task"], rows["stsb"]["classes"]) == ("similarity", None)


def test_data_that_is_there(cachefuse, tmp_path):
    (tmp_path / "train.tsv").write_text("id\n")
    rows = {row["name"]: row for row in json.loads(cachefuse("datasets", "--json", "--data-dir", tmp_path).out)}
    assert [name for name, row in rows.items() if row["data"]] == ["mrpc", "qqp", "shapes"]
