import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from cachefuse.data.column import NotText, Value
from cachefuse.data.readers.table import TableReader, read_columns
from cachefuse.errors import BadSampleError, DataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_jsonl(path, *rows):
    return write(path, "\n".join(map(json.dumps, rows)))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(folder, **options):
    return TableReader(files={"train": next(folder.iterdir()).name}, **options).read(folder)


@pytest.mark.parametrize(
    "encoded",
    [
        "id,text\n1,é\n".encode(),
        "id,text\n1,é\n".encode("utf-8-sig"),
        "id,text\r\n1,é\r\n".encode(),
        "id,text\n1,é\n".encode("cp1252"),
        b" id , text\n1,\xc3\xa9",
    ],
)
def test_csv_from_any_system(tmp_path, encoded):
    assert read_columns(write(tmp_path / "a.csv", encoded)) == {"id": ["1"], "text": ["é"]}


def test_one_wrong_byte_spoils_no_other(tmp_path):
    path = write(tmp_path / "a.csv", "id,text\n1,crème brûlée\n2,".encode() + b"caf\xe9 \x81\n")
    assert read_columns(path)["text"] == ["crème brûlée", "café \ufffd"]
    path = write(tmp_path / "a.jsonl", '{"text": "crème '.encode() + b'caf\xe9"}')
    assert read_columns(path)["text"] == ["crème café"]
    spoiled = pyarrow.array(["crème".encode(), None, b"caf\xe9"]).view(pyarrow.string())  # as some writers leave them
    for values in (spoiled, spoiled.dictionary_encode()):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
        assert read_columns(path)["text"] == ["crème", None, "café"]


def test_wrong_bytes_are_noted_once_a_file(tmp_path):
    write(tmp_path / "a.csv", b"id,text\n1,caf\xe9\n2,\xff\xfe\n")
    write(tmp_path / "b.csv", 'id,text\n3,"a "café" \n'.encode() + b'\xe9"\n')  # read three times
    write(tmp_path / "c.jsonl", b'{"id": "4", "text": "\xe9"}')
    write(tmp_path / "d.csv", "id,text\n5,café\n")
    write(tmp_path / "f.tsv", b'id\ttext\n8\t\xe9\n9\t"a "b"\nc"\n')
    spoiled = pyarrow.array([b"caf\xe9", None]).view(pyarrow.string())
    write_parquet(tmp_path / "e.parquet", id=pyarrow.array(["6", "7"]), text=spoiled)
    files = {path.stem: path.name for path in sorted(tmp_path.iterdir())}
    assert TableReader(files=files, id="id", text="text").read(tmp_path).notes == [
        "a.csv has 3 bytes that are not UTF-8; they are read as cp1252",
        "b.csv has 1 bytes that are not UTF-8; they are read as cp1252",
        "c.jsonl has 1 bytes that are not UTF-8; they are read as cp1252",
        "e.parquet has 1 bytes that are not UTF-8; they are read as cp1252",
        "f.tsv has 1 bytes that are not UTF-8; they are read as cp1252",
    ]


def test_a_quoted_field_that_may_have_taken_rows_is_noted(tmp_path):
    write(tmp_path / "a.csv", 'id,part,label,text\n1,,"x\n","two\nlines"\n2,,"y\n3,,z,t\n4,,w",t\n"5\n6",,x,t\n')
    options = {"id": "id", "split": "part", "text": "text"}
    notes = read(tmp_path, labels="label", **options).notes
    assert notes == [
        "a.csv row 3: id holds a line break; a closing quote may be missing",
        "a.csv row 2: label holds a line break; a closing quote may be missing",
    ]
    assert read(tmp_path, labels="label", separator="\n", **options).notes == notes[:1]
    write(tmp_path / "a.csv", 'part,text\n"val\ntest",t\n')
    assert says(*read(tmp_path, split="part").notes, "a.csv row 1 split line break")


def test_a_repeated_header_is_no_row(tmp_path):
    for name, tail in (("a.csv", ""), ("b.csv", '3,"x "y" z"\n')):
        path = write(tmp_path / name, "id,text\n1,x\nid,text\n2,y\n" + tail)
        with pytest.raises(DataError, match=naming(f"{name} row 2 header")):
            read_columns(path, wanted=["id"])
        assert read_columns(path, ("id", "text"))["id"][2] == "id"  # a file without a header
    assert read_columns(write(tmp_path / "c.csv", "text\nx\ntext\n"))["text"] == ["x", "text"]


def test_bytes_of_parquet_are_texts(tmp_path):
    texts = ["café".encode(), b"caf\xe9", b"", None]
    path = tmp_path / "a.parquet"
    write_parquet(
        path,
        plain=pyarrow.array(texts, pyarrow.binary()),
        known=pyarrow.array(texts, pyarrow.binary()).dictionary_encode(),
        fixed=pyarrow.array([b"ab", b"cd", b"\xe9e", None], pyarrow.binary(2)),
        listed=pyarrow.array([texts, [], None, [b"x"]], pyarrow.list_(pyarrow.binary())),
    )
    columns = read_columns(path)
    assert columns["plain"] == columns["known"] == ["café", "café", "", None]
    assert columns["fixed"] == ["ab", "cd", "ée", None]
    assert columns["listed"] == [["café", "café", "", None], [], None, ["x"]]
    assert texts_of(read(tmp_path, text="plain")) == [("café",), ("café",), (), ()]


def test_an_object_is_no_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"id": "1", "text": {"k": "v"}}, {"id": "2", "text": ["x", {}, 3]})
    assert texts_of(read(tmp_path, text="text")) == [(NotText(),), ("x", NotText(), "3")]
    assert texts_of(read(tmp_path, text="{id} {text}"))[0] == (NotText(),)
    assert images_of(read(tmp_path, image="text"))[0] == NotText()
    assert read(tmp_path, modalities={"report": "text"}).modalities["report"][0] == (Value({"k": "v"}),)
    with pytest.raises(BadSampleError, match=r"^is an object, not a text$"):
        NotText().load()
    path.unlink()
    pairs = pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    write_parquet(tmp_path / "a.parquet", text=pyarrow.array([{"k": "v"}]), pairs=pairs)
    assert texts_of(read(tmp_path, text="text")) == texts_of(read(tmp_path, text="pairs")) == [(NotText(),)]


@pytest.mark.parametrize("key", ["id", "labels", "split", "group"])
def test_an_object_is_no_name(tmp_path, key):
    write_jsonl(tmp_path / "a.jsonl", {"x": "a"}, {"x": {"k": "v"}})
    with pytest.raises(DataError, match=naming("a.jsonl row 2 object")):
        read(tmp_path, **{key: "x"})


def test_tabs(tmp_path):
    for name in ("a.tsv", "a.txt", "a.TSV"):
        assert read_columns(write(tmp_path / name, 'id\ttext\n1\t"Go", he said\n')) == {
            "id": ["1"],
            "text": ['"Go", he said'],
        }


def test_header_for_files_that_have_none(tmp_path):
    path = write(tmp_path / "a.csv", "1,x\n2,y\n")
    assert read_columns(path, ("id", "text")) == {"id": ["1", "2"], "text": ["x", "y"]}
    with pytest.raises(DataError, match=naming("a.csv 1 2 3")):
        read_columns(path, ("id", "text", "label"))


def test_header_only(tmp_path):
    assert read_columns(write(tmp_path / "a.csv", "id,text\n")) == {"id": [], "text": []}


def test_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"id": 1, "text": "x\u2028y"}\r\n\n{"id": 2.0, "label": ["a"]}\n')
    assert read_columns(path) == {"id": [1, 2.0], "text": ["x\u2028y", None], "label": [None, ["a"]]}
    assert list(read_columns(path)) == ["id", "text", "label"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv"),
        ("a.csv", "\n\n", "a.csv"),
        ("a.csv", b"\x89PNG\r\n\x00\x00", "a.csv text"),
        ("a.csv", "id,text\n1,x\n".encode("utf-16"), "a.csv text"),
        ("a.csv", "id,text,id\n1,x,2\n", "a.csv id"),
        ("a.csv", "id,text\n1,x\n2\n", "a.csv 3 1 2"),
        ("a.jsonl", "", "a.jsonl"),
        ("a.jsonl", '{"id": 1}\n\n{"id": 2', "a.jsonl 3 JSON"),
        ("a.jsonl", '{"id": 1}\n[1]\n', "a.jsonl 2 JSON list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl 1 JSON"),
        ("a.jsonl", '{"id": ' + "1" * 10_000 + "}", "a.jsonl 1 JSON"),
        ("a.parquet", "id,text\n", "a.parquet"),
        ("a.parquet", "", "a.parquet"),
        ("a.xlsx", "", "a.xlsx .xlsx"),
        ("a", "", "a"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, name, content, message):
    with pytest.raises(DataError, match=naming(message)):
        read_columns(write(tmp_path / name, content))


def test_columns_and_templates(tmp_path):
    write(tmp_path / "a.csv", "id,name,caption\n1,cat,A cat.\n2,dog,\n")
    samples = read(tmp_path, id="{split}/{id}", image="{name}/{id}.jpg", text="{name}: {caption}")
    assert samples.ids == ["train/1", "train/2"]
    assert [source.path.relative_to(tmp_path).as_posix() for source in images_of(samples)] == ["cat/1.jpg", "dog/2.jpg"]
    assert texts_of(samples) == [("cat: A cat.",), ("dog: ",)]
    assert samples.labels == [None, None]


@pytest.mark.parametrize("value", ["{__class__}", "{0}", "{id.__class__}", "{name!r}", "{}", "%s", "=1+1", "{{id}}"])
def test_nothing_in_the_data_is_interpreted(tmp_path, value):
    write(tmp_path / "a.csv", f"id,text\n1,{value}\n")
    assert texts_of(read(tmp_path, text="{id} {text}")) == [(f"1 {value}",)]


@pytest.mark.parametrize("place", ["__class__", "0", "id.__class__", "id!r", "", "id:>10", "nothing"])
def test_templates_name_columns_and_nothing_else(tmp_path, place):
    write(tmp_path / "a.csv", "id,text\n1,x\n")
    for key in ("id", "image", "text"):
        with pytest.raises(DataError, match=naming(f"a.csv '{place}' reader.{key} id text")):
            read(tmp_path, **{key: f"{{{place}}}"})


@pytest.mark.parametrize("key", ["id", "image", "text", "labels", "split", "group"])
def test_column_that_is_not_there(tmp_path, key):
    write(tmp_path / "a.csv", "id,text\n1,x\n")
    with pytest.raises(DataError, match=naming(f"a.csv other reader.{key} id text")):
        read(tmp_path, **{key: "other"})


def test_ids_by_default_are_row_numbers_over_all_files(tmp_path):
    write(tmp_path / "a.csv", "text\nx\ny\n")
    write(tmp_path / "b.csv", "text\nz\n")
    samples = TableReader(files={"train": "a.csv", "test": "b.csv"}, text="text").read(tmp_path)
    assert samples.ids == ["0", "1", "2"]
    assert samples.splits == ["train", "train", "test"]


def test_split_column_overrides_the_file_where_it_is_not_empty(tmp_path):
    write(tmp_path / "a.csv", "id,part\n1,val\n2, test \n3,\n")
    samples = read(tmp_path, id="{split}-{id}", split="part")
    assert samples.splits == ["val", "test", "train"]
    assert samples.ids == ["val-1", "test-2", "train-3"]


def test_blank_cells_are_absent(tmp_path):
    write(tmp_path / "a.csv", "image,text,label\n,x,a\na.png, ,\n")
    samples = read(tmp_path, image="image", text="text", labels="label")
    assert images_of(samples)[0] is None
    assert images_of(samples)[1] is not None
    assert texts_of(samples) == [("x",), ()]
    assert samples.labels == [("a",), ()]


@pytest.mark.parametrize(
    ("cell", "separator", "labels"),
    [
        ("17 3", " ", ("17", "3")),
        ("  17   3 ", " ", ("17", "3")),
        ("3 3", " ", ("3", "3")),
        ("a b | c", "|", ("a b", "c")),
        ("a|| c |", "|", ("a", "", "c", "")),  # four people were asked
        (" | ", "|", ()),
        (" a b ", None, ("a b",)),
        ("", " ", ()),
    ],
)
def test_labels_of_a_cell(tmp_path, cell, separator, labels):
    write(tmp_path / "a.csv", f"label,x\n{cell},\n")
    assert read(tmp_path, labels="label", separator=separator).labels == [labels]


def test_file_without_the_labels_column_is_unlabelled(tmp_path):
    write(tmp_path / "a.csv", "id,label\n1,a\n")
    write(tmp_path / "b.csv", "id\n2\n")
    samples = TableReader(files={"train": "a.csv", "test": "b.csv"}, id="id", labels="label").read(tmp_path)
    assert samples.labels == [("a",), None]


def test_typed_values(tmp_path):
    write_parquet(
        tmp_path / "a.parquet",
        id=[1, 2, None, 4],
        score=[1.0, 2.5, math.nan, None],
        labels=[["a", "b"], [], None, [" a ", "a", ""]],
        captions=[["one", "two"], [" ", "x"], None, []],
    )
    samples = read(tmp_path, id="{id}/{score}", text="captions", labels="labels", separator=" ")
    assert samples.ids == ["1/1", "2/2.5", "/", "4/"]
    assert texts_of(samples) == [("one", "two"), ("x",), (), ()]
    assert samples.labels == [("a", "b"), (), None, ("a", "a", "")]
    assert read(tmp_path, labels="score").labels == [("1",), ("2.5",), None, None]


def test_missing_keys_of_jsonl_are_unlabelled(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"id": 1, "label": 0}, {"id": 2, "label": None}, {"id": 3}, {"label": True})
    samples = read(tmp_path, id="id", labels="label")
    assert samples.ids == ["1", "2", "3", ""]
    assert samples.labels == [("0",), None, None, ("True",)]


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    write(tmp_path / "a.jsonl", '{"id": "1\\ud800", "text": "x \\ud83d\\ude00 y\\udc00", "label": "\\ud800"}')
    samples = read(tmp_path, id="id", text="text", labels="label")
    assert samples.ids == ["1?"]
    assert texts_of(samples) == [("x 😀 y?",)]
    assert samples.labels == [("?",)]


def test_missing_files(tmp_path):
    write(tmp_path / "a.csv", "id\n1\n")
    (tmp_path / "folder.csv").mkdir()
    reader = TableReader(files={"train": "a.csv", "val": "folder.csv", "test": "sub/b.csv"})
    assert reader.missing(tmp_path) == ["folder.csv", "sub/b.csv"]


def test_places():
    assert TableReader.places("Caption") == {"Caption"}
    assert TableReader.places("data/{a}/{b}.jpg") == {"a", "b"}


def test_other_modalities(tmp_path):
    rows = [{"v": [1.5, 2], "r": "fine", "u": 7}, {"v": None, "r": ["a", "b"], "u": None}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    modalities = {"vitals": "v", "report": "r", "user_ids": "u", "both": "{r} {u}"}
    samples = TableReader(files={"train": "t.jsonl"}, modalities=modalities).read(tmp_path)
    assert list(samples.modalities) == list(modalities)
    assert [samples.modalities["vitals"][row] for row in range(2)] == [(Value([1.5, 2]),), ()]
    assert [samples.modalities["report"][row] for row in range(2)] == [("fine",), ("a", "b")]
    assert [samples.modalities["user_ids"][row] for row in range(2)] == [(Value(7),), ()]
    assert samples.modalities["both"][0] == ("fine 7",)
    assert [name for name, column in samples.modalities.items() if column.is_text] == ["report", "both"]


def test_a_modality_that_is_declared_twice():
    with pytest.raises(ValueError, match=r"reader\.image"):
        TableReader(files={"train": "t.csv"}, image="a", modalities={"image": "b"})
