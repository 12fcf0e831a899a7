import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.extract import extract
from cachefuse.report.run_page import report_html
from cachefuse.runs.evaluate import Evaluation
from cachefuse.runs.save import save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.columns import columns, images_of

SHAPES = """
name = "mine"
title = "Shapes <b>& co</b>"
task = "multilabel"
reader = { kind = "shapes", train = 160, test = 20 }
splits = { val = { from = "train", fraction = 0.25 } }
"""
HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', r"$\frac{1}{2}$", "&amp; & &#60;", "x" * 400,
    "مرحبا \u202e override", "control \x00\x07\x1b[31m", "日本語 🎉", "half \ud800 of a pair", "'--",
    "{{ 7 * 7 }}{% raw %}",
)  # fmt: skip
QUICK = TrainConfig(head="linear", loss="bce", epochs=4, patience=4)


@pytest.fixture(scope="session")
def dataset():
    return load_dataset(parse_manifest(SHAPES, "mine.toml"), Path())


@pytest.fixture(scope="session")
def hostile(dataset):
    """The same samples with class names, ids and texts that try to break a page; some without a text or an image."""
    texts = [(HOSTILE[i % 11] * (1 + i % 3),) if i % 6 else () for i in range(len(dataset))]
    images = [FileImage(Path("gone.png")) if i % 6 == 1 else image for i, image in enumerate(images_of(dataset))]
    ids = [f"{i} {HOSTILE[i % 5]}" for i in range(len(dataset))]
    return replace(dataset, classes=HOSTILE, ids=ids, modalities=columns(images, texts))


@pytest.fixture(scope="session")
def open_store(tmp_path_factory):
    def make(dataset):
        path = tmp_path_factory.mktemp("report") / "mine.zarr"
        extract(dataset, ["classic"], path, device="cpu", max_bad=1.0)
        return FeatureStore(path)

    return make


@pytest.fixture(scope="session")
def store(dataset, open_store):
    return open_store(dataset)


@pytest.fixture(scope="session")
def saved(store, tmp_path_factory):
    """A run of five folds, saved."""
    config = replace(QUICK, folds=5, patience=0, thresholds="class", epochs=6, ema=0.9)
    run = train_head(store, config)
    save_run(run, tmp_path_factory.mktemp("runs"))
    return run


@pytest.fixture(scope="session")
def page(saved, store, dataset):
    return report_html(saved, store, dataset)


@pytest.fixture(scope="session")
def hostile_page(hostile, open_store):
    store = open_store(hostile)
    return report_html(train_head(store, QUICK), store, hostile)


class Page(HTMLParser):
    """Tags with their attributes, all text, and the rows of cells of each table by section."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.rows, self.section = [], [], {}, ""
        self.in_style = self.in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.in_style |= tag == "style"
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag):
        self.in_style &= tag != "style"
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if not self.in_style:
            self.texts.append(data)
        if self.in_cell:
            self.rows[self.section][-1][-1] += data

    @property
    def text(self):
        return "".join(self.texts)

    @property
    def sections(self):
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


def measured_of(targets, scores, predictions, classes):
    """Rows by themselves, for what needs no figures."""
    rows = np.arange(len(targets))
    figures = ({}, {}, {}, {}, {})
    return Evaluation("run", "data", "val", (), len(rows), classes, *figures, None, rows, targets, scores, predictions)


@pytest.fixture
def random_rows():
    def make(n=200, n_classes=6, task="multilabel", seed=0):
        rng = np.random.default_rng(seed)
        scores = rng.random((n, n_classes)).astype(np.float32)
        if task == "multiclass":
            hot = [np.eye(n_classes, dtype=bool)[rng.integers(n_classes, size=n)] for _ in range(2)]
        else:
            hot = [rng.random((n, n_classes)) < 0.3 for _ in range(2)]
        return measured_of(hot[0], scores, hot[1], tuple(f"class {c}" for c in range(n_classes)))

    return make


@pytest.fixture(scope="session")
def quick():
    """The settings of a training that takes no time."""
    return QUICK


@pytest.fixture(scope="session")
def parse():
    """From a page's text to its tags, texts and tables."""
    return Page


@pytest.fixture
def self_contained(parse):
    """Assert that a page runs nothing and asks for nothing outside it."""

    def check(html):
        for tag, attributes in parse(html).tags:
            assert tag not in ("script", "iframe", "object", "embed", "base", "form")
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in ("srcset", "action", "formaction", "background", "ping", "xlink:href", "data")
                if name in ("src", "href"):
                    assert re.match(r"#[a-z-]+$|data:image/jpeg;base64,|data:,$", value)
        assert "url(" not in html
        assert not re.search(r"https?://", html)
        assert "default-src 'none'" in html

    return check
