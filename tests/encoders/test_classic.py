import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression

from cachefuse.encoders import open_encoder
from cachefuse.errors import EncoderError
from fixtures.messages import naming


def drawn(shape, colour, x, y, size=60):
    image = Image.new("RGB", (160, 160), "white")
    draw = ImageDraw.Draw(image)
    box = (x - size // 2, y - size // 2, x + size // 2, y + size // 2)
    {"circle": draw.ellipse, "square": draw.rectangle}[shape](box, fill=colour)
    return image


def pooled(modality, samples):
    tower = open_encoder("classic")[modality]
    return tower.encode([tower.prepare(sample) for sample in samples], ("pooled",))["pooled"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("circle", "red"), ("square", "red")),
        (("circle", "red"), ("circle", "blue")),
        (("circle", "black"), ("circle", "grey")),
    ],
)
def test_a_linear_head_tells_shape_and_colour_apart_wherever_they_are(one, other):
    rng = np.random.default_rng(0)
    places = rng.integers(50, 110, (2, 40, 2))
    images = [drawn(*what, int(x), int(y)) for what, where in zip((one, other), places, strict=True) for x, y in where]
    features = pooled("image", images)
    labels = np.repeat([0, 1], 40)
    train = np.arange(80) % 2 == 0
    head = LogisticRegression(C=100).fit(features[train], labels[train])
    assert head.score(features[~train], labels[~train]) >= 0.95


def test_position_shows():
    left, left_again, right = pooled("image", [drawn("square", "red", x, 80) for x in (45, 47, 115)])
    assert left @ left_again > left @ right + 0.1


def test_image_parts_have_norm_1_and_a_plain_image_has_no_edges():
    busy, plain = pooled("image", [drawn("circle", "red", 80, 80), Image.new("RGB", (50, 70), "grey")])
    parts = np.cumsum([16 * 12, 64 * 8, 12])
    assert [np.linalg.norm(part) for part in np.split(busy, parts)] == pytest.approx([1] * 4, abs=1e-5)
    assert [np.linalg.norm(part) for part in np.split(plain, parts)] == pytest.approx([1, 0, 1, 0], abs=1e-5)


def test_hues_match_hand_arithmetic():
    """Pure green is at a third of the circle: bins 2 (hue 1/4) and 3 (hue 3/8) of 8, shared 1 to 2."""
    (green,) = pooled("image", [Image.new("RGB", (64, 64), (0, 255, 0))])
    cell = green[: 12 * 16].reshape(16, 12)[0]
    np.testing.assert_allclose(cell**2 * 16, [0, 0, 1 / 3, 2 / 3, *[0] * 8], atol=1e-5)


def test_texts_with_shared_words_are_closer():
    cat, cats, train = pooled("text", ["a cat sat on the mat", "two cats sat on mats", "an express train departs"])
    assert cat @ cats > cat @ train + 0.2
    np.testing.assert_allclose(np.linalg.norm(cat.reshape(2, -1), axis=1), 1, atol=1e-6)


def test_it_is_vectorised():
    """Nothing is called for each pixel."""
    tower = open_encoder("classic")["image"]
    image, n_calls = drawn("circle", "red", 80, 80), 0

    def count(frame, event, function):
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    tower.encode([tower.prepare(image)], ("pooled",))
    sys.setprofile(count)
    try:
        tower.encode([tower.prepare(image)], ("pooled",))
    finally:
        sys.setprofile(None)
    assert 0 < n_calls < 80 * 80 / 4


@pytest.mark.parametrize("spec", ["classic:anything", "classic:@weights"])
def test_it_has_no_models(spec):
    with pytest.raises(EncoderError, match=naming("classic weights")):
        open_encoder(spec)
