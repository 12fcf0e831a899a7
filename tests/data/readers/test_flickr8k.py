import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

CAPTIONS = """\
image,caption
100_a.jpg,A dog runs .
100_a.jpg,"A dog , in ""the"" park , runs"
200_b.jpg,"Go" says a man to the "dog"
200_b.jpg,A man , a dog
300_c.jpg,A girl
400_d.jpg,In no split
"""
TOKENS = """\
100_a.jpg#0\tA dog runs .
100_a.jpg#1\t"A dog , in the park , runs"
200_b.jpg#0\tA man , a dog
300_c.jpg#0\tA girl
400_d.jpg#0\tIn no split
2258277193_586949ec62.jpg.1#0\tsome people wait
2258277193_586949ec62.jpg.1#1\tpeople
"""
LISTS = {
    "Flickr_8k.trainImages.txt": "100_a.jpg\n",
    "Flickr_8k.devImages.txt": "200_b.jpg\n",
    "Flickr_8k.testImages.txt": "300_c.jpg\n",
}


def write(root, images="Images", captions=CAPTIONS, file="captions.txt", lists=LISTS):
    (root / images).mkdir()
    for i, name in enumerate(("100_a", "200_b", "300_c", "400_d")):
        Image.new("RGB", (10 + i, 8), (10, 200, 30)).save(root / images / f"{name}.jpg", quality=95)
    (root / images / ".DS_Store").write_text("")
    (root / images / "._100_a.jpg").write_text("")
    (root / file).write_text(captions, encoding="utf-8")
    for name, text in lists.items():
        (root / name).write_text(text)


def load(root):
    manifest, _ = load_manifest("flickr8k")
    return load_dataset(manifest, root)


def test_captions_file(tmp_path):
    write(tmp_path)
    dataset = load(tmp_path)
    assert dataset.ids == ["100_a", "200_b", "300_c"]
    assert dataset.splits.tolist() == ["train", "val", "test"]
    assert texts_of(dataset) == [
        ("A dog runs .", 'A dog , in "the" park , runs'),
        ('"Go" says a man to the "dog"', "A man , a dog"),
        ("A girl",),
    ]
    assert dataset.classes == ()
    pixels = np.asarray(images_of(dataset)[1].load(), int)
    assert pixels.shape == (8, 11, 3)
    assert np.abs(pixels - [10, 200, 30]).max() <= 3


def test_original_archive_with_a_token_file(tmp_path):
    write(tmp_path, images="Flicker8k_Dataset", captions=TOKENS, file="Flickr8k.token.txt")
    dataset = load(tmp_path)
    assert dataset.ids == ["100_a", "200_b", "300_c"]
    assert texts_of(dataset)[0] == ("A dog runs .", '"A dog , in the park , runs"')
    assert says("\n".join(dataset.notes), "1 400_d.jpg")
    assert says("\n".join(dataset.notes), "1 image 2258277193_586949ec62.jpg.1")


def test_without_split_lists_all_rows_are_train(tmp_path):
    write(tmp_path, lists={})
    dataset = load(tmp_path)
    assert dataset.splits.tolist() == ["train"] * 4
    assert any("all rows are in the train split" in note for note in dataset.notes)


def test_listed_images_that_are_absent_are_dropped_and_counted(tmp_path):
    write(tmp_path, lists=LISTS | {"Flickr_8k.testImages.txt": "300_c.jpg\r\n999_z.jpg\r\n"})
    dataset = load(tmp_path)
    assert dataset.ids == ["100_a", "200_b", "300_c"]
    assert says("\n".join(dataset.notes), "1 image 999_z.jpg")


def test_image_without_a_caption_has_no_texts(tmp_path):
    write(tmp_path, captions="100_a.jpg,A dog\n200_b.jpg,\n")
    assert texts_of(load(tmp_path)) == [("A dog",), (), ()]


def test_line_that_is_no_caption(tmp_path):
    write(tmp_path, captions="image,caption\n\n100_a.jpg A dog\n")
    with pytest.raises(DataError, match=naming("captions.txt 3 100_a.jpg")):
        load(tmp_path)


def test_line_that_is_no_token_line(tmp_path):
    write(tmp_path, captions="100_a.jpg#0 A dog\n", file="Flickr8k.token.txt")
    with pytest.raises(DataError, match=naming("Flickr8k.token.txt 1")):
        load(tmp_path)


def test_image_in_two_splits(tmp_path):
    write(tmp_path, lists=LISTS | {"Flickr_8k.testImages.txt": "300_c.jpg\n100_a.jpg\n"})
    with pytest.raises(DataError, match=naming("testImages.txt 2 100_a.jpg")):
        load(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match=naming("Images/ captions.txt Flickr8k.token.txt")):
        load(tmp_path)


@pytest.mark.real
def test_real_data():
    folder = os.environ.get("CACHEFUSE_REAL_DATA")
    if not folder:
        pytest.skip("CACHEFUSE_REAL_DATA is unset")
    dataset = load(Path(folder) / "data" / "flickr8k")
    counts = dict(zip(*np.unique(dataset.splits, return_counts=True), strict=True))
    assert counts == {"train": 900, "val": 100, "test": 200}
    assert {len(texts) for texts in texts_of(dataset)} == {5}
    assert not any('""' in text or text.startswith('"A dog shakes') for texts in texts_of(dataset) for text in texts)
    assert texts_of(dataset)[dataset.ids.index("1012212859_01547e3f17")][0].startswith("A dog shakes its head")
    for source in images_of(dataset)[:20]:
        assert source.load().mode == "RGB"
