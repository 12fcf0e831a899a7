"""Datasets of several tasks: what a manifest may say of them, and targets with labels that are missing."""

import numpy as np
import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import Manifest, parse_manifest
from cachefuse.data.targets import is_labelled
from cachefuse.errors import DataError, ManifestError
from cachefuse.extraction.open_store import open_store
from cachefuse.metrics.tasks import TaskSlice
from fixtures.messages import naming

READER = 'reader = { kind = "table", files = { train = "all.csv" }, id = "id", text = "text", separator = " " }'
HEAD = f'name = "mine"\ntask = "multitask"\n{READER}\n'
COLOR = '[tasks.color]\ntask = "multiclass"\n'
TAGS = '[tasks.keywords]\ntask = "multilabel"\ncolumn = "tags"\n'
TABLE = "id,text,color,tags\na,x,red,new old\nb,y,,old\nc,z,blue,\nd,w,dark red,new\ne,v,,\n"


@pytest.fixture
def load(tmp_path):
    def read(text, table=TABLE):
        (tmp_path / "all.csv").write_text(table)
        return load_dataset(parse_manifest(text, "mine.toml"), tmp_path)

    return read


def test_targets_by_hand(load):
    data = load(HEAD + COLOR + TAGS + "min_labels = 1\n")
    assert data.classes == ("color=blue", "color=dark red", "color=red", "keywords=new", "keywords=old")
    assert data.targets.dtype == np.int8
    assert data.targets.tolist() == [
        [0, 0, 1, 1, 1],
        [-1, -1, -1, 0, 1],
        [1, 0, 0, -1, -1],
        [0, 1, 0, 1, 0],
        [-1, -1, -1, -1, -1],
    ]
    assert is_labelled(data.targets).tolist() == [True, True, True, True, False]
    assert data.manifest.task_slices(data.classes) == (
        TaskSlice("color", "multiclass", slice(0, 3)),
        TaskSlice("keywords", "multilabel", slice(3, 5), 1),
    )


def test_without_min_labels_an_empty_cell_says_that_there_is_none(load):
    data = load(HEAD + COLOR + TAGS)
    assert data.targets[:, 3:].tolist() == [[1, 1], [0, 1], [0, 0], [1, 0], [0, 0]]


def test_a_split_without_a_tasks_column_lacks_its_labels(tmp_path):
    (tmp_path / "all.csv").write_text("id,text,color\na,x,red\nb,y,blue\n")
    (tmp_path / "more.csv").write_text("id,text,tags\nc,z,new\n")
    text = HEAD.replace('"all.csv"', '"all.csv", val = "more.csv"') + COLOR + TAGS
    data = load_dataset(parse_manifest(text, "mine.toml"), tmp_path)
    assert data.targets.tolist() == [[0, 1, -1], [1, 0, -1], [-1, -1, 1]]


def test_classes_may_be_listed(load):
    data = load(HEAD + COLOR + 'classes = ["red", "green", "blue", "dark red"]\n' + TAGS)
    assert data.classes[:4] == ("color=red", "color=green", "color=blue", "color=dark red")
    with pytest.raises(DataError, match=naming("c blue")):
        load(HEAD + COLOR + 'classes = ["red", "dark red"]\n')


def test_data_that_contradict_the_tasks(load):
    with pytest.raises(DataError, match=naming("all.csv shade tasks.color.column")):
        load(HEAD + COLOR + 'column = "shade"\n')
    with pytest.raises(DataError, match="mine"):
        load(HEAD + COLOR, "id,text,color\na,x,\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "tasks tasks.color multiclass"),
        (HEAD.replace("multitask", "multilabel") + COLOR, "tasks"),
        (HEAD + COLOR.replace("color", '"Co lor"'), "tasks name"),
        (HEAD + COLOR.replace("multiclass", "retrieval"), "tasks.color.task multilabel"),
        (HEAD + "[tasks.color]\n", "tasks.color.task"),
        (HEAD + COLOR + "colour = 1\n", "tasks.color.colour"),
        (HEAD + COLOR + "min_labels = 1\n", "tasks.color.min_labels"),
        (HEAD + COLOR + 'classes = ["a", "a"]\n', "tasks.color.classes"),
        (HEAD + COLOR + "classes = []\n", "tasks.color.classes"),
        (HEAD + 'classes = ["a"]\n' + COLOR, "classes"),
        (HEAD + "min_labels = 1\n" + COLOR, "min_labels"),
        (HEAD.replace('id = "id"', 'id = "id", labels = "x"') + COLOR, "tasks"),
        (
            f'name = "mine"\ntask = "multitask"\nreader = {{ kind = "shapes" }}\n{COLOR}',
            "tasks shapes",
        ),
        (
            HEAD + 'submission = { id = "color" }\n' + COLOR,
            "submission id color",
        ),
        (HEAD + 'metrics = ["color.accuracy"]\n' + COLOR, "metrics color.accuracy"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense(text, message):
    with pytest.raises(ManifestError, match=naming(message)) as caught:
        parse_manifest(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")


def test_classes_that_are_not_those_of_the_tasks():
    manifest = parse_manifest(HEAD + COLOR + TAGS, "mine.toml")
    for classes in (("color=red",), ("keywords=new", "color=red"), ("color=red", "x=y", "keywords=new")):
        with pytest.raises(ManifestError, match="classes"):
            manifest.task_slices(classes)
    with pytest.raises(ManifestError, match=naming("x=y")):
        manifest.task_slices(("color=red", "keywords=new", "x=y"))


def test_metrics_of_the_tasks():
    manifest = parse_manifest(HEAD + COLOR + TAGS, "mine.toml")
    names = manifest.reported_metrics
    assert names[0] == manifest.main_metric == "mean"
    assert names[1:3] == ("color.accuracy", "color.macro_f1")
    assert {"color.recall_at_p90", "keywords.micro_f1", "keywords.recall_at_p90"} <= set(names)
    listed = parse_manifest(HEAD + 'metrics = ["macro_ap", "accuracy"]\n' + COLOR + TAGS, "mine.toml")
    assert listed.reported_metrics == (
        "mean", "color.macro_ap", "color.accuracy", "keywords.macro_ap", "keywords.accuracy",
    )  # fmt: skip


def test_a_store_keeps_the_tasks_and_what_is_missing(load, tmp_path):
    data = load(HEAD + COLOR + TAGS)
    store = open_store(tmp_path / "mine.zarr", data)
    np.testing.assert_array_equal(store.targets, data.targets)
    assert store.manifest == data.manifest
    assert list(store.manifest.tasks) == ["color", "keywords"]
    assert Manifest.model_validate(data.manifest.model_dump(mode="json", by_alias=True)) == data.manifest
