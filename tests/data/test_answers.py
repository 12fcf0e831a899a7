"""Answers against figures worked out by hand, and against the steps of the VQA evaluation as they are published."""

import numpy as np
import pytest

from cachefuse.data.answers import (
    CONTRACTIONS,
    N_ANSWERS,
    encode_answers,
    frequent_answers,
    normalise_answer,
    vqa_accuracy,
)
from cachefuse.errors import DataError
from fixtures.messages import naming

# The normal form


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        (" yes\n", "yes"),
        ("2\tdogs", "2 dogs"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("a the AN", ""),
        ("the cat on a mat", "cat on mat"),
        ("theatre", "theatre"),
        ("yes.", "yes"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("t-shirt", "t shirt"),  # between two letters a mark is a space
        ("t- shirt", "t shirt"),  # beside a space it goes
        ("yes/no", "yes no"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("red, white,blue", "red whiteblue"),  # a mark goes everywhere if it is beside a space somewhere
        ("red , t-shirt", "red t shirt"),  # each mark for itself
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # and every mark, beside a number with a comma
        ("what?!", "what"),
        ('"stop"', "stop"),
        ("[a] {b} (c) <d> e=f+g\\h_i;j@k`l", "b c d e f g h i j k l"),
        ("what's up", "what's up"),
        ("whats up", "what's up"),
        ("DONT KNOW", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("'ow'sat", "'ow's'at"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # in the published table it is Im, which is never met in lower case
        ("shes", "shes"),
        ("", ""),
        ("?", ""),
        ("ñandú 日本", "ñandú 日本"),
    ],
)
def test_the_normal_form(text, expected):
    assert normalise_answer(text) == expected


def test_contractions_lack_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    reverse = {"somebody'd": "somebodyd"}
    assert reverse.items() <= CONTRACTIONS.items()
    for short, whole in CONTRACTIONS.items() - reverse.items():
        assert short.replace("'", "") == whole.replace("'", "")
        assert whole.count("'") == short.count("'") + 1


@pytest.mark.parametrize("text", ["a t-shirt", "1,000 dollars", "dont", "three", "yes.", "u.s.a"])
def test_the_normal_form_of_a_normal_form_is_itself(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once


# Classes


def test_the_most_frequent_answers_are_the_classes():
    rows = [("Yes", "yes.", "no"), ("the", "?"), ("two", "2", "no", "blue"), ("red",)]
    assert frequent_answers(rows, 10) == ("2", "no", "yes", "blue", "red")
    assert frequent_answers(rows, 3) == ("2", "no", "yes")
    assert frequent_answers([], 3) == ()
    assert frequent_answers([("the",)], 3) == ()


def test_answers_become_the_numbers_of_their_classes():
    rows = [("Yes", "the", "no!", "blue"), None, (), ("yes",) * 10]
    targets = encode_answers(["a", "b", "c", "d"], rows, ("no", "yes"))
    assert (targets.dtype, targets.shape) == (np.int32, (4, N_ANSWERS))
    assert targets.tolist() == [[1, -2, 0, -2, *[-1] * 6], [-1] * 10, [-1] * 10, [1] * 10]


def test_classes_that_are_given_are_compared_in_their_normal_form():
    assert encode_answers(["a"], [("two", "t shirt")], ("T-shirt", "Two"))[0, :2].tolist() == [1, 0]


def test_more_answers_than_ten():
    with pytest.raises(DataError, match=naming("b 11 10")):
        encode_answers(["a", "b"], [("x",), ("x",) * 11], ("x",))


# How right an answer is

GIVEN = [["yes"] * n + ["no"] * (10 - n) for n in range(11)]


def test_three_people_beside_the_one_left_out_are_enough():
    right = vqa_accuracy(["Yes."] * 10, GIVEN[:10])
    np.testing.assert_allclose(right, [0, 0.3, 0.6, 0.9, *[1] * 6])


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (["yes"], 1),
        (["yes", "no"], 1 / 2),
        (["yes", "no", "yes"], 2 / 3),
        (["yes", "no", "yes", "yes"], 3 / 4),
        (["yes", "no", "yes", "yes", "no"], (3 * 2 / 3 + 2 * 1) / 5),
        (["yes", "no"] * 4, 1),
    ],
)
def test_of_fewer_people(answers, right):
    assert vqa_accuracy(["yes"], [answers]).tolist() == [pytest.approx(right)]
    assert vqa_accuracy(np.array([0]), encode_answers(["a"], [answers], ["yes"])).tolist() == [pytest.approx(right)]


def test_class_numbers_are_measured_as_their_texts():
    rng = np.random.default_rng(0)
    words = np.array(["yes", "no", "2", "blue", "a rare one", "another"])
    texts = [tuple(row) for row in words[rng.integers(0, 6, (200, 10))].tolist()]
    classes = ("yes", "no", "2", "blue")
    targets = encode_answers([""] * 200, texts, classes)
    predicted = rng.integers(0, 4, 200)
    np.testing.assert_allclose(
        vqa_accuracy(predicted, targets),
        vqa_accuracy([classes[i] for i in predicted], texts),
    )


def test_nobody_s_answer_is_no_number():
    assert np.isnan(vqa_accuracy(["yes"], [[]])).all()
    targets = encode_answers(["a", "b"], [None, ("rare",)], ("yes",))
    np.testing.assert_array_equal(vqa_accuracy(np.array([0, 0]), targets), [np.nan, 0])


def test_what_is_no_class_is_never_right():
    targets = encode_answers(["a"], [("rare",) * 10], ("yes",))
    for predicted in (-2, -1):
        assert vqa_accuracy(np.array([predicted]), targets).tolist() == [0]


@pytest.mark.parametrize(
    ("predicted", "answers", "got"),
    [
        (["yes"], [["yes"], ["no"]], "1 2"),
        (np.array([1]), [["yes"]], "(1,) 1"),
        (["yes"], np.zeros((1, 10), int), "1 (1, 10)"),
        (np.zeros(2, int), np.zeros((3, 10), int), "(2,) (3, 10)"),
    ],
)
def test_predictions_and_answers_of_other_kinds(predicted, answers, got):
    with pytest.raises(DataError, match=naming(f"predictions answers {got}")):
        vqa_accuracy(predicted, answers)


def test_two_classes_that_are_one_answer_are_refused():
    with pytest.raises(DataError, match=naming("T-shirt shirt")):
        encode_answers(["1"], [["red"]], ["red", "T-shirt", "t shirt"])
