import json

import h5py
import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import BadSampleError, DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

GENRES = ("Drama", "Comedy", "Sci-Fi")
FUEL_SPLIT = np.dtype(
    [
        ("split", "S5"),
        ("source", "S12"),
        ("start", "i8"),
        ("stop", "i8"),
        ("indices", h5py.ref_dtype),
        ("available", "?"),
        ("comment", "S1"),
    ]
)


def load(folder):
    manifest, _ = load_manifest("mmimdb")
    return load_dataset(manifest, folder)


def poster(colour, size=(32, 48)):
    return Image.new("RGB", size, colour)


def write_film(folder, film, genres, plot, image=True):
    (folder / "dataset").mkdir(parents=True, exist_ok=True)
    content = {"genres": genres, "plot": plot, "title": f"film {film}", "year": 1999}
    (folder / "dataset" / f"{film}.json").write_text(json.dumps(content))
    if image:
        poster("red").save(folder / "dataset" / f"{film}.jpeg", quality=95)


def write_raw(folder):
    write_film(folder, "0000005", ["Drama", "News"], ["short", "the longest plot", "a plot"])
    write_film(folder, "0000417", ["Sci-Fi"], "only one")
    write_film(folder, "0012349", ["Comedy", "Drama", "Comedy"], [])
    write_film(folder, "0099999", ["Reality-TV", "Talk-Show"], ["a plot"])
    splits = {"train": ["0000005", "0099999"], "dev": ["0000417"], "test": ["0012349"]}
    (folder / "split.json").write_text(json.dumps(splits))


@pytest.mark.parametrize("inside", ["", "mmimdb"])
def test_raw_layout(tmp_path, inside):
    write_raw(tmp_path / inside)
    dataset = load(tmp_path)
    assert dataset.ids == ["0000005", "0000417", "0012349"]
    assert dataset.splits.tolist() == ["train", "val", "test"]
    assert texts_of(dataset) == [("the longest plot",), ("only one",), ()]
    assert len(dataset.classes) == 23
    named = [{dataset.classes[c] for c in np.flatnonzero(row == 1)} for row in dataset.targets]
    assert named == [{"Drama"}, {"Sci-Fi"}, {"Comedy", "Drama"}]
    assert says("\n".join(dataset.notes), "1 films genres")
    pixels = np.asarray(images_of(dataset)[0].load(), int)
    assert pixels.shape == (48, 32, 3)
    assert np.abs(pixels - [255, 0, 0]).max() <= 3


def test_films_without_a_readable_json_are_dropped_and_counted(tmp_path):
    write_raw(tmp_path)
    (tmp_path / "dataset/0000417.json").write_text("{")
    (tmp_path / "dataset/0012349.json").write_text("[" * 100_000)
    dataset = load(tmp_path)
    assert dataset.ids == ["0000005"]
    assert says("\n".join(dataset.notes), "2 split.json 0000417")


def test_film_without_a_poster_is_a_bad_sample(tmp_path):
    write_raw(tmp_path)
    (tmp_path / "dataset/0000417.jpeg").unlink()
    with pytest.raises(BadSampleError, match="file"):
        images_of(load(tmp_path))[1].load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "split.json JSON"),
        ("[" * 100_000, "split.json JSON"),
        ("[1]", "train dev test list"),
        ('{"train": [], "extra": []}', "train dev test extra"),
        ('{"train": "0000005"}', "train str"),
        ('{"train": [5]}', "film id 5"),
        ('{"train": ["../../etc/passwd"]}', "film id ../../etc/passwd"),
        ('{"train": ["0000005"], "test": ["0000005"]}', "id 0000005"),
    ],
)
def test_wrong_split_file(tmp_path, content, message):
    write_raw(tmp_path)
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(DataError, match=naming(message)):
        load(tmp_path)


def test_split_file_larger_than_the_limit_is_not_read(tmp_path, monkeypatch):
    write_raw(tmp_path)
    monkeypatch.setattr("cachefuse.data.readers.mmimdb.MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match=naming("10")):
        load(tmp_path)


def posters(n):
    """Images (n, 256, 160, 3) in which every value of every channel occurs."""
    images = np.random.default_rng(0).integers(0, 256, (n, 256, 160, 3), np.uint8)
    images[:, :, 0] = np.arange(256, dtype=np.uint8)[:, None]
    return images


def vgg_input(images):
    """What the dataset's writer stores: float32 pixels, blue first, means subtracted, cut to int32, planes first."""
    values = images[..., ::-1].astype(np.float32)
    values -= np.array([103.939, 116.779, 123.68], np.float32)
    return values.astype(np.int32).transpose(0, 3, 1, 2)


def split_array(ranges):
    rows = [
        (split, source, start, stop, h5py.Reference(), True, b".")
        for source in (b"features", b"genres", b"images")
        for split, (start, stop) in ranges.items()
    ]
    return np.array(rows, FUEL_SPLIT)


def write_hdf5(folder, **changes):
    folder.mkdir(exist_ok=True)
    columns = {
        "images": vgg_input(posters(3)),
        "imdb_ids": np.array([b"0000005", b"0000417", b"0012349"], "S7"),
        "genres": np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0]], np.int32),
        "features": np.zeros((3, 300), np.float32),
    }
    attributes = {
        "split": split_array({b"train": (0, 1), b"dev": (1, 2), b"test": (2, 3)}),
        "target_names": json.dumps(GENRES),
    }
    with h5py.File(folder / "multimodal_imdb.hdf5", "w") as file:
        for key, values in (columns | {k: v for k, v in changes.items() if k in columns}).items():
            file[key] = values
        sequences = file.create_dataset("sequences", (3,), h5py.vlen_dtype(np.int32))
        sequences[0] = [1, 2, 3]
        attributes |= {k: v for k, v in changes.items() if k in attributes}
        file.attrs["split"] = attributes["split"]
        file["genres"].attrs["target_names"] = attributes["target_names"]


@pytest.mark.parametrize("inside", ["", "mmimdb"])
def test_hdf5_layout_without_texts(tmp_path, inside):
    write_hdf5(tmp_path / inside)
    dataset = load(tmp_path)
    assert dataset.ids == ["0000005", "0000417", "0012349"]
    assert dataset.splits.tolist() == ["train", "val", "test"]
    assert tuple(dataset.modalities) == ("image",)
    assert any("the text modality is absent" in note for note in dataset.notes)
    named = [{dataset.classes[c] for c in np.flatnonzero(row == 1)} for row in dataset.targets]
    assert named == [{"Drama"}, {"Sci-Fi"}, {"Comedy", "Drama"}]


def test_hdf5_posters_come_back_as_rgb(tmp_path):
    write_hdf5(tmp_path)
    dataset = load(tmp_path)
    for source, expected in zip(images_of(dataset), posters(3), strict=True):
        image = source.load()
        assert image.size == (160, 256)
        difference = np.abs(np.asarray(image, int) - expected.astype(int))
        # Two neighbouring values, those around the mean, were both stored as 0: nothing can tell them apart.
        near_mean = np.abs(expected - np.array([123.68, 116.779, 103.939])) < 1
        assert difference[~near_mean].max() == 0
        assert difference.max() <= 1


def test_hdf5_values_out_of_range_are_clipped(tmp_path):
    values = vgg_input(posters(3))
    values[0, :, 0, 0] = [2**31 - 1, -(2**31), 0]
    write_hdf5(tmp_path, images=values)
    assert images_of(load(tmp_path))[0].load().getpixel((0, 0)) == (124, 0, 255)


def test_hdf5_takes_plots_from_the_raw_json_beside_it(tmp_path):
    write_hdf5(tmp_path)
    write_film(tmp_path, "0000005", ["Drama"], ["short", "the longest plot"], image=False)
    write_film(tmp_path, "0012349", ["Drama"], ["a plot"], image=False)
    dataset = load(tmp_path)
    assert texts_of(dataset) == [("the longest plot",), (), ("a plot",)]
    assert says("\n".join(dataset.notes), "1 3 dataset/<id>.json")


def test_raw_archive_is_preferred_if_it_has_posters(tmp_path):
    write_hdf5(tmp_path)
    write_raw(tmp_path)
    assert images_of(load(tmp_path))[0].load().size == (32, 48)
    for path in (tmp_path / "dataset").glob("*.jpeg"):
        path.unlink()
    assert images_of(load(tmp_path))[0].load().size == (160, 256)


def test_hdf5_rows_in_no_split_and_without_genres_are_dropped(tmp_path):
    genres = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0]], np.int32)
    write_hdf5(tmp_path, genres=genres, split=split_array({b"train": (0, 2)}))
    dataset = load(tmp_path)
    assert dataset.ids == ["0000417"]
    assert any(says(note, "1 split") for note in dataset.notes)
    assert says("\n".join(dataset.notes), "1 films genres")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 3, 4, 4), np.uint8)}, "images int32"),
        ({"imdb_ids": np.array([b"1", b"2"])}, "3 2 imdb_ids"),
        ({"imdb_ids": np.array([b"../a", b"b", b"c"])}, "id"),
        ({"genres": np.zeros(3)}, "genres 0 1"),
        ({"target_names": "["}, "target_names genres JSON 3"),
        ({"target_names": '["Drama", "Drama", "War"]'}, "target_names genres JSON 3"),
        ({"target_names": '["Drama", "Opera", "War"]'}, "Opera"),
        ({"split": np.zeros(3)}, "split"),
        ({"split": split_array({b"train": (0, 9)})}, "train 3 0 9"),
        ({"split": split_array({b"extra": (0, 3)})}, "extra train dev"),
    ],
)
def test_wrong_hdf5(tmp_path, changes, message):
    write_hdf5(tmp_path, **changes)
    with pytest.raises(DataError, match=naming(message)):
        load(tmp_path)


def test_neither_layout(tmp_path):
    with pytest.raises(MissingDataError, match=naming("split.json dataset/ multimodal_imdb.hdf5")):
        load(tmp_path)
