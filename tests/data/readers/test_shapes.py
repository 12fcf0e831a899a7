from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.data.readers.shapes import CLASSES, SIDE, ShapeImage, ShapesReader, joint_classes
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming

ROOT = Path("no folder is needed")


@pytest.fixture(scope="module")
def samples():
    return ShapesReader(train=300, test=40).read(ROOT)


def test_the_same_seed_gives_the_same_samples(samples):
    again = ShapesReader(train=300, test=40).read(ROOT)
    assert again == samples
    for one, other in zip(images_of(samples)[:20], images_of(again)[:20], strict=True):
        np.testing.assert_array_equal(np.asarray(one.load()), np.asarray(other.load()))
    other = ShapesReader(train=300, test=40, seed=1).read(ROOT)
    assert texts_of(other) != texts_of(samples)
    for one, another in ((samples, other), (other, samples)):
        digests = {source.digest() for source in images_of(one)}
        assert len(digests) == 340
        assert digests.isdisjoint(source.digest() for source in images_of(another))


def test_each_drawing_parameter_is_in_the_digest():
    sources = [ShapeImage(*values) for values in ((1, "star", True), (1, "star", False), (1, "circle", True))]
    assert len({source.digest() for source in sources}) == len({source.fingerprint() for source in sources}) == 3


def test_more_rows_change_no_others(samples):
    more = ShapesReader(train=300, test=80).read(ROOT)
    assert more.ids[:340] == samples.ids
    assert texts_of(more)[:340] == texts_of(samples)
    assert images_of(more)[:340] == images_of(samples)


def test_drawings(samples):
    for source in images_of(samples)[:40]:
        image = source.load()
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
        assert np.asarray(image, float).std() > 8  # the shape stands out from the ground
        assert source.name == f"shapes/{source.seed:05d}"


def test_large_shapes_cover_more(samples):
    covered = {True: [], False: []}
    for source in images_of(samples)[:100]:
        values = np.asarray(source.load(), float)
        ground = np.median(values[:4], axis=(0, 1))
        covered[source.large].append((np.abs(values - ground).sum(axis=2) > 75).mean())
    assert np.median(covered[True]) > 3 * np.median(covered[False])


def test_labels_follow_from_image_and_text(samples):
    materials = {"wooden": "wooden oak pine timber walnut", "metal": "metal steel iron brass copper"}
    materials |= {"glass": "glass crystal", "paper": "paper cardboard papier-mache"}
    for source, (text,), labels in zip(
        images_of(samples)[:300], texts_of(samples)[:300], samples.labels[:300], strict=True
    ):
        named = {material for material, words in materials.items() if set(words.split()) & set(text.split())}
        assert labels[0] == source.form
        assert named == {labels[1]}
        assert labels[2:] == joint_classes(labels[1], source.large)


def test_neither_modality_alone_tells_the_joint_classes():
    for material in ("wooden", "metal", "glass", "paper"):
        assert joint_classes(material, large=True) != joint_classes(material, large=False)
    for large in (True, False):
        assert len({joint_classes(material, large) for material in ("wooden", "metal", "glass")}) > 1


def test_every_class_occurs_and_the_test_split_is_unlabelled(samples):
    assert {name for labels in samples.labels[:300] for name in labels} == set(CLASSES)
    assert samples.labels[300:] == [None] * 40
    assert samples.splits == ["train"] * 300 + ["test"] * 40
    assert samples.classes == CLASSES


def test_builtin_dataset(tmp_path):
    dataset = load_dataset(load_manifest("shapes")[0], tmp_path)
    assert len(dataset) == 3000
    assert dataset.splits.tolist().count("test") == 600
    assert 400 < dataset.splits.tolist().count("val") < 560
    assert len(set(dataset.digests())) == 3000
    assert dataset.notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "1"),
        ({"test": -1}, "0"),
        ({"train": 10**9}, "1000000"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValidationError, match=naming(message)):
        ShapesReader(**options)
