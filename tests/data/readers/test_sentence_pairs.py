import os
from pathlib import Path

import numpy as np
import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest, parse_manifest
from cachefuse.errors import DataError, MissingDataError
from fixtures.columns import texts_of
from fixtures.messages import naming, says

OWN = """
name = "mine"
task = "similarity"
scale = [0, 10]

[reader]
kind = "sentence_pairs"
files = {{ train = "train.tsv", test = "test.tsv" }}
{options}
"""
STSB = {
    "train": 'main-captions\tMSRvid\t2012test\t0001\t5.000\tA plane is "taking off.\tAn air plane is taking off.\n'
    "main-news\tMSRpar\t2012train\t12\t0\ta\tb\tlicence\tmore\n",
    "dev": "main-forum\tdeft\t2015\t7\t2.50\tc\td\r\n",
    "test": "main-forum\tdeft\t2016\t8\t\te\tf",
}
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def load(name, root):
    return load_dataset(load_manifest(name)[0], root)


def load_own(root, options=""):
    return load_dataset(parse_manifest(OWN.format(options=options), "mine.toml"), root)


def write(root, name, text):
    (root / name).write_text(text, encoding="utf-8", newline="")


def write_stsb(root, **files):
    for split, text in (STSB | files).items():
        write(root, f"sts-{split}.csv", text)


def write_rows(root, n, broken=0, name="train.tsv"):
    rows = [f"a {i}\tb {i}\t{i % 10}" for i in range(n - broken)]
    write(root, name, "\n".join(["sentence1\tsentence2\tscore", *rows, *["cut\tshort"] * broken]))


# STS benchmark


def test_stsb(tmp_path):
    write_stsb(tmp_path)
    dataset = load("stsb", tmp_path)
    assert dataset.ids == ["train-1", "train-2", "val-1", "test-1"]
    assert dataset.splits.tolist() == ["train", "train", "val", "test"]
    assert texts_of(dataset)[0] == ('A plane is "taking off.', "An air plane is taking off.")
    assert texts_of(dataset)[1:] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert dataset.targets.dtype == np.float32
    np.testing.assert_array_equal(dataset.targets, np.float32([5, 0, 2.5, np.nan]))
    assert dataset.classes == ()
    assert tuple(dataset.modalities) == ("text",)
    assert dataset.manifest.scale == (0.0, 5.0)


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf", "1_0", "high", "0x1", "1,5"])
def test_score_that_is_not_on_the_scale(tmp_path, score):
    write_stsb(tmp_path, dev=STSB["dev"].replace("2.50", score))
    with pytest.raises(DataError, match=naming(f"val-1 {score} 0 5")):
        load("stsb", tmp_path)


def test_missing_splits_are_a_note_and_no_file_at_all_an_error(tmp_path):
    with pytest.raises(MissingDataError, match=naming("sts-train.csv sts-dev.csv sts-test.csv")):
        load("stsb", tmp_path)
    write(tmp_path, "sts-train.csv", STSB["train"])
    dataset = load("stsb", tmp_path)
    assert dataset.ids == ["train-1", "train-2"]
    assert says("\n".join(dataset.notes), "sts-dev.csv sts-test.csv")


def test_nothing_is_held_out_of_pairs(tmp_path):
    write_rows(tmp_path, 200)
    assert set(load_own(tmp_path).splits) == {"train"}


@pytest.mark.real
def test_real_stsb():
    folder = os.environ.get("CACHEFUSE_REAL_DATA")
    if not folder:
        pytest.skip("CACHEFUSE_REAL_DATA is unset")
    dataset = load("stsb", Path(folder) / "data" / "stsb")
    counts = dict(zip(*np.unique(dataset.splits, return_counts=True), strict=True))
    assert counts == {"train": 5749, "val": 1500, "test": 1379}
    assert dataset.notes == ()
    assert (dataset.targets.min(), dataset.targets.max()) == (0, 5)
    assert all(first and second for first, second in texts_of(dataset))
    quoted = 'A dog in a "superman" shirt sleeps on a blanket.'
    assert any(first == quoted for first, _ in texts_of(dataset))


# MRPC and QQP


def test_mrpc_as_microsoft_gives_it(tmp_path):
    write(tmp_path, "msr_paraphrase_train.txt", f'{MRPC}1\t70\t71\tHe said "no.\tNo, he said "\r\n0\t72\t73\ta\tb\r\n')
    write(tmp_path, "msr_paraphrase_test.txt", f"{MRPC}0\t80\t81\tc\td\r\n")
    dataset = load("mrpc", tmp_path)
    assert dataset.ids == ["train-1", "train-2", "test-1"]
    assert texts_of(dataset) == [('He said "no.', 'No, he said "'), ("a", "b"), ("c", "d")]
    assert dataset.classes == ("0", "1")
    assert dataset.targets.dtype == np.int32
    assert dataset.targets.tolist() == [1, 0, 0]


def test_mrpc_of_glue_never_trains_on_its_dev_rows(tmp_path):
    rows = ["1\t1\t2\ta\tb\r\n", "0\t3\t4\tc\td\r\n"]
    write(tmp_path, "msr_paraphrase_train.txt", MRPC + "".join(rows))
    write(tmp_path, "msr_paraphrase_test.txt", f"{MRPC}1\t5\t6\te\tf\r\n")
    write(tmp_path, "train.tsv", MRPC + rows[0])
    write(tmp_path, "dev.tsv", MRPC + rows[1])
    write(tmp_path, "test.tsv", MRPC.replace("Quality", "index") + "0\t5\t6\te\tf\r\n")
    dataset = load("mrpc", tmp_path)
    assert dataset.splits.tolist() == ["train", "val", "test"]
    assert texts_of(dataset) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert dataset.targets.tolist() == [1, 0, 1]
    (tmp_path / "msr_paraphrase_test.txt").unlink()
    assert load("mrpc", tmp_path).targets.tolist() == [1, 0, -1]


def test_qqp(tmp_path):
    write(tmp_path, "train.tsv", f'{QQP}7\t1\t2\tHow "so?\tWhy?\t1\n8\t3\t4\tone\ttwo\t0\n')
    write(tmp_path, "dev.tsv", f"{QQP}7\t1\t2\tthree\tfour\t0\n")
    write(tmp_path, "test.tsv", "id\tquestion1\tquestion2\n0\tfive\tsix\n")
    dataset = load("qqp", tmp_path)
    assert dataset.ids == ["train-1", "train-2", "val-1", "test-1"]
    assert texts_of(dataset)[0] == ('How "so?', "Why?")
    assert dataset.targets.tolist() == [1, 0, 0, -1]
    (tmp_path / "test.tsv").unlink()
    assert says("\n".join(load("qqp", tmp_path).notes), "test.tsv")


def test_class_that_is_none_of_the_two(tmp_path):
    write(tmp_path, "train.tsv", f"{QQP}7\t1\t2\ta\tb\tmaybe\n")
    with pytest.raises(DataError, match=naming("train-1 maybe 0 1")):
        load("qqp", tmp_path)


def test_counts_of_another_published_division_are_no_warning(tmp_path):
    rows = "rows = { train = 9 }\nother_rows = [{ train = 3 }, { train = 1 }]\n[reader]"
    manifest = parse_manifest(OWN.format(options="").replace("[reader]", rows), "mine.toml")
    write_rows(tmp_path, 3)
    (note,) = load_dataset(manifest, tmp_path).notes
    assert says(note, "test.tsv")
    write_rows(tmp_path, 2)
    assert any(says(note, "2 train 9") for note in load_dataset(manifest, tmp_path).notes)


# Files as they are found


def test_a_pair_stays_a_pair_where_a_sentence_is_empty(tmp_path):
    write(tmp_path, "train.tsv", "sentence1\tsentence2\tscore\n\tb\t1\na\t \t2\n\t\t3\n\t\t\n")
    dataset = load_own(tmp_path)
    assert texts_of(dataset) == [("", "b"), ("a", ""), ("", "")]
    assert dataset.targets.tolist() == [1, 2, 3]


def test_byte_order_mark_old_bytes_and_columns_in_another_order(tmp_path):
    data = (
        b"\xef\xbb\xbfscore\tkey\tsentence2 \tsentence1\r\n1\tx\tcaf\xe9\tna\xc3\xafve\r\n\r\n2\ty\t d \tc\textra\r\n"
    )
    (tmp_path / "train.tsv").write_bytes(data)
    dataset = load_own(tmp_path, 'id = "key"')
    assert dataset.ids == ["x", "y"]
    assert texts_of(dataset) == [("naïve", "café"), ("c", "d")]
    assert dataset.targets.tolist() == [1, 2]


def test_the_first_file_that_is_there_is_taken(tmp_path):
    text = OWN.format(options="").replace('train = "train.tsv"', 'train = ["a.tsv", "b.tsv", "c.tsv"]')
    manifest = parse_manifest(text, "mine.toml")
    (tmp_path / "a.tsv").mkdir()
    with pytest.raises(MissingDataError, match=naming("a.tsv test.tsv")):
        load_dataset(manifest, tmp_path)
    write_rows(tmp_path, 2, name="b.tsv")
    write_rows(tmp_path, 3, name="c.tsv")
    assert len(load_dataset(manifest, tmp_path)) == 2


def test_broken_lines_are_skipped_and_counted(tmp_path):
    write(tmp_path, "train.tsv", "sentence1\tsentence2\tscore\na\tb\t1\n\ncut\tshort\nc\td\t2\ne\tf\t3\n")
    dataset = load_own(tmp_path)
    assert dataset.ids == ["train-1", "train-3", "train-4"]
    assert texts_of(dataset) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert says("\n".join(dataset.notes), "1 train.tsv 4")


@pytest.mark.parametrize(("n", "broken"), [(100, 10), (2000, 20)])
def test_a_few_broken_lines_are_fine(tmp_path, n, broken):
    write_rows(tmp_path, n, broken)
    assert len(load_own(tmp_path)) == n - broken


@pytest.mark.parametrize(("n", "broken"), [(100, 11), (2000, 21), (1, 1), (9, 5)])
def test_many_broken_lines_are_an_error(tmp_path, n, broken):
    write_rows(tmp_path, n, broken)
    with pytest.raises(
        DataError,
        match=naming(f"train.tsv {n - broken + 2} 3 {broken} {n:,}"),
    ):
        load_own(tmp_path)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", "", "train.tsv"),
        (b"\n\r\n", "", "train.tsv"),
        (b"sentence1\tsentence2\tscore\n", "", "mine"),
        (
            b"sentence1,sentence2,score\na,b,1\n",
            "",
            "train.tsv sentence1 reader.texts",
        ),
        (b"sentence1\tscore\na\t1\n", "", "train.tsv sentence2 reader.texts"),
        (b"sentence1\tsentence2\na\tb\n", "", "train.tsv score reader.label"),
        (
            b"sentence1\tsentence2\tscore\na\tb\t1\n",
            'id = "key"',
            "train.tsv key reader.id",
        ),
        (b"a\tb\t1\n", 'header = ["a", "b", "score"]', "train.tsv sentence1"),
        (b"sentence1\tscore\tsentence2\tscore\na\tb\tc\td\n", "", "train.tsv score"),
        (b"sentence1\tsentence2\tscore\na\tb\0\t1\n", "", "train.tsv 2 UTF-8 text"),
        ("sentence1\tsentence2\tscore\na\tb\t1\n".encode("utf-16"), "", "train.tsv 1 UTF-8 text"),
        (b"sentence1\tsentence2\tscore\na\tb\t1\na\tc\t1\n", 'id = "sentence1"', "2"),
        (b"sentence1\tsentence2\tscore\n\tb\t1\n", 'id = "sentence1"', "mine 1"),
    ],
)
def test_files_that_are_otherwise(tmp_path, data, options, message):
    (tmp_path / "train.tsv").write_bytes(data)
    with pytest.raises(DataError, match=naming(message)):
        load_own(tmp_path, options)


@pytest.mark.usefixtures("no_links_out")
def test_a_link_out_of_the_data_folder_is_not_read(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_rows(tmp_path, 3)
    (root / "train.tsv").symlink_to(tmp_path / "train.tsv")
    with pytest.raises(DataError, match=naming("train.tsv folder")):
        load_own(root)
    write_rows(root, 2, name="there.tsv")
    (root / "train.tsv").unlink()
    (root / "train.tsv").symlink_to("there.tsv")
    assert len(load_own(root)) == 2
