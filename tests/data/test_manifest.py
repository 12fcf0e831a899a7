import json
import pickle
from importlib import resources
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cachefuse.data import manifest as module
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import builtin_manifests, load_manifest, parse_manifest
from cachefuse.errors import ManifestError, UnknownNameError
from fixtures.columns import texts_of
from fixtures.messages import naming

HEAD = 'name = "mine"\ntask = "multiclass"\n'
TABLE = '[reader]\nkind = "table"\nfiles = { train = "train.csv" }\nid = "id"\ntext = "text"\nlabels = "label"\n'
PAIRS = 'name = "mine"\ntask = "similarity"\nreader = { kind = "sentence_pairs", files = { train = "a.tsv" } }\n'
ROWS = [{"id": f"{i}", "text": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]


def write_csv(folder):
    lines = [",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]
    (folder / "train.csv").write_text("\n".join(lines))


def write_jsonl(folder):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def write_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "train.parquet")


def write_images(folder):
    for i, row in enumerate(ROWS):
        path = folder / "photos" / row["label"] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(path)


def write_hdf5(folder):
    with h5py.File(folder / "train.h5", "w") as file:
        for key in ROWS[0]:
            file[key] = np.array([row[key] for row in ROWS], "S9")


@pytest.mark.parametrize(
    ("write", "reader"),
    [
        (write_csv, TABLE),
        (write_jsonl, TABLE.replace(".csv", ".jsonl")),
        (write_parquet, TABLE.replace(".csv", ".parquet")),
        (write_images, '[reader]\nkind = "folder"\nsplits = { train = "photos" }\n'),
        (write_hdf5, TABLE.replace(".csv", ".h5").replace('"table"', '"hdf5"')),
    ],
)
def test_a_users_own_data_in_a_few_lines(tmp_path, write, reader):
    write(tmp_path)
    (tmp_path / "mine.toml").write_text(HEAD + reader)
    manifest, folder = load_manifest(str(tmp_path / "mine.toml"))
    assert folder == tmp_path
    dataset = load_dataset(manifest, folder)
    assert len(dataset) == 4
    assert dataset.classes == ("a", "b")
    assert sorted(dataset.targets) == [0, 0, 1, 1]
    assert dataset.splits.tolist() == ["train"] * 4
    if texts_of(dataset) is not None:
        assert dataset.ids == ["0", "1", "2", "3"]
        assert texts_of(dataset)[3] == ("text 3",)


def test_builtin_manifests_say_what_a_user_needs():
    manifests = list(builtin_manifests())
    names = [manifest.name for manifest in manifests]
    assert names == sorted(names)
    assert {"comp5329", "fashiongen", "flickr8k", "food101", "mmimdb", "shapes"} <= set(names)
    assert {"cifar10", "cifar100", "coco_captions", "mrpc", "qqp", "stsb", "tiny_imagenet", "vqa2"} <= set(names)
    for manifest in manifests:
        assert manifest.title
        assert manifest.licence
        loaded, folder = load_manifest(manifest.name)
        assert loaded == manifest
        assert folder is None
        if manifest.reader["kind"] != "shapes":
            assert manifest.get
            assert manifest.layout
            assert manifest.rows


def test_manifests_are_found_in_a_checkout_that_is_not_installed(monkeypatch):
    def not_installed(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(resources, "files", not_installed)
    assert load_manifest("shapes")[0].name == "shapes"


def test_a_manifest_survives_pickle_and_json():
    manifest = parse_manifest(HEAD + TABLE + '[splits]\nval = { from = "train", fraction = 0.5 }\n', "x.toml")
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    content = json.loads(manifest.model_dump_json(by_alias=True))
    assert type(manifest).model_validate(content) == manifest
    assert manifest.open_reader() == pickle.loads(pickle.dumps(manifest)).open_reader()


def test_reported_metrics():
    assert parse_manifest(HEAD + TABLE, "x.toml").reported_metrics == ("accuracy", "macro_f1", "macro_ap")
    assert parse_manifest(HEAD + 'metrics = ["macro_f1"]\n' + TABLE, "x.toml").reported_metrics == ("macro_f1",)
    assert parse_manifest(PAIRS + "scale = [-1, 1]\n", "x.toml").reported_metrics == ()


def test_pairs_have_a_scale_or_two_classes():
    assert parse_manifest(PAIRS + "scale = [0, 5]\n", "x.toml").scale == (0.0, 5.0)
    paraphrase = PAIRS.replace("similarity", "paraphrase") + 'classes = ["no", "yes"]\n'
    assert parse_manifest(paraphrase, "x.toml").classes == ("no", "yes")


def test_questions_have_as_many_answers_to_choose_from_as_is_usual_or_as_are_asked_for():
    questions = HEAD.replace("multiclass", "vqa")
    assert parse_manifest(questions + TABLE, "x.toml").answers == 3129
    assert parse_manifest(questions + "answers = 9\n" + TABLE, "x.toml").answers == 9
    assert parse_manifest(questions + TABLE, "x.toml").reported_metrics == ("vqa_accuracy",)
    manifest = parse_manifest(HEAD + TABLE, "x.toml")
    assert manifest.answers is None
    assert "answers" not in manifest.model_dump(exclude_defaults=True)  # other datasets' stores say nothing of it


def test_classes_are_names_without_the_spaces_around_them():
    assert parse_manifest(HEAD + 'classes = [" cat ", "guinea pig"]\n' + TABLE, "x.toml").classes == (
        "cat",
        "guinea pig",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name"),
        (HEAD + TABLE.replace("text =", "caption ="), "reader.caption"),
        (HEAD + "colour = 1\n" + TABLE, "colour"),
        (HEAD + 'min_labels = "many"\n' + TABLE, "min_labels"),
        (HEAD + "min_labels = -1\n" + TABLE, "min_labels 0"),
        (HEAD + "classes = [1, 2]\n" + TABLE, "classes.0"),
        (HEAD + 'classes = "cat"\n' + TABLE, "classes"),
        (HEAD + "classes = []\n" + TABLE, "classes"),
        (HEAD + 'classes = ["cat", " "]\n' + TABLE, "classes class"),
        (HEAD + 'classes = ["cat", "dog", "cat "]\n' + TABLE, "classes"),
        (HEAD + 'metrics = ["f1"]\n' + TABLE, "metrics f1 accuracy"),
        (
            HEAD.replace("multiclass", "ranking") + TABLE,
            "task multilabel multiclass retrieval",
        ),
        (PAIRS, "scale 0.0 5.0"),
        (PAIRS + "scale = [5, 0]\n", "scale 5.0 0.0"),
        (PAIRS + "scale = [1, 1]\n", "scale"),
        (PAIRS + "scale = [0, inf]\n", "scale 0.0"),
        (PAIRS + "scale = [nan, 5]\n", "scale"),
        (PAIRS + "scale = [0]\n", "scale.1"),
        (PAIRS + 'scale = ["low", 5]\n', "scale.0"),
        (HEAD + "scale = [0, 5]\n" + TABLE, "scale"),
        (HEAD + "answers = 9\n" + TABLE, "answers"),
        (
            HEAD.replace("multiclass", "vqa") + "answers = 0\n" + TABLE,
            "answers 1",
        ),
        (PAIRS.replace("similarity", "paraphrase"), "classes"),
        (PAIRS.replace("similarity", "paraphrase") + 'classes = ["1"]\n', "classes"),
        (PAIRS.replace("similarity", "paraphrase") + 'classes = ["0", "0"]\n', "classes 0"),
        (
            HEAD.replace("multiclass", "sorting") + "scale = [0, 5]\n" + TABLE,
            "task multilabel",
        ),
        (
            HEAD + "other_rows = [{ train = 'many' }]\n" + TABLE,
            "other_rows.0.train",
        ),
        (
            HEAD + '[reader]\nkind = "sentence_pairs"\nfiles = { train = [] }',
            "reader.files.train 1",
        ),
        (
            HEAD + '[reader]\nkind = "sentence_pairs"\nfiles = { train = "a" }\ntexts = ["a", "a"]',
            "reader.texts a",
        ),
        (
            HEAD + '[reader]\nkind = "cifar"\nvariant = "cifar20"',
            "reader.variant cifar10",
        ),
        (HEAD.replace("mine", "../mine") + TABLE, "name"),
        (HEAD.replace("mine", "..") + TABLE, "name"),
        (HEAD + "reader = 3", "reader"),
        (
            HEAD + "[reader]\nfiles = {}",
            "reader cifar coco_captions flickr8k folder hdf5",
        ),
        (HEAD + "[reader]\nkind = 3", "reader"),
        (
            HEAD + '[reader]\nkind = "tabel"',
            "reader tabel table",
        ),
        (HEAD + '[reader]\nkind = "table"', "reader.files"),
        (HEAD + '[reader]\nkind = "table"\nfiles = {}', "reader.files 1"),
        (HEAD + '[reader]\nkind = "hdf5"\nfiles = { train = "a.h5" }', "reader image text"),
        (HEAD + TABLE + "[splits]\nval = { fraction = 0.1 }", "splits.val.from"),
        (
            HEAD + TABLE + '[splits]\nval = { from = "train", fraction = 1.5 }',
            "splits.val.fraction",
        ),
        (HEAD + TABLE + "[submission]\nid = 3", "submission.id"),
        ("name = ", "TOML"),
        ("name = 'a'\nname = 'b'", "TOML"),
        ("a = " + "[" * 100_000, "TOML"),
        ("a = " + "1" * 10_000, "TOML"),
        ("a = '\0'", "TOML"),
    ],
)
def test_each_problem_is_named_with_file_and_key(text, message):
    with pytest.raises(ManifestError, match=naming(f"mine.toml {message}")):
        parse_manifest(text, "mine.toml")


def test_all_problems_are_named_at_once():
    text = 'name = "mine"\ntask = "sorting"\nmetrics = ["f1"]\ncolour = 1\n' + TABLE.replace("text =", "caption =")
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "mine.toml")
    for part in (
        "mine.toml: ",
        "task: ",
        "metrics: unknown metric",
        "colour: unknown key",
        "reader.caption: unknown key",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_manifest(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(ManifestError, match=naming("mine.toml")):
        load_manifest(str(path))
    with pytest.raises(ManifestError, match="file"):
        load_manifest(f"{tmp_path}/")
    path.write_bytes(HEAD.encode() + b"title = '\xff'\n")
    with pytest.raises(ManifestError, match=naming("mine.toml UTF-8 text")):
        load_manifest(str(path))
    path.write_bytes(b"#" * (module.MAX_BYTES + 1))
    with pytest.raises(ManifestError, match=naming("mine.toml 1,048,576")):
        load_manifest(str(path))


@pytest.mark.parametrize("encoded", [(HEAD + TABLE).encode("utf-8-sig"), (HEAD + TABLE).replace("\n", "\r\n").encode()])
def test_manifests_from_other_editors(tmp_path, encoded):
    (tmp_path / "mine.toml").write_bytes(encoded)
    assert load_manifest(str(tmp_path / "mine.toml"))[0].name == "mine"


def test_folder_of_a_relative_manifest_is_absolute(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(HEAD + TABLE)
    monkeypatch.chdir(tmp_path)
    assert load_manifest("mine.toml")[1] == Path.cwd()


@pytest.mark.parametrize(("name", "hint"), [("shape", "shapes"), ("", "")])
def test_unknown_dataset(name, hint):
    with pytest.raises(UnknownNameError, match=naming(f"{name} {hint} cifar10")):
        load_manifest(name)


@pytest.mark.parametrize("path", ["/etc/passwd.csv", "../other.csv", "a/../../b.csv"])
@pytest.mark.parametrize(
    "reader",
    [
        'kind = "table"\nfiles',
        'kind = "hdf5"\nfiles',
        'kind = "folder"\nsplits',
        'kind = "sentence_pairs"\nfiles',
    ],
)
def test_a_manifest_cannot_name_files_outside_the_data_folder(reader: str, path: str) -> None:
    text = f'name = "mine"\ntask = "multiclass"\n[reader]\n{reader} = {{ train = "{path}" }}\n'
    with pytest.raises(ManifestError, match=r"reader\.(files|splits)\.train"):
        parse_manifest(text, "mine.toml")
