import re
from pathlib import Path

import pytest

from cachefuse.alignment.retrieve import Match, QueryResult
from cachefuse.data.images import FileImage
from cachefuse.errors import ConfigError
from cachefuse.report.matches_page import matches_html, write_matches
from fixtures.columns import images_of, texts_of, with_columns
from fixtures.messages import naming


def matches(dataset, rows, items=None):
    """Matches of a dataset's rows, whose numbers in the store are others."""
    return tuple(
        Match(0.9 - 0.1 * i, 1000 + row, dataset.ids[row], items[i] if items else 0) for i, row in enumerate(rows)
    )


@pytest.fixture(scope="module")
def captioned(dataset):
    """Three texts a sample."""
    return with_columns(dataset, texts=[(f"{own[0]} a", f"{own[0]} b", f"{own[0]} c") for own in texts_of(dataset)])


@pytest.fixture(scope="module")
def page(captioned):
    return matches_html(
        QueryResult("a <b>bold</b> wish", "image", matches(captioned, [5, 3, 7])), "an <i>space", captioned
    )


@pytest.fixture(scope="module")
def hostile_page(hostile):
    query = hostile.classes[0] + hostile.classes[8] + hostile.classes[10]
    return matches_html(QueryResult(query, "image", matches(hostile, range(24))), hostile.classes[1], hostile)


def cards(html):
    return html.split('<ol class="matches">')[1].split("<li>")[1:]


def test_images_that_a_text_found(page, captioned, parse):
    found = parse(page)
    assert "a <b>bold</b> wish" in found.text
    assert "The 3 images nearest to this text by cosine, in the space of an <i>space." in found.text
    assert "Shapes <b>& co</b>" in found.text
    shown = cards(page)
    assert len(shown) == 3
    for i, (row, card) in enumerate(zip([5, 3, 7], shown, strict=True)):
        assert f'<span class="rank">{i + 1}</span> {0.9 - 0.1 * i:.3f}' in card
        assert f'alt="Picture of {captioned.ids[row]}"' in card
        assert f"<bdi>{captioned.ids[row]}</bdi>" in card
        assert re.findall(r'dir="auto">(.*?)</p>', card) == list(texts_of(captioned)[row][:2])


def test_texts_that_an_image_found(captioned, parse, tmp_path):
    images_of(captioned)[0].load().save(tmp_path / "query.png")
    image = FileImage(tmp_path / "query.png")
    html = matches_html(
        QueryResult(str(image.path), "text", matches(captioned, [2, 2], [2, 0])), "space", captioned, image
    )
    assert "The 2 texts nearest to this image by cosine, in the space of space." in parse(html).text
    assert 'alt="The query image"' in html
    assert "<h1><bdi>query.png</bdi></h1>" in html
    assert str(tmp_path) not in html
    texts = [re.findall(r'dir="auto">(.*?)</p>', card) for card in cards(html)]
    assert texts == [[texts_of(captioned)[2][2]], [texts_of(captioned)[2][0]]]


def test_an_image_that_can_not_be_read_is_told(captioned, parse):
    html = matches_html(QueryResult("gone.png", "text", ()), "space", captioned, FileImage(Path("gone.png")))
    assert "no such file" in parse(html).text
    assert "No matches." in parse(html).text


def test_what_is_not_there_is_told(dataset, parse):
    raw = with_columns(dataset, images=[None, *images_of(dataset)[1:]], texts=[(), *texts_of(dataset)[1:]])
    gone = Match(0.5, 0, "not here", 0)
    found = parse(matches_html(QueryResult("q", "text", (*matches(raw, [0, 1], [0, 4]), gone)), "space", raw))
    assert "no image" in found.text
    assert "not in the raw data" in found.text
    texts = with_columns(dataset, images=None)
    html = matches_html(QueryResult("q", "text", matches(texts, [0])), "space", texts)
    assert "The text nearest to this text" in parse(html).text
    assert "<img" not in html
    assert "no image" not in html
    images = with_columns(dataset, texts=None)
    assert "<img" in matches_html(QueryResult("", "image", matches(images, [0])), "space", images)


def test_names_and_texts_are_escaped(hostile_page, parse):
    found = parse(hostile_page)
    assert "<script" not in hostile_page
    assert "<img src=x" not in hostile_page
    assert "<script>alert(1)</script>" in found.text
    assert "no such file" in found.text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800]", hostile_page)
    assert max(len(text) for text in found.texts) <= 300
    hostile_page.encode()


@pytest.mark.parametrize("fixture", ["page", "hostile_page"])
def test_nothing_outside_the_page_is_needed(fixture, request, self_contained):
    html = request.getfixturevalue(fixture)
    self_contained(html)


def test_is_written_the_same_each_time(page, captioned, tmp_path):
    found = QueryResult("a <b>bold</b> wish", "image", matches(captioned, [5, 3, 7]))
    written = write_matches(found, tmp_path / "f.html", "an <i>space", captioned)
    assert written == tmp_path / "f.html"
    assert written.read_bytes() == page.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["f.html"]


@pytest.mark.parametrize(("name", "message"), [(".", "folder"), ("gone/f.html", "gone")], ids=["folder", "gone"])
def test_says_where_it_can_not_be_written(name, message, dataset, tmp_path):
    with pytest.raises(ConfigError, match=naming(message)):
        write_matches(QueryResult("q", "image", ()), tmp_path / name, "space", dataset)
