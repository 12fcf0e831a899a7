from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from cachefuse.data.column import TooLong
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest, parse_manifest
from cachefuse.data.readers.hdf5 import ArrayImage, without_first_sentence
from cachefuse.errors import BadSampleError, DataError, ManifestError, MissingDataError
from cachefuse.limits import limits
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

MANIFEST = """
name = "mini"
task = "multiclass"

[reader]
kind = "hdf5"
files = { train = "train.h5" }
image = "pixels"
text = "caption"
labels = "label"
"""


def random_images(n, height=6, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def write(path, **columns):
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values


def load(folder, text=MANIFEST):
    (folder / "mini.toml").write_text(text)
    manifest, root = load_manifest(str(folder / "mini.toml"))
    return load_dataset(manifest, root)


def write_mini(folder, n=2, **columns):
    mini = {
        "pixels": random_images(n),
        "caption": np.array([f"caption {i}" for i in range(n)], "S20"),
        "label": np.arange(n),
    }
    write(folder / "train.h5", **(mini | columns))


@pytest.mark.parametrize("planes_first", [False, True])
def test_images_come_back_pixel_for_pixel(tmp_path, planes_first):
    images = random_images(4)
    stored = images.transpose(0, 3, 1, 2) if planes_first else images
    write_mini(tmp_path, n=4, pixels=stored)
    dataset = load(tmp_path)
    for source, expected in zip(images_of(dataset), images, strict=True):
        image = source.load()
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_default_ids_labels_and_absent_texts(tmp_path):
    write_mini(tmp_path, n=3, caption=np.array([b"a", b" ", b""]), label=np.array([b"hat", b"", b"shoe"]))
    dataset = load(tmp_path)
    assert dataset.ids == ["train-0", "train-1", "train-2"]
    assert dataset.classes == ("hat", "shoe")
    assert dataset.targets.tolist() == [0, -1, 1]
    assert texts_of(dataset) == [("a",), (), ()]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_rows_that_are_not_in_the_encoding_are_read_as_latin_1(tmp_path, shape):
    captions = np.array(["naïve".encode(), "café".encode("latin-1")]).reshape(shape)
    write_mini(tmp_path, caption=captions)
    assert texts_of(load(tmp_path)) == [("naïve",), ("café",)]


def test_strings_of_variable_length_and_whole_numbers(tmp_path):
    captions = np.array(["größer", "smaller"], object)
    write_mini(tmp_path, caption=captions, label=np.array([[10], [9]]))
    dataset = load(tmp_path)
    assert texts_of(dataset) == [("größer",), ("smaller",)]
    assert dataset.classes == ("9", "10")


def test_several_labels_a_row_and_own_ids(tmp_path):
    write_mini(tmp_path, label=np.array([b"red|round", b"red| |red"]), key=np.array([b"x", b"y"]))
    text = MANIFEST.replace("multiclass", "multilabel") + 'label_separator = "|"\nid = "key"\n'
    dataset = load(tmp_path, text)
    assert dataset.ids == ["x", "y"]
    assert dataset.classes == ("red", "round")
    assert dataset.targets.tolist() == [[1, 1], [1, 0]]


def test_soft_links_inside_the_file_are_followed(tmp_path):
    write_mini(tmp_path)
    with h5py.File(tmp_path / "train.h5", "a") as file:
        file["group/real"] = file["caption"]
        del file["caption"]
        file["group/alias"] = h5py.SoftLink("real")
        file["caption"] = h5py.SoftLink("/group/alias")
    assert texts_of(load(tmp_path)) == [("caption 0",), ("caption 1",)]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Slim jeans in blue. Fading throughout. Five pockets.", "Fading throughout. Five pockets."),
        ("Is it a hat? Yes, of 1.5 cm felt.", "Yes, of 1.5 cm felt."),
        ("Only one sentence.", ""),
        ("", ""),
    ],
)
def test_first_sentence_is_dropped(text, rest):
    assert without_first_sentence(text) == rest


def write_fashiongen(folder):
    """The published layout, in small: three photographs of each product, byte strings of shape (N, 1)."""
    for name, products in (("train", 60), ("validation", 4)):
        n = 3 * products
        write(
            folder / f"fashiongen_256_256_{name}.h5",
            index=np.arange(n)[:, None],
            input_image=random_images(n, 8, 8),
            input_description=np.array([[f"Jeans number {i}. Décolleté cut.".encode("latin-1")] for i in range(n)]),
            input_name=np.full((n, 1), b"name"),
            input_subcategory=np.array([[b"JEANS", b"SKINNY JEANS"][i % 2 :][:1] for i in range(n)]),
            input_productID=np.arange(n)[:, None] // 3,
        )


def test_fashiongen_in_its_true_layout(tmp_path):
    write_fashiongen(tmp_path)
    manifest, _ = load_manifest("fashiongen")
    dataset = load_dataset(manifest, tmp_path)
    assert len(dataset) == 192
    assert (dataset.splits == "test").sum() == 12
    assert dataset.classes == ("JEANS", "SKINNY JEANS")
    assert texts_of(dataset)[0] == ("Décolleté cut.",)
    products = {split: {i // 3 for i in np.flatnonzero(dataset.splits == split)} for split in ("train", "val")}
    assert products["val"]
    assert not products["train"] & products["val"]
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[5].load()), random_images(180, 8, 8)[5])
    assert says("\n".join(dataset.notes), "180 260,480")


def test_missing_file(tmp_path):
    with pytest.raises(MissingDataError, match=naming("train.h5")):
        load(tmp_path)


def test_file_that_is_not_hdf5(tmp_path):
    (tmp_path / "train.h5").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=naming("train.h5 HDF5")):
        load(tmp_path)


def test_missing_key_names_those_there(tmp_path):
    write_mini(tmp_path)
    with pytest.raises(DataError, match=naming("train.h5 photo caption label pixels")):
        load(tmp_path, MANIFEST.replace('"pixels"', '"photo"'))
    with pytest.raises(DataError, match=naming("label/x train.h5/label")):
        load(tmp_path, MANIFEST.replace('"label"', '"label/x"'))


def test_group_is_not_a_dataset(tmp_path):
    write_mini(tmp_path)
    with h5py.File(tmp_path / "train.h5", "a") as file:
        file["inputs/names"] = np.zeros(2)
    with pytest.raises(DataError, match=naming("inputs names")):
        load(tmp_path, MANIFEST.replace('"caption"', '"inputs"'))


def test_columns_of_different_lengths(tmp_path):
    write_mini(tmp_path, label=np.arange(3))
    with pytest.raises(DataError, match=naming("pixels 2 3")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("pixels", np.zeros((2, 4, 4), np.uint8), "pixels uint8 2 4"),
        ("pixels", np.zeros((2, 4, 4, 3), np.float32), "pixels uint8 float32"),
        ("pixels", np.zeros((2, 4, 4, 1), np.uint8), "pixels uint8"),
        ("caption", np.zeros(2, np.float32), "caption float32"),
        ("caption", np.zeros(2, [("a", "i4")]), "caption"),
        ("caption", np.array([[b"a", b"b"]] * 2), "caption 1 2"),
        ("caption", np.bytes_(b"one"), "caption"),
        ("caption", h5py.Empty("S10"), "caption"),
    ],
)
def test_wrong_kinds_of_column(tmp_path, column, values, message):
    write_mini(tmp_path, **{column: values})
    with pytest.raises(DataError, match=naming(f"train.h5 {message}")):
        load(tmp_path)


def replace_column(folder, key, make):
    write_mini(folder)
    with h5py.File(folder / "train.h5", "a") as file:
        del file[key]
        make(file, key)


def virtual(file, key):
    layout = h5py.VirtualLayout((2,), "S5")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (2,))
    file.create_virtual_dataset(key, layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f, key: f.__setitem__(key, h5py.ExternalLink("other.h5", "/secret")), "link"),
        (lambda f, key: f.__setitem__(key, h5py.SoftLink(f"/{key}")), "link"),
        (virtual, "files"),
        (lambda f, key: f.create_dataset(key, (2,), "S5", external=[("other.bin", 0, 10)]), "files"),
        (lambda f, key: f.create_dataset(key, (2,), h5py.vlen_dtype(np.int32)), "strings"),
        (lambda f, key: f.create_dataset(key, (2,), h5py.ref_dtype), "strings"),
        (lambda f, key: f.create_dataset(key, (2,), "S300000000", chunks=(1,)), "300,000,000"),
        (lambda f, key: f.create_dataset(key, (60_000_000,), "S1", chunks=(9,)), "60,000,000"),
        (lambda f, key: f.create_dataset(key, (2**31,), "S1", chunks=(2**31,)), "2,147,483,648"),
        (lambda f, key: f.create_dataset(key, (2,), "S1000000", chunks=(2000,), maxshape=(None,)), "chunks"),
    ],
)
def test_what_leaves_the_file_or_is_too_large_is_refused(tmp_path, make, message):
    write(tmp_path / "other.h5", secret=np.array([b"a", b"b"]))
    replace_column(tmp_path, "caption", make)
    with pytest.raises(DataError, match=naming(f"caption {message}")):
        load(tmp_path)


def test_soft_link_through_an_external_link_is_refused(tmp_path):
    write(tmp_path / "other.h5", secret=np.array([b"a", b"b"]))
    write_mini(tmp_path)
    with h5py.File(tmp_path / "train.h5", "a") as file:
        del file["caption"]
        file["door"] = h5py.ExternalLink("other.h5", "/")
        file["caption"] = h5py.SoftLink("/door/secret")
    with pytest.raises(DataError, match="/door/secret"):
        load(tmp_path)


def test_images_over_the_pixel_limit_are_refused_unread(tmp_path):
    shape = (2, 20_000, 20_000, 3)
    replace_column(tmp_path, "pixels", lambda f, key: f.create_dataset(key, shape, "u1", chunks=(1, 100, 100, 3)))
    with pytest.raises(DataError, match=naming("pixels 100,000,000")):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [object, "S"])
def test_text_over_the_limit_is_a_bad_sample(tmp_path, dtype):
    texts = ["a", "b" * (limits().text_bytes + 1)]
    write_mini(tmp_path, caption=np.array(texts, dtype))
    assert list(load(tmp_path).modalities["text"].sources) == [("a",), (TooLong(len(texts[1])),)]


def test_damaged_row_is_a_bad_sample_and_the_others_are_not(tmp_path):
    images = random_images(3)
    replace_column(
        tmp_path,
        "pixels",
        lambda f, key: f.create_dataset(key, data=images[:2], chunks=(1, 6, 5, 3), fletcher32=True),
    )
    with h5py.File(tmp_path / "train.h5") as file:
        offset = file["pixels"].id.get_chunk_info(1).byte_offset
    data = bytearray((tmp_path / "train.h5").read_bytes())
    data[offset] ^= 0xFF
    (tmp_path / "train.h5").write_bytes(data)
    dataset = load(tmp_path)
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[0].load()), images[0])
    with pytest.raises(BadSampleError, match="read"):
        images_of(dataset)[1].load()


def test_rows_and_files_that_are_not_there_are_bad_samples(tmp_path):
    write_mini(tmp_path)
    path = tmp_path / "train.h5"
    with pytest.raises(BadSampleError, match=naming("2 pixels")):
        ArrayImage(path, "pixels", 2).load()
    with pytest.raises(BadSampleError, match="nothing"):
        ArrayImage(path, "nothing", 0).load()
    absent = ArrayImage(tmp_path / "absent.h5", "pixels", 0)
    with pytest.raises(BadSampleError, match="read"):
        absent.load()


def test_name_tells_rows_apart(tmp_path):
    write_mini(tmp_path)
    assert [source.name for source in images_of(load(tmp_path))] == [
        f"{tmp_path}/train.h5:pixels[{row}]" for row in (0, 1)
    ]


def test_threads_share_one_handle(tmp_path, n_open):
    images = random_images(64)
    write_mini(tmp_path, n=64, pixels=images)
    dataset = load(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda source: np.asarray(source.load()), images_of(dataset)))
    np.testing.assert_array_equal(np.stack(loaded), images)
    assert n_open(tmp_path / "train.h5") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('text = "caption"', 'encoding = "utf-99"'), "reader.encoding text utf-99"),
        (('text = "caption"', 'encoding = "zlib"'), "reader.encoding text zlib"),
        (('image = "pixels"\ntext = "caption"', ""), "image text"),
        (('text = "caption"', 'caption = "caption"'), "reader.caption"),
        (('{ train = "train.h5" }', "{}"), "reader.files"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ManifestError, match=naming(message)):
        parse_manifest(MANIFEST.replace(*change), "mini.toml")
