import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import hypergeom

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import pair_data
from cachefuse.alignment.loop import embed_samples
from cachefuse.alignment.run import Alignment, Direction, Retrieval, shown_split
from cachefuse.alignment.train import align, run_features
from cachefuse.errors import ConfigError, RunError
from cachefuse.report import retrieval_page as retrieval
from cachefuse.report.alignment_page import alignment_html, write_alignment_report
from cachefuse.report.formatting import MINUS, UNDEFINED
from cachefuse.report.neighbours import choose_queries
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter
from cachefuse.training.loop import Epoch, History
from fixtures.columns import columns, texts_of
from fixtures.messages import naming

SHORT = AlignConfig(epochs=2, width=32, batch_size=64)
HOSTILE = (
    '<script>alert(1)</script>"><img src=x onerror=alert(1)>$\\frac{1}{2}$ \u202e日本語 \x1b[31m \ud800 {{ 7 * 7 }}'
)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    run = align(store, SHORT, device="cpu")
    run.save(tmp_path_factory.mktemp("aligned"))
    return run


@pytest.fixture(scope="module")
def html(run, store, dataset):
    return alignment_html(run, store, dataset, device="cpu")


@pytest.fixture(scope="module")
def hostile_html(hostile, open_store):
    store = open_store(hostile)
    return alignment_html(align(store, SHORT, device="cpu"), store, hostile, device="cpu")


@pytest.fixture(scope="module")
def captions(dataset, open_store):
    """Two text encoders' features of samples with one to three texts, some of them hostile: (store, raw dataset)."""
    texts = [tuple(f"{own[0]} {HOSTILE} {j}" for j in range(1 + i % 3)) for i, own in enumerate(texts_of(dataset))]
    raw = replace(dataset, modalities=columns(None, texts), name="captions")
    store = open_store(raw)
    rows = np.random.default_rng(0).normal(size=(store.n_items("text"), 8)).astype(np.float16)
    features = store.require_features("made:<up>", "text", {"dtype": "float16"}, "made:<up>", {"pooled": "float16"})
    with ViewWriter(features, "pooled", ragged=False, dtype="float16") as writer:
        writer.add(np.arange(len(rows)), list(rows))
    return FeatureStore(store.path), raw


@pytest.fixture(scope="module")
def same_texts(captions):
    return align(captions[0], SHORT, device="cpu")


@pytest.fixture(scope="module")
def same_texts_html(same_texts, captions):
    return alignment_html(same_texts, *captions, device="cpu")


def direction(n_queries=40, n_gallery=40, recall=None, curve=((40, 1.0),)):
    chance = {k: k / n_gallery if n_gallery else math.nan for k in (1, 5, 10)}
    return Direction(n_queries, n_gallery, recall or {1: 0.1, 5: 0.5, 10: 0.75}, chance, 5.5, curve)


def test_the_page_has_every_section(html, parse):
    found = parse(html)
    assert found.sections == ["figures", "queries", "gap", "training", "use", "settings"]
    assert [attributes["href"] for tag, attributes in found.tags if tag == "a"] == [f"#{id}" for id in found.sections]
    assert [tag for tag, _ in found.tags if tag == "h1"] == ["h1"]
    charts = [attributes for tag, attributes in found.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(charts) == 3
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert all(attributes["alt"].startswith("Picture of 00") for tag, attributes in found.tags if tag == "img")


def test_figures_are_those_of_the_run(html, run, parse):
    found = parse(html)
    expected = []
    for split, result in run.results.items():
        for name in ("text to image", "image to text"):
            one = result.directions[name]
            figures = [f"{one.recall[k]:.3f}" for k in (1, 5, 10)]
            chance = f"{10 / one.n_gallery:.3f}"
            counts = [str(n) for n in (one.n_queries, one.n_gallery)]
            rank = f"{one.median_rank:.1f}".removesuffix(".0")
            expected.append([split, str(result.n_samples), name, *counts, *figures, chance, rank])
    assert found.rows["figures"][1:] == expected
    assert {row[0] for row in expected} == {"val", "test"}
    tiles = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html.split("<nav")[0])
    assert tiles == [
        (name, figure)
        for row in expected
        if row[0] == "test"
        for name, figure in zip(("R@1", "R@5", "R@10", "Median rank"), [*row[5:8], row[9]], strict=True)
    ]
    for split, result in run.results.items():
        assert [split, f"{result.gap_before:.3f}", f"{result.gap_after:.3f}"] in [r[:3] for r in found.rows["gap"]]
    assert f"The temperature was 0.07 before training, and is {run.model.temperature.item():.4f} now." in found.text
    for side in run.sides:
        row = [side.encoder, side.modality, "pooled", f"{side.width:,}", "float16", side.key]
        assert row in found.rows["settings"]
    for command in (
        f"cachefuse retrieve --run {run.name} --text 'a dog in the snow'",
        f"cachefuse retrieve --run {run.name} --image photo.jpg",
        f"cachefuse extract --dataset mine --encoder aligned:{run.path}",
        "cachefuse align --dataset mine --encoder classic --width 32 --epochs 2 --batch-size 64",
    ):
        assert command in found.text


def test_the_verdict_in_words(run, html, parse):
    one = run.results["test"].directions["text to image"]
    said = f"Of 20 texts, {100 * one.recall[1]:.1f}% find their image first among 20; by chance it would be 5.0%."
    assert said in parse(html).text
    one = Direction(200, 1000, {1: 0.147}, {1: 0.005}, 9, ())
    several = replace(run, results={"test": Retrieval(200, {"image to text": one}, 1.0, 0.5)})
    assert [retrieval.verdict(several, row) for row in retrieval.rows(several)] == [
        "Of 200 images, 14.7% find one of their texts first among 1,000; by chance it would be 0.5%."
    ]


@pytest.mark.parametrize(
    ("share", "said"), [(0.5, "50.0%"), (0, "0.0%"), (0.0012, "0.1%"), (0.00012, "0.01%"), (math.nan, UNDEFINED)]
)
def test_a_small_share_is_not_zero(share, said):
    assert retrieval.percent(share) == said


@pytest.mark.parametrize("k", [2, 7, 50, 95, 96, 100, 200])
def test_chance_is_that_of_a_random_order(k):
    one = replace(direction(20, 100), chance={1: 0.05, 10: 0.4})
    assert retrieval.chance(one, k, 100) == pytest.approx(hypergeom.sf(0, 100, 5, min(k, 100)), abs=1e-12)
    assert retrieval.chance(one, 10, 100) == 0.4  # as it was measured
    assert math.isnan(retrieval.chance(replace(one, chance={}), k, 100))
    assert math.isnan(retrieval.chance(one, k, 0))


def test_curves_begin_at_100_or_where_all_is_smaller_at_1(run):
    long = direction(n_gallery=400, curve=((100, 0.8), (200, 0.9), (400, 1.0)))
    short = direction(n_gallery=100, curve=((100, 1.0),))
    both = replace(run, results={"val": Retrieval(40, {"a": long, "b": short}, 1, 1)})
    (one, other) = retrieval.curves(both, "val")
    assert (one.k.tolist(), one.precision.tolist(), other.k.tolist()) == ([100, 200, 400], [0.8, 0.9, 1.0], [100])
    (small,) = retrieval.curves(replace(run, results={"val": Retrieval(40, {"a": direction()}, 1, 1)}), "val")
    assert (small.k.tolist(), small.precision.tolist()) == ([1, 5, 10, 40], [0.1, 0.5, 0.75, 1.0])
    assert small.chance.tolist() == pytest.approx([1 / 40, 5 / 40, 10 / 40, 1])


@pytest.mark.parametrize(
    ("splits", "shown"),
    [(["val", "test", "dev"], "test"), (["dev", "val"], "val"), (["z", "b"], "b"), (["train"], "train"), ([], None)],
)
def test_the_split_that_is_shown(splits, shown):
    assert shown_split(splits) == shown


def test_queries_are_found_at_once_or_last_and_of_a_sample_there_is_one():
    ranks = np.array([1, 1, 1, 9, 1, 1, 7, 9, 1, 1, 8, 2])
    owners = np.array([0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 7])
    assert choose_queries(ranks, owners) == [0, 4, 5, 9, 3, 7, 10, 6]
    assert choose_queries(np.array([1, 1]), np.array([0, 1])) == [0, 1]
    assert choose_queries(np.array([3]), np.array([0])) == [0]
    assert choose_queries(np.zeros(0, int), np.zeros(0, int)) == []


def test_the_gallery_shows_what_is_nearest(html, run, store, dataset):
    data = pair_data(store, run_features(run, store), "pooled")
    images, texts = (side.vectors.numpy() for side in embed_samples(run.model, data, data.of("test")))
    ids, cosines = store.ids[data.of("test")], texts @ images.T
    ranks = {id: int((row >= row[i]).sum()) for i, (id, row) in enumerate(zip(ids, cosines, strict=True))}
    cards = html.split('<div class="query">')[1:]
    shown = [re.search(r"<bdi>(.*?)</bdi> · found (first|at rank (\d+)) of 20", card) for card in cards]
    assert {one.group(1): int(one.group(3) or 1) for one in shown} == {
        one.group(1): ranks[one.group(1)] for one in shown
    }
    assert sorted((ranks[one.group(1)] for one in shown), reverse=True)[:4] == sorted(ranks.values(), reverse=True)[:4]
    for one, card in zip(shown, cards, strict=True):
        row, rank = list(ids).index(one.group(1)), ranks[one.group(1)]
        assert texts_of(dataset)[dataset.ids.index(one.group(1))][0] in card
        order = np.argsort(-cosines[row])
        places = [*range(5), *([rank - 1] if rank > 5 else [])]
        assert re.findall(r'alt="Picture of (\w+)"', card) == [ids[order[place]] for place in places]
        found = re.findall(r'<span class="rank">(\d+)</span> ([^ <]+)( <b>right</b>)?', card)
        assert [(int(r), bool(right)) for r, _, right in found] == [(p + 1, p + 1 == rank) for p in places]
        assert [float(c.replace(MINUS, "-")) for _, c, _ in found] == pytest.approx(
            cosines[row][order[places]], abs=1e-3
        )
        assert card.count('<li class="right">') == 1


def test_texts_are_found_by_texts(same_texts, same_texts_html, captions, parse):
    _, raw = captions
    found = parse(same_texts_html)
    assert same_texts.same_texts
    assert "img" not in [tag for tag, _ in found.tags]
    result = same_texts.results["test"]
    n = next(iter(result.directions.values())).n_gallery
    assert re.search(rf"Of {n} texts, [\d.]+% find another text of their sample first among {n - 1}; by", found.text)
    assert "<up>" in found.text
    assert "aligned:workspace/runs/captions-dfe-add@2" in found.text
    own = dict(zip(raw.ids, texts_of(raw), strict=True))
    cards = same_texts_html.split('<div class="query">')[1:]
    assert 4 < len(cards) <= 8
    for card in cards:
        query, *others = re.findall(r'<p class="text" dir="auto">(.*?)</p>', card)
        sample = re.search(r"<bdi>(.*?)</bdi>", card).group(1)
        if len(own[sample]) > 1:
            assert query not in others  # a text is no answer to itself
        assert len(others) >= 5
        assert '<li class="right">' in card


def test_the_same_alignment_gives_the_same_bytes(html, run, store, dataset):
    assert alignment_html(Alignment.load(run.path), FeatureStore(store.path), dataset, device="cpu") == html


def test_raw_data_is_found_by_its_ids(html, run, store, dataset):
    backwards = range(len(dataset))[::-1]
    modalities = {modality: column.take(backwards) for modality, column in dataset.modalities.items()}
    turned = replace(dataset, ids=dataset.ids[::-1], splits=dataset.splits[::-1], modalities=modalities)
    assert alignment_html(run, store, turned, device="cpu") == html


@pytest.mark.parametrize("fixture", ["html", "hostile_html", "same_texts_html"])
def test_nothing_outside_the_page_is_needed(fixture, request, self_contained):
    html = request.getfixturevalue(fixture)
    self_contained(html)


def test_names_and_texts_are_escaped(hostile_html, same_texts_html, run, parse):
    sides = tuple(replace(side, encoder=HOSTILE, key=HOSTILE) for side in run.sides)
    results = {HOSTILE: Retrieval(1, {HOSTILE: direction(), "text to image": direction()}, 1.0, 0.5)}
    named = replace(run, name=HOSTILE, dataset=HOSTILE, sides=sides, results=results, parent=HOSTILE)
    for html in (hostile_html, same_texts_html, alignment_html(named)):
        found = parse(html)
        assert "<script" not in html
        assert "<img src=x" not in html
        assert "<script>alert(1)</script>" in found.text
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", html)
        assert max(len(text) for text in found.texts) <= 1000
        html.encode()


def test_what_can_not_be_shown_is_told(hostile_html, store, run, dataset, parse):
    assert 'class="text" dir="auto">' in hostile_html
    none = parse(alignment_html(run, store, replace(dataset, ids=[f"other {id}" for id in dataset.ids]), device="cpu"))
    assert none.text.count("not in the raw data") > 8
    assert not [tag for tag, _ in none.tags if tag == "img"]


def test_without_raw_data_there_is_no_gallery(run, store, parse):
    for html in (alignment_html(run), alignment_html(run, store, device="cpu")):
        assert "make the report again with --data-dir DIR" in parse(html).text
        assert len(html) < 60_000


def test_a_store_with_other_splits_is_told(run, store, dataset, html, parse):
    assert "not those that the alignment was trained on" not in parse(html).text
    other = alignment_html(replace(run, split_digest="0" * 16), store, dataset, device="cpu")
    assert "not those that the alignment was trained on" in parse(other).text


def test_a_store_without_the_features_is_refused(run, captions):
    with pytest.raises(RunError, match=naming("classic image")):
        alignment_html(run, *captions, device="cpu")


def test_one_that_was_tuned_has_no_figures(run, store, dataset, parse):
    tuned = replace(run, name="tuned", parent="the <one> before", results={}, path=None)
    html = alignment_html(tuned, store, dataset, device="cpu")
    found = parse(html)
    assert "it was fine-tuned from the <one> before together with a head." in found.text
    assert found.sections == ["queries", "training", "use", "settings"]
    assert "Validation score" in found.text
    assert "R@1" not in found.text
    assert "cachefuse align " not in found.text
    assert "cachefuse retrieve" not in found.text
    assert html.count('<div class="query">') > 3


def test_one_with_nothing_held_out_says_so(run, parse):
    found = parse(alignment_html(replace(run, results={}, history=History())))
    assert "the quality of this alignment on new samples is unknown" in found.text
    assert "The run keeps no record of its epochs." in found.text


def test_what_is_not_defined_is_a_dash(run, parse, tmp_path):
    nan = math.nan
    one = Direction(0, 0, {1: nan, 5: nan}, {}, nan, ((1, nan),))
    empty = replace(run, results={"test": Retrieval(0, {"text to image": one, "image to text": one}, nan, nan)})
    found = parse(alignment_html(empty))
    assert found.rows["figures"][1] == ["test", "0", "text to image", "0", "0", *[UNDEFINED] * 5]
    assert found.rows["gap"][1] == ["test", *[UNDEFINED] * 3]
    assert not re.search(r"\bnan\b", found.text)
    assert [path.name for path in write_alignment_report(empty, tmp_path / "r.html")] == ["r.html", "training.png"]


def test_a_validation_with_fewer_pairs_is_told(run, html, parse):
    n = run.results["val"].n_samples
    assert f"Validation compares only {n} pairs, and training up to 64" in parse(html).text
    many = {"val": replace(run.results["val"], n_samples=64)}
    assert "Validation compares only" not in alignment_html(replace(run, results=many))


@pytest.mark.parametrize("name", ["plain", HOSTILE])
@pytest.mark.one_in(2)
def test_is_written_with_its_plots_beside_it(name, run, store, dataset, html, tmp_path):
    named = replace(run, name=name, results={name: run.results["test"]}) if name != "plain" else run
    written = write_alignment_report(named, tmp_path / "r.html", store, dataset, device="cpu")
    assert [path.name for path in written] == ["r.html", "retrieval.png", "training.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "retrieval.png", "training.png"]
    assert name != "plain" or written[0].read_bytes() == html.encode()
    for path in written[1:]:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(Image.open(io.BytesIO(data)).size) > 400
    before = [path.read_bytes() for path in written]
    assert [
        path.read_bytes() for path in write_alignment_report(named, *[tmp_path / "r.html", store, dataset])
    ] == before


def test_plots_of_one_epoch_or_none(run, tmp_path):
    one = replace(run, history=History([Epoch(1, 0.5, None, True)], best_epoch=1))
    assert (tmp_path / "training.png") in write_alignment_report(one, tmp_path / "r.html")
    none = replace(run, history=History(), results={})
    assert write_alignment_report(none, tmp_path / "r.html") == [tmp_path / "r.html"]


@pytest.mark.parametrize(("name", "message"), [(".", "folder"), ("gone/r.html", "gone")], ids=["folder", "gone"])
def test_says_where_it_can_not_be_written(name, message, run, tmp_path):
    with pytest.raises(ConfigError, match=naming(message)):
        write_alignment_report(run, tmp_path / name)


def test_what_fails_leaves_the_old_page(run, captions, tmp_path):
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(RunError, match="classic"):
        write_alignment_report(run, tmp_path / "r.html", *captions)
    (tmp_path / "training.png").mkdir()
    with pytest.raises(ConfigError, match=naming("training.png folder")):
        write_alignment_report(run, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "old"
    assert not (tmp_path / "retrieval.png").exists()
