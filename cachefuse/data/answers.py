"""Answers to questions about images: their normal form, the classes they make, and how right an answer is.

Ten people answered each question, and an answer is as right as many of them gave it (Antol et al., "VQA: Visual
Question Answering", arXiv 1505.00468). Answers are compared in the normal form of the VQA evaluation.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cachefuse.errors import DataError

N_ANSWERS = 10  # a question, at most
ENOUGH = 3  # people who gave an answer that is wholly right
NO_ANSWER, OTHER_ANSWER = -1, -2  # in the place of a class: nobody answered; an answer that is no class

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# Known to the evaluation where one apostrophe is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    whole[:i] + whole[i + 1 :]: whole
    for whole in _CONTRACTIONS.split()
    for i, letter in enumerate(whole)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, as there


def normalise_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it: "A T-shirt!" is "t shirt", "two dogs" "2 dogs".

    It is lower case, without punctuation, articles and full stops; number words up to ten are digits, and contractions
    have their apostrophes. A mark between two letters becomes a space; one beside a space, or any in a text that has a
    number such as 1,000, goes without one. May be empty.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = bool(_NUMBER_WITH_COMMA.search(text))
    plain = text
    for mark in PUNCTUATION:
        apart = has_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if apart else " ")
    words = [NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def frequent_answers(rows: Iterable[Sequence[str]], n: int) -> tuple[str, ...]:
    """Return the ``n`` normalised answers that people gave most often, or all: by frequency, then by name."""
    counts: Counter[str] = Counter()
    for answer, times in Counter(answer for row in rows for answer in row).items():
        counts[normalise_answer(answer)] += times
    del counts[""]
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:n])


def encode_answers(ids: Sequence[str], rows: Sequence[Sequence[str] | None], classes: Sequence[str]) -> np.ndarray:
    """Return the classes of each row's answers, (N, 10) int32: -2 for one that is no class, -1 where there is none.

    A row that is None has none. Raises DataError, naming the row by its id, for more than ten answers.
    """
    numbers = {normalise_answer(name): i for i, name in enumerate(classes)}
    known: dict[str, int] = {}  # by the answer as it was given: few differ, and the normal form takes long
    targets = np.full((len(rows), N_ANSWERS), NO_ANSWER, np.int32)
    for i, row in enumerate(rows):
        if row and len(row) > N_ANSWERS:
            raise DataError(f"row {ids[i]!r} has {len(row)} answers; a question has at most {N_ANSWERS}")
        for k, answer in enumerate(row or ()):
            if answer not in known:
                known[answer] = numbers.get(normalise_answer(answer), OTHER_ANSWER)
            targets[i, k] = known[answer]
    return targets


def vqa_accuracy(predicted: Sequence[str] | np.ndarray, answers: Sequence[Sequence[str]] | np.ndarray) -> np.ndarray:
    """Return how right each prediction is, (N,) from 0 to 1: ``min(people who gave it / 3, 1)``; NaN where nobody did.

    Where fewer than three people answered at all, one that all of them gave is wholly right. (The evaluation server
    compares with nine of the ten people at a time: for ten it comes to min(0.3 n, 1).)

    ``predicted`` are N texts with each question's answers as texts, or class numbers (N,) with ``answers`` (N, 10) as a
    store's targets have them, which is exact, as a class can't be an answer that is none. Raises DataError if the two
    differ in length, or are not of one kind.
    """
    if len(predicted) != len(answers) or isinstance(predicted, np.ndarray) != isinstance(answers, np.ndarray):
        raise DataError(
            f"predictions and answers must be N class numbers and an array (N, {N_ANSWERS}), or N texts and N lists of "
            f"texts. Got {_describe(predicted)} and {_describe(answers)} instead"
        )
    if isinstance(predicted, np.ndarray) and isinstance(answers, np.ndarray):
        hits = ((answers == predicted[:, None]) & (answers >= 0)).sum(1)
        people = (answers != NO_ANSWER).sum(1)
    else:
        given = [[normalise_answer(answer) for answer in row] for row in answers]
        hits = np.array([row.count(normalise_answer(text)) for text, row in zip(predicted, given, strict=True)], int)
        people = np.array([len(row) for row in given], int)
    right = np.minimum(hits / np.clip(people, 1, ENOUGH), 1)
    return np.where(people > 0, right, np.nan)


def _describe(values: Sequence[object] | np.ndarray) -> str:
    return f"an array {values.shape}" if isinstance(values, np.ndarray) else f"{len(values)} texts"
