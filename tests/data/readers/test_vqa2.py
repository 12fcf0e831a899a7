import json

import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest, parse_manifest
from cachefuse.data.readers import vqa2
from cachefuse.data.readers.vqa2 import Vqa2Reader
from cachefuse.errors import BadSampleError, DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

QUESTIONS = {9000: (9, "Is it red?"), 9001: (9, " How many? "), 25000: (25, "What is it?")}
ANSWERS = {9000: ["yes"] * 9 + ["Yes."], 9001: ["two"] * 4 + ["2"] * 3 + ["3"] * 3, 25000: ["a dog"] * 6 + ["cat"] * 4}
NAMES = {"train": "train2014", "val": "val2014", "test": "test2015"}
TRAIN, TRAIN_ANSWERS = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"


def write(root, split="train", questions=QUESTIONS, answers=ANSWERS, folder=""):
    """Write a split's files, with the fields that VQA has and are not read, and its images."""
    name = NAMES[split]
    images = root / folder / name
    images.mkdir(parents=True)
    for image in {image for image, _ in questions.values()}:
        Image.new("RGB", (4, 3), (image, 0, 0)).save(images / f"COCO_{name}_{image:012d}.jpg", quality=95)
    about = {"info": {"year": 2017}, "license": {"name": "CC BY 4.0"}, "data_type": "mscoco", "data_subtype": name}
    rows = [{"image_id": image, "question": text, "question_id": n} for n, (image, text) in questions.items()]
    path = root / f"v2_OpenEnded_mscoco_{name}_questions.json"
    path.write_text(json.dumps(about | {"task_type": "Open-Ended", "questions": rows}))
    if split != "test":
        rows = [
            {
                "question_type": "what", "multiple_choice_answer": given[0], "image_id": questions[n][0],
                "answer_type": "other", "question_id": n,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                    for i, answer in enumerate(given, start=1)
                ],
            }
            for n, given in answers.items()
        ]  # fmt: skip
        (root / f"v2_mscoco_{name}_annotations.json").write_text(json.dumps(about | {"annotations": rows}))


def change(root, file, key, **values):
    """Change the first entry of a file's list."""
    content = json.loads((root / file).read_text())
    content[key][0].update(values)
    (root / file).write_text(json.dumps(content))


def write_all(root):
    write(root)
    write(root, "val", {42000: (42, "Is it night?")}, {42000: ["no"] * 5 + ["unsure"] * 5})
    write(root, "test", {77000: (77, "Who is it?"), 77001: (77, "Where?")})


def load(root):
    return load_dataset(load_manifest("vqa2")[0], root)


def read(root):
    return Vqa2Reader().read(root)


def test_one_sample_a_question(tmp_path):
    write_all(tmp_path)
    dataset = load(tmp_path)
    assert dataset.ids == ["9000", "9001", "25000", "42000", "77000", "77001"]
    assert dataset.splits.tolist() == ["train"] * 3 + ["val"] + ["test"] * 2
    assert texts_of(dataset)[:3] == [("Is it red?",), ("How many?",), ("What is it?",)]
    assert tuple(dataset.modalities) == ("image", "text")
    assert np.abs(np.asarray(images_of(dataset)[2].load(), int)[0, 0] - [25, 0, 0]).max() <= 3


def test_questions_about_an_image_share_it(tmp_path):
    write_all(tmp_path)
    dataset = load(tmp_path)
    assert dataset.modalities["image"].rows.tolist() == [0, 0, 1, 2, 3, 3]
    assert images_of(dataset)[0] is images_of(dataset)[1]


def test_classes_are_the_frequent_answers_in_train(tmp_path):
    write_all(tmp_path)
    dataset = load(tmp_path)
    assert dataset.classes == ("yes", "2", "dog", "cat", "3")
    assert dataset.targets.dtype == np.int32
    assert dataset.targets.tolist() == [
        [0] * 10,
        [1] * 7 + [4] * 3,
        [2] * 6 + [3] * 4,
        [-2] * 10,  # nobody in train said so
        [-1] * 10,  # nobody was asked
        [-1] * 10,
    ]


def test_the_number_of_classes_is_the_manifest_s(tmp_path):
    write_all(tmp_path)
    text = 'name = "mine"\ntask = "vqa"\nanswers = 2\nreader = { kind = "vqa2" }\n'
    dataset = load_dataset(parse_manifest(text, "mine.toml"), tmp_path)
    assert dataset.classes == ("yes", "2")
    assert dataset.targets[1].tolist() == [1] * 7 + [-2] * 3
    dataset = load_dataset(parse_manifest(text.replace("answers = 2", 'classes = ["Cat"]'), "mine.toml"), tmp_path)
    assert dataset.classes == ("Cat",)
    assert dataset.targets[2].tolist() == [-2] * 6 + [0] * 4


@pytest.mark.parametrize("folder", ["", "images"])
def test_where_the_images_lie(tmp_path, folder):
    write(tmp_path, folder=folder)
    assert images_of(read(tmp_path))[0].path == tmp_path / folder / "train2014/COCO_train2014_000000000009.jpg"


def test_a_split_that_is_not_whole_is_left_out(tmp_path):
    write_all(tmp_path)
    (tmp_path / TRAIN_ANSWERS).unlink()
    (tmp_path / "test2015").rename(tmp_path / "elsewhere")
    samples = read(tmp_path)
    assert samples.ids == ["42000"]
    assert len(samples.notes) == 2
    assert says(samples.notes[0], f"train {TRAIN_ANSWERS}")
    assert says(samples.notes[1], "test test2015/")
    assert load(tmp_path).classes == ("no", "unsure")  # of all splits, as train has none


def test_questions_of_one_image_stay_together_where_val_is_held_out(tmp_path):
    questions = {100 * image + k: (image, "what?") for image in range(1, 60) for k in range(4)}
    write(tmp_path, "train", questions, dict.fromkeys(questions, ["yes"] * 10))
    dataset = load(tmp_path)
    assert set(dataset.splits) == {"train", "val"}
    assert (
        len({(row, split) for row, split in zip(dataset.modalities["image"].rows, dataset.splits, strict=True)}) == 59
    )


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match=naming(f"{TRAIN} {TRAIN_ANSWERS} train2014/")):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "train2014").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingDataError, match=naming("train2014/ v2_OpenEnded_mscoco_val2014_questions.json")):
        load(tmp_path)
    with pytest.raises(DataError, match=naming("train2014/ test2015/")):
        read(tmp_path)


def test_no_answers_at_all(tmp_path):
    write(tmp_path, "test")
    with pytest.raises(DataError, match="vqa2"):
        load(tmp_path)


def test_an_image_file_that_is_absent_is_a_bad_sample(tmp_path):
    write(tmp_path)
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").unlink()
    with pytest.raises(BadSampleError, match="file"):
        images_of(read(tmp_path))[1].load()


def test_questions_without_answers_and_answers_without_questions_are_counted(tmp_path):
    write(tmp_path)
    change(tmp_path, TRAIN, "questions", question_id=9009)
    samples = read(tmp_path)
    assert samples.labels[0] is None
    assert samples.notes[:2] == [
        "dropped 1 annotations of unknown questions, such as 9000",
        f"1 train questions have no answers in {TRAIN_ANSWERS}, such as 9009",
    ]


def test_blank_texts_and_odd_unicode(tmp_path):
    questions = {1: (1, " "), 2: (2, "\udfff dog?")}
    write(tmp_path, "train", questions, {1: ["", " "] * 5, 2: ["dog\ud800"] * 9 + [""]})
    samples = read(tmp_path)
    assert texts_of(samples) == [(), ("? dog?",)]
    assert samples.labels == [("",) * 10, (*("dog?",) * 9, "")]
    assert load(tmp_path).targets.tolist() == [[-2] * 10, [0] * 9 + [-2]]  # a blank answer is a person's too


@pytest.mark.usefixtures("no_links_out")
def test_links_out_of_the_data_folder_are_not_followed(tmp_path):
    root = tmp_path / "root"
    write(root)
    name = "train2014/COCO_train2014_000000000009.jpg"
    (root / name).rename(tmp_path / "secret.jpg")
    (root / name).symlink_to(tmp_path / "secret.jpg")
    samples = read(root)
    assert images_of(samples)[:2] == [None, None]
    assert images_of(samples)[2].load().size == (4, 3)
    assert says("\n".join(samples.notes), f"1 folder {name}")


@pytest.mark.usefixtures("no_links_out")
@pytest.mark.parametrize("name", ["train2014", TRAIN, TRAIN_ANSWERS])
def test_folders_and_files_that_are_links_out_of_the_data_folder(tmp_path, name, move_out):
    root = tmp_path / "root"
    write(root)
    move_out(root / name)
    with pytest.raises(DataError, match="folder"):
        read(root)


# Files that are otherwise


@pytest.mark.parametrize("file", [TRAIN, TRAIN_ANSWERS])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "JSON"),
        (b'{"questions": "\xff"}', "JSON utf-8"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "JSON KEY"),
        (b'{"questions": {}, "annotations": 3}', "JSON KEY"),
        (b'{"questions": [3], "annotations": [{"answer": "x"}]}', "JSON KEY"),
        (b'{"questions": [{}], "annotations": [{}]}', "ENTRY 1 question_id None"),
    ],
)
def test_files_that_are_not_of_vqa(tmp_path, file, data, message):
    write(tmp_path)
    (tmp_path / file).write_bytes(data)
    key = "questions" if file == TRAIN else "annotations"
    message = message.replace("KEY", key).replace("ENTRY", key[:-1])
    with pytest.raises(DataError, match=naming(f"{file} {message}")) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question_id": "9000"}, "1 question_id 9000"),
        ({"question_id": True}, "1 question_id True"),
        ({"image_id": 1.5}, "1 image_id 1.5"),
        ({"image_id": -1}, "1 image_id -1"),
        ({"image_id": 10**12}, "1 image_id 1000000000000"),
        ({"image_id": "../../9"}, "1 image_id ../../9"),
        ({"question": ["?"]}, "1 text ?"),
        ({"question_id": 9001}, "2 question_id 9001"),
    ],
)
def test_questions_that_are_otherwise(tmp_path, values, message):
    write(tmp_path)
    change(tmp_path, TRAIN, "questions", **values)
    with pytest.raises(DataError, match=naming(f"{TRAIN} {message}")):
        read(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": ["x"] * 9}, "1 answers 10 9"),
        ({"answers": [{"answer": "x"}] * 11}, "1 answers 10 11"),
        ({"answers": []}, "1 answers 10 0"),
        ({"answers": None}, "1 answers 10 None"),
        ({"answers": "xxxxxxxxxx"}, "1 answers 10 xxxxxxxxxx"),
        ({"answers": [{"answer": 3}] * 10}, "1 {}"),
        ({"answers": [7] * 10}, "1 7"),
        ({"image_id": 25}, "1 image 25 9000 9"),
        ({"image_id": None}, "1 image_id None"),
        ({"question_id": 9001}, "2 9001"),
    ],
)
def test_annotations_that_are_otherwise(tmp_path, values, message):
    write(tmp_path)
    change(tmp_path, TRAIN_ANSWERS, "annotations", **values)
    with pytest.raises(DataError, match=naming(f"{TRAIN_ANSWERS} {message}")):
        read(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(vqa2, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match=naming(f"{TRAIN} 100 VQA")):
        read(tmp_path)


def test_a_question_of_two_splits(tmp_path):
    write(tmp_path)
    write(tmp_path, "val")
    with pytest.raises(DataError, match=naming("id 9000 2")):
        load(tmp_path)
