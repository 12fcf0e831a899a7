"""VQA v2: questions about photographs of COCO, with ten people's answers each (Goyal et al., arXiv 1612.00837)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachefuse.data.answers import N_ANSWERS
from cachefuse.data.column import Column, TextOrSource, TooLong, checked_text
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import Reader, Samples, well_formed
from cachefuse.data.readers.folder import links_out, note_links
from cachefuse.data.readers.json_file import read_objects
from cachefuse.errors import DataError
from cachefuse.files import JsonObject

SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015"}
UNANSWERED = ("test",)  # splits without published annotations
MAX_JSON_BYTES = 1_000_000_000  # the largest has 390 MB
MAX_IMAGE_ID = 10**12 - 1  # file names have 12 digits
TYPES = ("answer_type", "question_type")  # as the evaluation names them
KEPT = frozenset(("questions", "annotations", "question_id", "image_id", "question", "answers", *TYPES))


@dataclass(frozen=True)
class SplitFiles:
    """A split's files: questions, answers (None if they are unpublished), and the folder of images."""

    questions: Path
    annotations: Path | None
    images: Path


@dataclass(frozen=True, slots=True)
class Question:
    """One row. All questions about one image share the object ``image``; ``group`` is its number.

    ``types`` are those of ``TYPES``, "" without annotation.
    """

    id: str
    split: str
    answers: tuple[str, ...] | None
    image: FileImage | None
    text: TextOrSource
    group: str
    types: tuple[str, ...]


class Vqa2Reader(Reader):
    """Reads every question of the existing splits. The id is the question's number, the text the question.

    Questions about one image share its features. They form one group, which a hash split never separates.
    """

    def missing(self, root: Path) -> list[str]:
        lacking = {split: _lacking(root, split) for split in SPLITS}
        if not all(lacking.values()):
            return []
        return [name for split in SPLITS for name in lacking[split]]

    def read(self, root: Path) -> Samples:
        missing = self.missing(root)
        if missing:
            raise DataError(f"{root}: has no {' and no '.join(missing)}")
        questions: list[Question] = []
        notes: list[str] = []
        for split in SPLITS:
            lacking = _lacking(root, split)
            if lacking:
                notes.append(f"has no {split} split without {' and '.join(lacking)}")
            else:
                questions += _read_split(split, _files(root, split), root, notes)
        return Samples(
            ids=[question.id for question in questions],
            splits=[question.split for question in questions],
            labels=[question.answers for question in questions],
            modalities={
                "image": Column([question.image for question in questions], shared=True),
                "text": Column.texts([(question.text,) if question.text else () for question in questions]),
            },
            groups=[question.group for question in questions],
            kinds={name: [question.types[i] for question in questions] for i, name in enumerate(TYPES)},
            notes=notes,
        )


def _files(root: Path, split: str) -> SplitFiles:
    """Return the paths of a split's files, which may be missing."""
    name = SPLITS[split]
    folders = [folder / name for folder in (root, root / "images")]
    return SplitFiles(
        questions=root / f"v2_OpenEnded_mscoco_{name}_questions.json",
        annotations=None if split in UNANSWERED else root / f"v2_mscoco_{name}_annotations.json",
        images=next((folder for folder in folders if folder.is_dir()), folders[0]),
    )


def _lacking(root: Path, split: str) -> list[str]:
    """Return the missing files and folders of a split."""
    files = _files(root, split)
    lacking = [path.name for path in (files.questions, files.annotations) if path is not None and not path.is_file()]
    return lacking if files.images.is_dir() else [*lacking, f"{files.images.name}/"]


def _read_split(split: str, files: SplitFiles, root: Path, notes: list[str]) -> Iterator[Question]:
    questions = _read_questions(check_inside(files.questions, root))
    answers: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    if files.annotations is not None:
        answers = _read_answers(check_inside(files.annotations, root), questions, notes)
        unanswered = [number for number in questions if number not in answers]
        if unanswered:
            note = f"{len(unanswered):,} {split} questions have no answers in {files.annotations.name}"
            notes.append(f"{note}, such as {unanswered[0]}")
    links, skipped = links_out(files.images, root), []
    images: dict[int, FileImage | None] = {}
    for number, (image, text) in questions.items():
        if image not in images:
            name = f"COCO_{SPLITS[split]}_{image:012d}.jpg"
            images[image] = None if name in links else FileImage(files.images / name, root)
            if name in links:
                skipped.append(f"{files.images.name}/{name}")
        given, types = answers.get(number, (None, ("",) * len(TYPES)))
        yield Question(str(number), split, given, images[image], text, str(image), types)
    note_links(notes, skipped)


def _read_questions(path: Path) -> dict[int, tuple[int, TextOrSource]]:
    """Return each question's image and text, by its number. Raises DataError for other content."""
    questions: dict[int, tuple[int, TextOrSource]] = {}
    for _, i, question in read_objects(path, MAX_JSON_BYTES, "VQA", _keep, ("questions",)):
        where = f"{path.name}: question {i}"
        number, text = _number(question, "question_id", where), question.get("question")
        if number in questions:
            raise DataError(f"{where} has the question_id {number} of an earlier question")
        if not isinstance(text, str | TooLong):
            raise DataError(f"{where} must have a text. Got {str(text)[:80]!r} instead")
        kept = text if isinstance(text, TooLong) else checked_text(well_formed(text.strip()))
        questions[number] = _number(question, "image_id", where), kept
    return questions


def _read_answers(
    path: Path, questions: dict[int, tuple[int, TextOrSource]], notes: list[str]
) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the ten answers to each question, and its types. Raises DataError for other content."""
    answers: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    interned: dict[str, str] = {}  # few answers are distinct: each is kept once
    unknown = []
    for _, i, annotation in read_objects(path, MAX_JSON_BYTES, "VQA", _keep, ("annotations",)):
        where = f"{path.name}: annotation {i}"
        number, image = _number(annotation, "question_id", where), _number(annotation, "image_id", where)
        texts = _answers(annotation, where)
        if number in answers:
            raise DataError(f"{where} is of question {number}, as is an earlier one")
        if number not in questions:
            unknown.append(number)
        elif questions[number][0] != image:
            raise DataError(f"{where} is about image {image}, but its question {number} about {questions[number][0]}")
        else:
            types = [well_formed(str(annotation.get(name) or "")) for name in TYPES]
            kept = [tuple(interned.setdefault(text, text) for text in some) for some in (texts, types)]
            answers[number] = kept[0], kept[1]
    if unknown:
        notes.append(f"dropped {len(unknown):,} annotations of unknown questions, such as {unknown[0]}")
    return answers


def _answers(annotation: JsonObject, where: str) -> list[str]:
    """Return the answers; a blank one is a person's too, but nobody's who matches."""
    answers = annotation.get("answers")
    if not isinstance(answers, list) or len(answers) != N_ANSWERS:
        got = f"{len(answers)} of them" if isinstance(answers, list) else repr(str(answers)[:80])
        raise DataError(f'{where} must have a list "answers" of {N_ANSWERS}. Got {got} instead')
    for answer in answers:
        if not isinstance(answer, str):
            raise DataError(f"{where} must have texts as its answers. Got {str(answer)[:80]!r} instead")
    return [well_formed(answer.strip()) for answer in answers]


def _keep(entry: JsonObject) -> JsonObject | str:
    """Reduce an answer to its text, and other objects to the keys that are read; there are millions."""
    answer = entry.get("answer")
    return answer if isinstance(answer, str) else {key: entry[key] for key in KEPT & entry.keys()}


def _number(entry: JsonObject, key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value <= MAX_IMAGE_ID:
        raise DataError(f"{where} must have a whole number as its {key}. Got {str(value)[:80]!r} instead")
    return value
