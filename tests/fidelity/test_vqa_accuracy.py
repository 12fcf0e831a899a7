"""VQA accuracy against the official evaluation, restated person by person from its published description.

https://visualqa.org/evaluation.html: an answer's accuracy is the mean over the ten people of min(matches among the
other nine / 3, 1). Answers and prediction are processed (punctuation, digits, articles, contractions) only where the
ten answers are not all alike. The normal form itself is tested in tests/data/test_answers.py.
"""

import json
import random

import h5py
import numpy as np
import pytest
import torch

from cachefuse.data.answers import N_ANSWERS, encode_answers, frequent_answers, normalise_answer, vqa_accuracy
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import CacheError
from cachefuse.metrics import METRICS
from cachefuse.metrics.decisions import decide
from cachefuse.training.data import TrainingData
from cachefuse.training.feature_table import AnswerTargets, FeatureTable

WORDS = (
    "yes", "Yes", "yes.", "no", "No!", "two", "2", "2 ", "a dog", "dog", "the dog", "Dogs", "1,000", "1000", "ñ", "3.5",
    "don't know", "dont know", "red, white", "red white", "t-shirt", "t shirt", "", "?", "the", "none", "0", "straße",
    "日本", "two\tdogs", "2 dogs", "U.S.", "us", "it's", "its", "\tblue\n", "blue", "yes/no", "'twas", "twas",
)  # fmt: skip


def official(predicted, answers):
    """The accuracy of one prediction: Python floats, one person at a time."""

    def one_line(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    people, said = [one_line(answer) for answer in answers], one_line(predicted)
    if len(set(people)) > 1:
        people, said = [normalise_answer(answer) for answer in people], normalise_answer(said)
    accuracies = []
    for i in range(len(people)):
        others = people[:i] + people[i + 1 :]
        accuracies.append(min(1.0, sum(other == said for other in others) / 3))
    return sum(accuracies) / len(accuracies)


def questions(n, seed, least=N_ANSWERS):
    """n questions with ``least`` to ten answers, often alike, and a prediction for each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        k = draw.randint(least, N_ANSWERS)
        few = draw.sample(WORDS, draw.choice((1, 1, 2, 3, 5)))
        answers = draw.choices(few, k=k)
        rows.append((answers, draw.choice([*few, *few, draw.choice(WORDS)])))
    return rows


def test_one_person_agrees_with_nobody():
    """The evaluation is for ten people; with one, the normal form decides, as where people differ."""
    assert vqa_accuracy(["dog"], [["A dog."]]).tolist() == [1]
    assert encode_answers(["a"], [("A dog.",)], ("dog",))[0, 0] == 0


def test_three_red_of_ten():
    assert vqa_accuracy(["red"], [["red"] * 3 + ["blue"] * 7]).tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("least", [10, 4])
def test_texts(least):
    rows = questions(6000, least, least)
    found = vqa_accuracy([text for _, text in rows], [answers for answers, _ in rows])
    np.testing.assert_allclose(found, [official(text, answers) for answers, text in rows], atol=1e-12)


def test_numbers_of_classes_as_a_store_has_them():
    rows = [answers for answers, _ in questions(4000, 1, least=4)]
    classes = frequent_answers(rows, 20)
    targets = encode_answers([""] * len(rows), rows, classes)
    predicted = np.random.default_rng(0).integers(0, len(classes), len(rows))
    expected = [official(classes[c], row) for c, row in zip(predicted, rows, strict=True)]
    np.testing.assert_allclose(vqa_accuracy(predicted, targets), expected, atol=1e-12)


def data_of(rows, classes, **about):
    n = len(rows)
    table = FeatureTable(
        features={}, specs={}, present={}, labelled=np.ones(n, bool), splits=np.full(n, "val"),
        targets=AnswerTargets(torch.from_numpy(encode_answers([""] * n, rows, classes)), len(classes)),
    )  # fmt: skip
    data = TrainingData.of_one_task("vqa", table, classes, "vqa", ("vqa_accuracy",))
    return TrainingData(**{**vars(data), **about})


def test_the_metric_of_a_training():
    rows = [answers for answers, _ in questions(2000, 2)]
    classes = frequent_answers(rows, 15)
    data = data_of(rows, classes)
    scores = np.random.default_rng(0).random((len(rows), len(classes)))
    expected = np.mean([official(classes[c], row) for c, row in zip(scores.argmax(1), rows, strict=True)])
    targets = data.targets(torch.arange(len(rows)))
    assert METRICS["vqa_accuracy"](targets, scores, decide(scores, "vqa")) == pytest.approx(expected, abs=1e-7)


def test_what_a_head_learns_is_the_soft_target():
    """min(people / 3, 1) in the normal form, also where all people agree on another spelling than the class."""
    rows = [["a dog"] * 10, ["a dog"] * 2 + ["cat"] * 8]
    data = data_of(rows, ("dog", "cat"))
    np.testing.assert_allclose(data.table.targets[torch.arange(2)], [[1, 0], [2 / 3, 1]])
    np.testing.assert_allclose(data.targets(torch.arange(2)), [[0, 0], [0.6, 1]])
    assert [official("dog", row) for row in rows] == pytest.approx([0, 0.6])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "hdf5"])
def test_a_file_keeps_every_person(tmp_path, kind):
    """Those who said nothing too, and those who said the same: each is one of the ten of the official accuracy."""
    rng = random.Random(0)
    rows = [[rng.choice(("yes", "no", "2", "", " ")) for _ in range(rng.randint(4, 10))] for _ in range(60)]
    rows = [row for row in rows if any(answer.strip() for answer in row)]
    joined = ["|".join(row) for row in rows]
    if kind == "jsonl":
        lines = [json.dumps({"id": str(i), "q": "who", "a": row}) for i, row in enumerate(rows)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    elif kind == "csv":
        (tmp_path / "rows.csv").write_text("id,q,a\n" + "".join(f"{i},who,{a}\n" for i, a in enumerate(joined)))
    else:
        with h5py.File(tmp_path / "rows.hdf5", "w") as file:
            for name, column in {"id": map(str, range(len(rows))), "q": ["who"] * len(rows), "a": joined}.items():
                file[name] = np.array([*column], "S99")
    separator = {"csv": 'separator = "|"', "hdf5": 'label_separator = "|"'}.get(kind, "")
    text = f"""name = "q"
task = "vqa"
classes = ["yes", "no", "2"]
[reader]
kind = "{"hdf5" if kind == "hdf5" else "table"}"
files = {{ train = "rows.{kind}" }}
id = "id"
text = "q"
labels = "a"
{separator}"""
    dataset = load_dataset(parse_manifest(text, "q.toml"), tmp_path)
    for c, name in enumerate(dataset.classes):
        found = vqa_accuracy(np.full(len(rows), c), dataset.targets)
        assert found == pytest.approx([official(name, row) for row in rows])


def test_a_store_without_spellings_has_no_figure():
    data = data_of([["red"] * 10], ("red",), measures_answers=False)
    with pytest.raises(CacheError, match=r"cachefuse extract --dataset vqa"):
        data.targets(torch.arange(1))
