import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import DataError, MissingDataError
from fixtures.columns import images_of
from fixtures.messages import naming, says

WORDS = """\
n00000001\tentity
n01443537\tgoldfish, Carassius auratus
n02012849\tcrane
n03126707\tcrane
n09999999\tunused, thing
"""
ANNOTATIONS = "val_0.JPEG\tn03126707\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"


def save(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), 9).save(path)


def write(root, words=WORDS, annotations=ANNOTATIONS):
    for wnid in ("n01443537", "n02012849", "n03126707"):
        for i in range(2):
            save(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", "L" if i else "RGB")
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    save(root / "val/images/val_0.JPEG")
    save(root / "val/images/val_1.JPEG")
    save(root / "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_bytes(annotations.encode())
    (root / "wnids.txt").write_text("n02012849\nn03126707\nn01443537\n")
    if words is not None:
        (root / "words.txt").write_text(words)


def load(root):
    return load_dataset(load_manifest("tiny_imagenet")[0], root)


def labels(dataset):
    return [dataset.classes[i] if i >= 0 else None for i in dataset.targets]


@pytest.mark.parametrize("folder", ["", "tiny-imagenet-200"])
def test_the_folders_as_they_are_unpacked(tmp_path, folder):
    write(tmp_path / folder)
    dataset = load(tmp_path)
    assert dataset.ids[:2] == ["train/n01443537/images/n01443537_0.JPEG", "train/n01443537/images/n01443537_1.JPEG"]
    assert dataset.ids[6:] == ["val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG"]
    assert dataset.splits.tolist() == ["train"] * 6 + ["val"] * 2 + ["test"]
    assert dataset.classes == ("goldfish", "crane (n02012849)", "crane (n03126707)")
    assert dataset.targets.tolist() == [0, 0, 1, 1, 2, 2, 2, 0, -1]
    assert all(image.load().mode == "RGB" for image in images_of(dataset))
    assert images_of(dataset)[1].path == tmp_path / folder / dataset.ids[1]


def test_without_words_the_classes_are_the_ids(tmp_path):
    write(tmp_path, words=None)
    assert load(tmp_path).classes == ("n01443537", "n02012849", "n03126707")


def test_a_class_without_a_name_is_its_id(tmp_path):
    write(tmp_path, words="\ufeffn01443537\tgoldfish, gold\r\nn02012849\t , crane\r\n\r\n")
    assert load(tmp_path).classes == ("goldfish", "n02012849", "n03126707")


def test_without_test_images(tmp_path):
    write(tmp_path)
    (tmp_path / "test/images/test_0.JPEG").unlink()
    (tmp_path / "test/images").rmdir()
    assert set(load(tmp_path).splits) == {"train", "val"}


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match=naming("train/ val/images/ val/val_annotations.txt")):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "val/val_annotations.txt").unlink()
    with pytest.raises(MissingDataError, match=naming("val/val_annotations.txt")):
        load(tmp_path)


def test_train_without_folders_of_classes(tmp_path):
    write(tmp_path)
    (tmp_path / "train").rename(tmp_path / "old")
    save(tmp_path / "train/a.JPEG")
    with pytest.raises(DataError, match="train"):
        load(tmp_path)


def test_images_and_lines_that_do_not_match(tmp_path):
    write(tmp_path, annotations="val_1.JPEG\tn02012849\r\nval_9.JPEG\tn02012849\r\n")
    dataset = load(tmp_path)
    assert labels(dataset)[6:8] == [None, "crane (n02012849)"]
    assert says("\n".join(dataset.notes), "1 val_annotations.txt image val_9.JPEG")
    assert any(says(note, "1 val_annotations.txt label val_0.JPEG") for note in dataset.notes)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG n01443537\n", "1 file<TAB>wnid<TAB>box val_0.JPEG n01443537"),
        (f"{ANNOTATIONS}\nval_0.JPEG\tn00000001\t0\n", "4 n00000001"),
        ("val_0.JPEG\t\n", "1"),
        (f"{ANNOTATIONS}val_0.JPEG\tn01443537\n", "3 val_0.JPEG n03126707"),
        ("val_0.JPEG\tn0144\0\n", "1 UTF-8 text"),
    ],
)
def test_annotations_that_are_otherwise(tmp_path, annotations, message):
    write(tmp_path, annotations=annotations)
    with pytest.raises(DataError, match=naming(f"val_annotations.txt {message}")):
        load(tmp_path)


def test_a_line_that_is_there_twice(tmp_path):
    write(tmp_path, annotations=ANNOTATIONS * 2)
    assert load(tmp_path).targets.tolist()[6:8] == [2, 0]


def test_names_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    root = tmp_path / "root"
    write(root, annotations=f"{ANNOTATIONS}../../secret.JPEG\tn01443537\n")
    save(tmp_path / "secret.JPEG")
    save(root / "secret.JPEG")
    dataset = load(root)
    assert len(dataset) == 9
    assert not any("secret" in image.name for image in images_of(dataset))


def test_words_that_are_otherwise(tmp_path):
    write(tmp_path, words="n01443537 goldfish\n")
    with pytest.raises(DataError, match=naming("words.txt 1 wnid<TAB>names n01443537")):
        load(tmp_path)


@pytest.mark.usefixtures("no_links_out")
def test_links_out_of_the_data_folder_are_not_followed(tmp_path):
    root = tmp_path / "root"
    write(root)
    save(tmp_path / "outside/images/secret.JPEG")
    (root / "train/n02012849/images/link.JPEG").symlink_to(tmp_path / "outside/images/secret.JPEG")
    (root / "train/n02012849/images/loop.JPEG").symlink_to("loop.JPEG")
    (root / "train/n08888888").symlink_to(tmp_path / "outside")
    dataset = load(root)
    assert [sample for sample in dataset.ids if "n02012849/images/l" in sample] == ["train/n02012849/images/loop.JPEG"]
    assert len(dataset.classes) == 3
    assert any(says(note, "2 train/n02012849/images/link.JPEG") for note in dataset.notes)


@pytest.mark.usefixtures("no_links_out")
@pytest.mark.parametrize("name", ["train", "val/images", "test/images", "words.txt", "val/val_annotations.txt"])
def test_folders_and_files_that_are_links_out_of_the_data_folder(tmp_path, name, move_out):
    root = tmp_path / "root"
    write(root)
    move_out(root / name)
    with pytest.raises(DataError, match="folder"):
        load(root)


@pytest.mark.usefixtures("no_links_out")
def test_the_whole_dataset_as_a_link_out_of_the_data_folder(tmp_path):
    write(tmp_path / "outside")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/tiny-imagenet-200").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=naming("tiny-imagenet-200 folder")):
        load(tmp_path / "root")
