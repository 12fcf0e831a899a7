import base64
import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import log_loss

from cachefuse.data.images import FileImage
from cachefuse.report.gallery import N_EXAMPLES, SIDE, row_losses, worst_examples
from fixtures.columns import columns


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_losses_of_rows_are_scikit_learns(task, random_rows):
    measured = random_rows(task=task)
    scores = measured.scores.astype(float)
    scores = scores / scores.sum(axis=1, keepdims=True) if task == "multiclass" else scores
    losses = row_losses(measured.targets, scores, task)
    for loss, true, score in zip(losses, measured.targets, scores, strict=True):
        expected = -np.log(score[true][0]) if task == "multiclass" else log_loss(true, score, labels=[False, True])
        assert loss == pytest.approx(expected)


def test_scores_of_0_and_1_have_a_finite_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = row_losses(np.eye(2, dtype=bool), np.array([[0, 1], [0, 1]], np.float32), "multilabel")
    assert losses[0] > 15
    assert losses[1] == pytest.approx(0, abs=1e-6)


def test_examples_are_the_worst_of_the_wrong_rows(random_rows):
    measured = random_rows(n=100, n_classes=30)
    right = np.arange(100) % 2 == 0
    measured.predictions[right] = measured.targets[right]
    ids = np.array([f"row {i}" for i in range(100)])
    found = worst_examples(measured, measured.classes, "multilabel", ids)
    losses = row_losses(measured.targets, measured.scores, "multilabel")
    wrong = sorted(np.flatnonzero(~right), key=lambda i: -losses[i])[:N_EXAMPLES]
    assert [example.id for example in found] == [f"row {i}" for i in wrong]
    for example, i in zip(found, wrong, strict=True):
        missed = measured.targets[i] & ~measured.predictions[i]
        shown = [label for label in example.labels if label.kind == "missed"]
        assert len(shown) == min(10, missed.sum())
        assert [label.score for label in shown] == sorted((float(x) for x in measured.scores[i][missed]), reverse=True)[
            :10
        ]
        n = (measured.targets[i] | measured.predictions[i]).sum()
        assert example.more + len(example.labels) == n


def test_thumbnails_are_small_and_show_the_picture(random_rows, dataset, tmp_path):
    picture = Image.new("RGB", (1000, 400), "red")
    picture.paste("blue", (500, 0, 1000, 400))
    picture.save(tmp_path / "wide.png")
    Image.new("RGB", (300, 600), "red").save(tmp_path / "tall.png")
    Image.new("RGB", (5, 9), "lime").save(tmp_path / "tiny.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [FileImage(tmp_path / name) for name in ("wide.png", "tall.png", "tiny.png", "broken.png")] + [None]
    measured = random_rows(n=6)
    measured.predictions[:] = ~measured.targets
    raw = replace(dataset, ids=[f"row {i}" for i in range(5)], modalities=columns(images, [("a", "b"), *[()] * 4]))
    ids = np.array([f"row {i}" for i in range(6)])
    found = {x.id: x for x in worst_examples(measured, measured.classes, "multilabel", ids, raw)}
    assert len(found) == 6
    thumbnails = []
    for i in range(3):
        head, _, data = found[f"row {i}"].picture.partition(",")
        assert head == "data:image/jpeg;base64"
        thumbnails.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert [image.size for image in thumbnails] == [(SIDE, 64), (80, SIDE), (5, 9)]
    left, right = (thumbnails[0].getpixel((x, 30)) for x in (20, 140))
    assert left[0] > 200 > right[0]
    assert found["row 0"].texts == ("a", "b")
    assert found["row 3"].no_picture == "is not an image, or not of a supported format"
    assert found["row 4"].no_picture == "no image"
    assert found["row 5"].no_picture == "not in the raw data"
