import logging

import pytest
from PIL import Image

from cachefuse.data.dataset import dataset_options, load_dataset
from cachefuse.data.manifest import builtin_manifests, parse_manifest
from cachefuse.errors import DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

MANIFEST = """
name = "mine"
task = "multiclass"
{options}

[reader]
kind = "table"
files = {{ train = "train.csv"{files} }}
id = "id"
image = "photos/{{id}}.png"
text = "text"
labels = "label"
separator = "|"
{reader}
"""


def write(folder, n=6, file="train.csv", first=0, label="ab"):
    (folder / "photos").mkdir(exist_ok=True)
    lines = ["id,text,label"]
    for i in range(first, first + n):
        Image.new("RGB", (3 + i, 2), (i, 0, 0)).save(folder / f"photos/{i:03d}.png")
        lines.append(f"{i:03d},text {i},{label[i % 2] if label else ''}")
    (folder / file).write_text("\n".join(lines) + "\n")


def load(folder, options="", files="", reader=""):
    return load_dataset(
        parse_manifest(MANIFEST.format(options=options, files=files, reader=reader), "mine.toml"), folder
    )


def test_a_dataset(tmp_path):
    write(tmp_path)
    dataset = load(tmp_path)
    assert len(dataset) == 6
    assert dataset.name == "mine"
    assert dataset.ids[0] == "000"
    assert dataset.classes == ("a", "b")
    assert dataset.targets.tolist() == [0, 1] * 3
    assert dataset.splits.tolist() == ["train"] * 6
    assert tuple(dataset.modalities) == ("image", "text")
    assert images_of(dataset)[2].load().size == (5, 2)
    assert dataset.notes == ()


def test_limit(tmp_path):
    write(tmp_path, n=60)
    write(tmp_path, n=30, file="test.csv", first=60, label="")
    dataset = load(tmp_path, files=', test = "test.csv"', options="splits.val = { from = 'train', fraction = 0.5 }")
    limited = dataset.limit(9)
    assert 7 <= len(limited) <= 11
    assert limited.name == "mine-limit9"
    assert dataset_options(limited.name) == "--dataset mine --limit 9"
    assert [dataset_options(name) for name in ("mine", "-limit3", "a-limit", "a-limit1-b")] == [
        "--dataset mine",
        "--dataset -limit3",
        "--dataset a-limit",
        "--dataset a-limit1-b",
    ]
    assert set(limited.splits) == {"train", "val", "test"}
    assert (limited.splits == "test").sum() == 3
    rows = [dataset.ids.index(sample) for sample in limited.ids]
    assert rows == sorted(rows)
    assert limited.targets.tolist() == dataset.targets[rows].tolist()
    assert limited.splits.tolist() == dataset.splits[rows].tolist()
    assert texts_of(limited) == [texts_of(dataset)[row] for row in rows]
    assert images_of(limited) == [images_of(dataset)[row] for row in rows]
    assert limited.digests() == [dataset.digests()[row] for row in rows]
    assert limited.fingerprints() == [dataset.fingerprints()[row] for row in rows]
    assert dataset.limit(90) is dataset
    assert set(dataset.limit(1).splits) == {"train", "val", "test"}


def test_limit_without_images(tmp_path):
    (tmp_path / "train.csv").write_text("id,text,label\n1,x,a\n2,y,b\n3,z,b\n")
    text = MANIFEST.replace('image = "photos/{{id}}.png"\n', "").format(options="", files="", reader="")
    dataset = load_dataset(parse_manifest(text, "mine.toml"), tmp_path)
    assert tuple(dataset.modalities) == ("text",)
    assert "image" not in dataset.limit(2).modalities
    assert len(set(dataset.digests())) == 3


def test_a_tenth_is_held_out_where_nothing_else_is_for_validation(tmp_path, caplog):
    write(tmp_path, n=200)
    with caplog.at_level(logging.INFO):
        dataset = load(tmp_path)
    n_val = dataset.splits.tolist().count("val")
    assert 10 <= n_val <= 30
    (note,) = dataset.notes
    assert says(note, f"{n_val} 200 train val")
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", f"mine: {note}")]

    declared = load(tmp_path, options="splits.val = { from = 'train', fraction = 0.1 }")
    assert declared.splits.tolist() == dataset.splits.tolist()
    assert declared.notes == ()


def test_unlabelled_test_rows_do_not_validate(tmp_path):
    write(tmp_path, n=200)
    write(tmp_path, n=10, file="test.csv", first=200, label="")
    dataset = load(tmp_path, files=', test = "test.csv"')
    assert set(dataset.splits) == {"train", "val", "test"}
    assert dataset.splits.tolist()[200:] == ["test"] * 10


def test_held_out_groups_stay_together(tmp_path):
    write(tmp_path, n=100)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace("text 1", "one product").replace("text 2", "another"))
    dataset = load(tmp_path, reader='group = "label"')
    assert len(set(zip(dataset.targets.tolist(), dataset.splits.tolist(), strict=True))) == 2


def test_groups_are_kept_and_a_blank_cell_is_none(tmp_path):
    write(tmp_path, n=30)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace("text 3", "").replace("text 4", "  "))
    dataset = load(tmp_path, reader='group = "text"')
    assert dataset.groups.tolist()[2:6] == ["text 2", "", "", "text 5"]
    kept = [int(name) for name in dataset.limit(10).ids]
    assert dataset.limit(10).groups.tolist() == dataset.groups[kept].tolist()
    assert load(tmp_path).groups is None
    assert load(tmp_path).limit(10).groups is None


@pytest.mark.parametrize("case", ["few", "labelled val", "other splits"])
def test_nothing_is_held_out(tmp_path, case):
    write(tmp_path, n=19 if case == "few" else 100)
    write(tmp_path, n=50, file="test.csv", first=100)
    options = {"other splits": "splits.dev = { from = 'train', fraction = 0.5 }"}
    text = MANIFEST.format(
        options=options.get(case, ""), files=', val = "test.csv"' if case == "labelled val" else "", reader=""
    )
    dataset = load_dataset(parse_manifest(text, "mine.toml"), tmp_path)
    assert dataset.splits.tolist().count("val") == (50 if case == "labelled val" else 0)
    assert dataset.notes == ()


def test_a_labelled_test_split_is_not_for_validation(tmp_path):
    write(tmp_path, n=200)
    write(tmp_path, n=20, file="test.csv", first=200)
    dataset = load(tmp_path, files=', test = "test.csv"')
    assert dataset.splits.tolist()[200:] == ["test"] * 20
    assert "val" in dataset.splits[:200]


def test_published_counts_are_a_warning(tmp_path, caplog):
    write(tmp_path)
    dataset = load(tmp_path, options="rows = { train = 6000, test = 10 }")
    assert len(dataset.notes) == 2
    assert says(dataset.notes[0], "6 train 6,000")
    assert says(dataset.notes[1], "0 test 10")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


@pytest.mark.parametrize("manifest", [m for m in builtin_manifests() if m.get], ids=lambda manifest: manifest.name)
def test_absent_raw_data(tmp_path, manifest):
    with pytest.raises(MissingDataError, match=naming(f"{manifest.name}")) as caught:
        load_dataset(manifest, tmp_path)
    message = "\n".join((str(caught.value), *caught.value.__notes__))
    assert str(tmp_path) in message
    assert f"get it: {manifest.get.strip()}" in message
    assert f"licence: {manifest.licence}" in message
    assert "expected layout:\n  " in message
    assert all(f"  {line}" in message for line in manifest.layout.strip().splitlines())
    assert message.endswith("put it there, or name its folder with --data-dir DIR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text\n1,x\n", "train.csv label reader.labels id text"),
        ("key,text,label\n1,x,a\n", "train.csv id reader.id key"),
        ("id,label\n1,a\n", "train.csv text reader.text"),
        ("id,text,label\n1,x,a\n2,y,b\n1,z,b\n", "mine id 1 2"),
        ("id,text,label\n1,x,a\n,y,b\n", "mine 2"),
        ("id,text,label\n1,x,a|b\n", "1 2"),
        ("id,text,label\n", "mine"),
        ("", "train.csv"),
        ("id,text,label\n1,x,\n2,y, \n", "mine"),
        ("id,id,label\n1,x,a\n", "train.csv id"),
    ],
)
def test_data_that_contradicts_the_manifest(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=naming(message)):
        load(tmp_path)


def test_label_that_is_no_class(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=naming("001 b a c")):
        load(tmp_path, options='classes = ["a", "c"]')


def test_hash_split_from_a_split_without_rows(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=naming("splits.val test train")):
        load(tmp_path, options="splits.val = { from = 'test', fraction = 0.5 }")


def test_spaces_around_labels_and_classes(tmp_path):
    (tmp_path / "train.csv").write_text("id,text,label\n1,x, a \n2,y,b\t\n")
    assert load(tmp_path, options='classes = ["b ", " a"]').targets.tolist() == [1, 0]


@pytest.mark.parametrize("has_val", [False, True])
def test_a_dataset_without_labels_has_rows_to_validate_on_too(tmp_path, has_val):
    write(tmp_path, n=200)
    write(tmp_path, n=30, file="val.csv", first=200)
    text = MANIFEST.format(options="task = 'retrieval'", files=', val = "val.csv"' if has_val else "", reader="")
    dataset = load_dataset(parse_manifest(text.replace('task = "multiclass"\n', ""), "mine.toml"), tmp_path)
    n_val = dataset.splits.tolist().count("val")
    assert n_val == 30 if has_val else 5 < n_val < 40
