"""Answers to questions about images: their normal form, their classes, and the accuracy of an answer.

Ten people answered each question. The accuracy of an answer depends on how many of them gave it (Antol et al., "VQA:
Visual Question Answering", arXiv 1505.00468). It is that of the official evaluation (github.com/GT-Vision-Lab/VQA).
It compares answers in a normal form, or as they are where all people gave the same.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cachefuse.errors import DataError

N_ANSWERS = 10  # maximum per question
ENOUGH = 3  # an answer of so many other people is fully right
NO_ANSWER, OTHER_ANSWER = -1, -2  # instead of a class: no answer; an answer that is not a class
# A number n below OTHER_ANSWER is an answer that all people gave, with the normal form of class UNLIKE - n, but another
# spelling than the class. A head learns it. The evaluation, which then compares answers as they are, does not count it.
UNLIKE = -3
EVALUATION = 2  # the version of these numbers in stores, and of the accuracy in runs; version 1 lacked the above

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The evaluation corrects these if one apostrophe is missing.
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
} | {"somebody'd": "somebodyd"}  # the evaluation does this one the other way round


def _left_out(hits: int, people: int) -> float:
    """Return the mean over people of min(the others who gave the answer / 3, 1), if ``hits`` of them gave it.

    For ten people it is min(0.3 hits, 1). With fewer than three others, an answer that all of them gave is fully right;
    the mean is then the share of people who gave it.
    """
    if people <= ENOUGH:
        return hits / max(people, 1)
    return (hits * min((hits - 1) / ENOUGH, 1) + (people - hits) * min(hits / ENOUGH, 1)) / people


# By the number of people who gave the answer, and of all people, (11, 11).
ACCURACY = np.array([[_left_out(min(n, k), k) for k in range(N_ANSWERS + 1)] for n in range(N_ANSWERS + 1)])


def normalise_answer(text: str) -> str:
    """Return an answer's normal form in the VQA evaluation: "A T-shirt!" is "t shirt", "two dogs" is "2 dogs".

    It is lower case, without punctuation, articles and full stops. Number words up to ten become digits, and
    contractions get their apostrophes. A mark between two letters becomes a space. A mark beside a space is removed, as
    are all marks in a text with a number such as 1,000. The result may be empty.
    """
    text = _plain(text)
    has_number = bool(_NUMBER_WITH_COMMA.search(text))
    plain = text
    for mark in PUNCTUATION:
        remove = has_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if remove else " ")
    words = [NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def frequent_answers(rows: Iterable[Sequence[str]], n: int) -> tuple[str, ...]:
    """Return the ``n`` most frequent normalised answers (fewer if there are fewer), by frequency, then by name."""
    counts: Counter[str] = Counter()
    for answer, times in Counter(answer for row in rows for answer in row).items():
        counts[normalise_answer(answer)] += times
    del counts[""]
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:n])


def encode_answers(ids: Sequence[str], rows: Sequence[Sequence[str] | None], classes: Sequence[str]) -> np.ndarray:
    """Return the classes of each row's answers, (N, 10) int32: -2 for an answer that is not a class, -1 for no answer.

    If all people gave the same answer, in another spelling than the class c's, it is -3 - c: see ``UNLIKE``. A row may
    be None. Raises DataError, naming the row by its id, for more than ten answers, and for classes that are one answer.
    """
    numbers: dict[str, int] = {}
    for i, name in enumerate(classes):
        first = numbers.setdefault(normalise_answer(name), i)
        if first != i:
            raise DataError(
                f"the classes {classes[first]!r} and {name!r} are one answer to the VQA evaluation; keep one"
            )
    known: dict[str, int] = {}  # by raw answer: few are distinct, and the normal form is slow
    targets = np.full((len(rows), N_ANSWERS), NO_ANSWER, np.int32)
    for i, row in enumerate(rows):
        if row and len(row) > N_ANSWERS:
            raise DataError(f"row {ids[i]!r} has {len(row)} answers; a question has at most {N_ANSWERS}")
        for k, answer in enumerate(row or ()):
            if answer not in known:
                known[answer] = numbers.get(normalise_answer(answer), OTHER_ANSWER)
            targets[i, k] = known[answer]
        if row and targets[i, 0] >= 0 and _all_alike(row) and _plain(row[0]) != _plain(classes[targets[i, 0]]):
            targets[i, : len(row)] = UNLIKE - targets[i, 0]
    return targets


def vqa_accuracy(predicted: Sequence[str] | np.ndarray, answers: Sequence[Sequence[str]] | np.ndarray) -> np.ndarray:
    """Return the accuracy of each prediction, (N,) in [0, 1], as the VQA evaluation does; NaN without answers.

    It is the mean over the people, each left out once, of min(others who gave the answer / 3, 1). For ten people it is
    min(0.3 n, 1). Of one to three people it is the share of those who gave the answer. Texts are compared in their
    normal form, or as they are if all people gave the same.

    ``predicted`` are N texts, with ``answers`` as N lists of texts, or class numbers (N,), with ``answers`` (N, 10) as
    in a store's targets. Both give the same result. Raises DataError if the two differ in length or kind, and for more
    than ten answers.
    """
    if len(predicted) != len(answers) or isinstance(predicted, np.ndarray) != isinstance(answers, np.ndarray):
        raise DataError(
            f"predictions and answers must be N class numbers and an array (N, {N_ANSWERS}), or N texts and N lists of "
            f"texts. Got {_type_name(predicted)} and {_type_name(answers)} instead"
        )
    if isinstance(predicted, np.ndarray) and isinstance(answers, np.ndarray):
        hits = ((answers == predicted[:, None]) & (answers >= 0)).sum(1)
        people = (answers != NO_ANSWER).sum(1)
    else:
        hits = np.array([_matches(text, row) for text, row in zip(predicted, answers, strict=True)], int)
        people = np.array([len(row) for row in answers], int)
    if people.max(initial=0) > N_ANSWERS:
        raise DataError(f"a question has at most {N_ANSWERS} answers. Got {people.max()} instead")
    return np.where(people > 0, ACCURACY[hits, people], np.nan)


def _matches(predicted: str, answers: Sequence[str]) -> int:
    """Return how many of the answers the evaluation takes for the predicted one."""
    form = _plain if _all_alike(answers) else normalise_answer
    return [form(answer) for answer in answers].count(form(predicted))


def _all_alike(answers: Sequence[str]) -> bool:
    """Whether several people all gave one answer."""
    return len(answers) > 1 and len({_plain(answer) for answer in answers}) == 1


def _plain(text: str) -> str:
    """Return a text on one line, without spaces around it: all that the evaluation does before it compares."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _type_name(values: Sequence[object] | np.ndarray) -> str:
    return f"an array {values.shape}" if isinstance(values, np.ndarray) else f"{len(values)} texts"
