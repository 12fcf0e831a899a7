"""What every reader keeps to, on a miniature of the data that it reads."""

import json
import re

import h5py
import numpy as np
import pytest
from PIL import Image

from cachefuse.data.manifest import parse_manifest
from cachefuse.data.readers import READERS
from cachefuse.data.readers.base import Reader
from cachefuse.errors import BadSampleError, ManifestError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (200, 100, 50)).save(path)


def write_cifar(root):
    rows = np.zeros((4, 3073), np.uint8)
    rows[:, 1:] = np.arange(4)[:, None]
    for i in range(5):
        rows[: 1 if i else 3].tofile(root / f"data_batch_{i + 1}.bin")
    rows[3:].tofile(root / "test_batch.bin")


def write_coco_captions(root):
    (root / "annotations").mkdir()
    for split, numbers in (("train", (1, 2, 3)), ("val", (4,))):
        for i in numbers:
            save(root / f"{split}2017/{i:012d}.jpg")
        images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in numbers]
        annotations = [{"image_id": i, "caption": text} for i in numbers for text in ("a dog", "a cat ", " ")]
        content = json.dumps({"images": images, "annotations": annotations})
        (root / f"annotations/captions_{split}2017.json").write_text(content)


def write_flickr8k(root):
    for i in range(4):
        save(root / f"Images/{i}.jpg")
    (root / "captions.txt").write_text("image,caption\n" + "".join(f"{i}.jpg,a dog\n{i}.jpg,a cat\n" for i in range(4)))


def write_folder(root):
    for i in range(4):
        save(root / f"{'ab'[i % 2]}/{i}.jpg")


def write_hdf5(root):
    with h5py.File(root / "train.h5", "w") as file:
        file["image"] = np.zeros((4, 3, 4, 3), np.uint8)
        file["text"] = np.array(["a", "b", "", "d"], "S1")
        file["label"] = np.array(["x", "y", "x", ""], "S1")


def write_mmimdb(root):
    ids = [f"{i:07d}" for i in range(4)]
    (root / "split.json").write_text(json.dumps({"train": ids[:2], "dev": ids[2:3], "test": ids[3:]}))
    for film in ids:
        save(root / f"dataset/{film}.jpeg")
        (root / f"dataset/{film}.json").write_text(json.dumps({"genres": ["Drama"], "plot": ["a plot"]}))


def write_sentence_pairs(root):
    (root / "train.tsv").write_text('sentence1\tsentence2\tscore\na "dog\ta cat\t1.5\nc\td\t\na\tb\t3\textra\n')
    (root / "test.tsv").write_text("sentence1\tsentence2\ne\tf\n")


def write_shapes(root):
    pass


def write_table(root):
    for i in range(3):
        save(root / f"{i}.jpg")
    (root / "train.csv").write_text('id,text,label\n0,a,x\n1,"a "b" c",y z\n2,,\n')
    (root / "test.csv").write_text("id,text\n3,d\n")


def write_tiny_imagenet(root):
    for i in range(2):
        save(root / f"train/n0{i}/images/n0{i}_0.JPEG")
    save(root / "val/images/val_0.JPEG")
    save(root / "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t3\t3\n")


def write_vqa2(root):
    for split, numbers in (("train", (1, 2, 3)), ("val", (4,))):
        for i in numbers:
            save(root / f"{split}2014/COCO_{split}2014_{i:012d}.jpg")
        rows = [{"question_id": 10 * i, "image_id": i, "question": "what? " * (i % 2)} for i in numbers]
        (root / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(json.dumps({"questions": rows}))
        rows = [{**row, "answers": [{"answer": "a dog"}] * 10} for row in rows]
        (root / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": rows}))


# For each reader: how to write its miniature, its options, the number of rows.
MINIATURES = {
    "cifar": (write_cifar, {"variant": "cifar10"}, 8),
    "coco_captions": (write_coco_captions, {}, 4),
    "flickr8k": (write_flickr8k, {}, 4),
    "folder": (write_folder, {}, 4),
    "hdf5": (write_hdf5, {"files": {"train": "train.h5"}, "image": "image", "text": "text", "labels": "label"}, 4),
    "mmimdb": (write_mmimdb, {}, 4),
    "sentence_pairs": (write_sentence_pairs, {"files": {"train": ["no.tsv", "train.tsv"], "test": "test.tsv"}}, 4),
    "shapes": (write_shapes, {"train": 3, "test": 1}, 4),
    "table": (
        write_table,
        {
            "files": {"train": "train.csv", "test": "test.csv"},
            "id": "id",
            "image": "{id}.jpg",
            "text": "text",
            "labels": "label",
            "separator": " ",
        },
        4,
    ),
    "tiny_imagenet": (write_tiny_imagenet, {}, 4),
    "vqa2": (write_vqa2, {}, 4),
}


@pytest.fixture(params=sorted(READERS))
def mini(request, tmp_path):
    """Return a reader, the folder of its miniature, and the number of rows there."""
    assert request.param in MINIATURES, f"add a miniature for the reader {request.param!r}"
    write, options, n = MINIATURES[request.param]
    write(tmp_path)
    return READERS[request.param](**options), tmp_path, n


def contents(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def test_lists_are_parallel(mini):
    reader, root, n = mini
    samples = reader.read(root)
    columns = [samples.ids, samples.splits, samples.labels, images_of(samples), texts_of(samples), samples.groups]
    assert {len(column) for column in columns if column is not None} == {n}
    assert images_of(samples) is not None or texts_of(samples) is not None


def test_values_are_of_the_documented_types(mini):
    reader, root, n = mini
    samples = reader.read(root)
    assert len(set(samples.ids)) == n
    assert all(isinstance(value, str) and value for value in samples.ids + samples.splits)
    for names in samples.labels:
        assert names is None or (isinstance(names, tuple) and all(isinstance(name, str) and name for name in names))
    for texts in texts_of(samples) or []:
        assert isinstance(texts, tuple)
        assert all(isinstance(text, str) and text.strip() for text in texts)
    assert samples.classes is None or isinstance(samples.classes, tuple)
    assert all(isinstance(note, str) for note in samples.notes)


def test_reading_is_pure_and_repeatable(mini):
    reader, root, _ = mini
    before = contents(root)
    first, second = reader.read(root), reader.read(root)
    for source in images_of(first) or []:
        source.fingerprint(), source.digest()
    assert first == second
    assert contents(root) == before


def test_images_are_rgb_or_bad_samples(mini):
    reader, root, _ = mini
    loaded, images = 0, images_of(reader.read(root))
    for source in images or []:
        assert source.name
        try:
            image = source.load()
        except BadSampleError:
            continue
        assert image.mode == "RGB"
        assert min(image.size) > 0
        loaded += 1
    assert loaded >= 3 or images is None


def test_stamps_and_digests_stay_and_stamps_tell_rows_apart(mini):
    reader, root, _ = mini
    sources, again = images_of(reader.read(root)) or [], images_of(reader.read(root)) or []
    assert [source.fingerprint() for source in sources] == [source.fingerprint() for source in again]
    assert [source.digest() for source in sources] == [source.digest() for source in again]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert all(re.fullmatch("[0-9a-f]{16}", source.digest()) for source in sources)


def test_missing_files_are_listed(mini, tmp_path_factory):
    reader, root, _ = mini
    assert reader.missing(root) == []
    if reader.__class__.__name__ == "ShapesReader":
        return
    nowhere = tmp_path_factory.mktemp("empty") / "nowhere"
    missing = reader.missing(nowhere)
    assert missing
    assert all(isinstance(name, str) and name for name in missing)
    assert not nowhere.exists()


def test_readers_are_frozen_and_refuse_unknown_options(mini):
    reader, _, _ = mini
    assert isinstance(reader, Reader)
    kind = next(name for name in READERS if type(reader) is READERS[name])
    text = f'name = "mini"\ntask = "retrieval"\n[reader]\nkind = "{kind}"\nno_such_option = 1\n'
    with pytest.raises(ManifestError, match=naming("reader.no_such_option")):
        parse_manifest(text, "mini.toml")


def test_readers_are_in_alphabetical_order():
    assert list(READERS) == sorted(READERS)
