import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss

import cachefuse
from cachefuse.errors import CachefuseError, ConfigError, DataError
from cachefuse.extraction.open_store import open_store
from cachefuse.metrics.calibration import reliability
from cachefuse.printable import printable_lines
from cachefuse.report.curves import reliability_chart
from cachefuse.report.formatting import cut
from cachefuse.report.gallery import N_EXAMPLES
from cachefuse.report.run_page import report_html, write_report
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.save import load_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from fixtures.columns import texts_of
from fixtures.messages import naming


def test_the_page_has_every_section(page, parse):
    found = parse(page)
    assert found.sections == [
        "classes", "precision-recall", "calibration", "confusion", "together", "modalities", "errors", "training",
        "figures", "settings",
    ]  # fmt: skip
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == [f"#{section}" for section in found.sections]
    headings = [tag for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert headings.count("h2") == len(found.sections)
    assert dict(found.tags)["html"] == {"lang": "en"}
    assert "Shapes <b>& co</b>" in found.text


def test_every_picture_and_chart_says_what_it_is(page, parse):
    tags = parse(page).tags
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert len(pictures) == N_EXAMPLES
    assert all(picture["alt"].startswith("Picture of 00") for picture in pictures)
    charts = [attributes for tag, attributes in tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(charts) == 4 + 11
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_figures_are_those_of_run_json(page, saved, parse):
    values = json.loads((saved.path / "run.json").read_text())
    result = values["results"]["oof"]
    found = parse(page)
    by = result["per_class"]
    expected = {
        name: [str(by["support"][c]), *(f"{figure:.3f}" for figure in figures)]
        for c, (name, *figures) in enumerate(
            zip(
                values["classes"],
                *(by[key] for key in ("f1", "ap", "precision", "recall")),
                values["thresholds"],
                strict=True,
            )
        )
    }
    header, *rows = found.rows["classes"]
    assert header == ["class", "rows", "F1", "AP", "precision", "recall", "threshold"]
    assert {name: cells for name, *cells in rows} == expected
    assert [int(row[1]) for row in rows] == sorted(by["support"], reverse=True)
    metrics = [f"{value:.3f}" for value in result["metrics"].values()]
    assert found.rows["figures"][1] == ["oof", str(result["n_rows"]), *metrics]
    tiles = re.findall(r"<dd>([\d.]+)</dd><dd class=\"interval\">([\d.]+) to ([\d.]+)</dd>", page)
    assert [tile[0] for tile in tiles] == metrics
    assert all(low <= value <= high for value, low, high in tiles)
    for text in (
        values["split_digest"],
        f"{values['parameters']:,} in 5 models",
        f"torch {values['versions']['torch']}",
    ):
        assert text in found.text
    assert values["created"][:19].replace("T", " ") in found.text


def test_the_ablation_is_what_evaluate_says(page, saved, store, parse):
    rows = {name: cells for name, *cells in parse(page).rows["modalities"]}
    everything = cachefuse.evaluate(saved, store, n_resamples=0)
    names = saved.manifest.reported_metrics
    assert rows["everything"] == [f"{everything.metrics[name]:.3f}" for name in names]
    for modality in ("image", "text"):
        without = cachefuse.evaluate(saved, store, without=[modality], n_resamples=0)
        expected = [
            f"{without.metrics[name]:.3f}{without.metrics[name] - everything.metrics[name]:+.3f}".replace("-", "\u2212")
            for name in names
        ]
        assert rows[f"without {modality}"] == expected


def test_the_verdict_in_words(page, saved, store, parse):
    targets, given = store.targets[saved.held_out.rows] > 0, None
    everything = cachefuse.evaluate(saved, store, n_resamples=0)
    precision, recall = np.array(everything.per_class["precision"]), np.array(everything.per_class["recall"])
    hits = (recall * targets.sum(axis=0)).round()
    given = np.divide(hits, precision, out=np.zeros(len(hits)), where=precision > 0).sum()
    assert (
        f"On 160 rows of train and val, each predicted by models that have not seen it, "
        f"{100 * hits.sum() / targets.sum():.0f}% of the labels are found, "
        f"{100 * hits.sum() / given:.0f}% of the predicted labels are right, and "
        f"{100 * everything.metrics['exact_match']:.0f}% of the rows have every label right."
    ) in parse(page).text
    weak = min(range(11), key=lambda c: everything.per_class["f1"][c])
    assert f"Weakest by F1: <bdi>{saved.classes[weak]}</bdi>" in page


def test_the_gallery_shows_rows_as_they_are(page, saved, store, dataset):
    ids = re.findall(r'<p class="id"><bdi>(\d+)</bdi> · loss ([\d.]+)</p>', page)
    assert len(ids) == N_EXAMPLES
    assert [float(loss) for _, loss in ids] == sorted((float(loss) for _, loss in ids), reverse=True)
    cards = page.split('<p class="id">')[1:]
    for (sample, loss), card in zip(ids, cards, strict=True):
        row = dataset.ids.index(sample)
        at = np.flatnonzero(saved.held_out.rows == row)[0]
        targets = store.targets[row] > 0
        assert float(loss) == pytest.approx(log_loss(targets, saved.held_out.scores[at].astype(float)), abs=1e-3)
        assert texts_of(dataset)[row][0] in card
        kinds = dict(re.findall(r'<ul class="labels (\w+)" aria-label="[\w ]+">(.*?)</ul>', card, flags=re.S))
        names = {kind: set(re.findall(r"<bdi>(.*?)</bdi>", labels)) for kind, labels in kinds.items()}
        true = {saved.classes[c] for c in np.flatnonzero(targets)}
        assert names.get("missed", set()) | names.get("found", set()) == true
        assert not names.get("wrong", set()) & true
        assert names.get("missed") or names.get("wrong")
        for c, score in zip(saved.classes, saved.held_out.scores[at], strict=True):
            if f"<bdi>{c}</bdi>" in card:
                assert f'<bdi>{c}</bdi> <span class="score">{score:.2f}</span>' in card


def test_the_same_run_gives_the_same_bytes(page, saved, store, dataset):
    assert report_html(load_run(saved.path), FeatureStore(store.path), dataset) == page


@pytest.mark.parametrize("fixture", ["page", "hostile_page"])
def test_nothing_outside_the_page_is_needed(fixture, request, self_contained):
    html = request.getfixturevalue(fixture)
    self_contained(html)
    style = re.search(r"<style>(.*?)</style>", html, flags=re.S).group(1)
    assert "@import" not in style


def test_names_and_texts_from_data_are_escaped(hostile_page, parse, hostile):
    found = parse(hostile_page)
    assert "<script" not in hostile_page
    assert "<img src=x" not in hostile_page
    assert "49" not in [text.strip() for text in found.texts if "7 * 7" in text]
    names = [row[0] for row in found.rows["classes"][1:]]
    assert len(names) == len(hostile.classes)
    for name in hostile.classes:
        assert printable_lines(cut(name)) in names
    attributes = [value for _, pairs in found.tags for value in pairs.values() if value]
    assert any('"><img src=x onerror=alert(1)>' in value for value in attributes)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", hostile_page)
    hostile_page.encode()


def test_long_names_and_texts_are_cut(hostile_page, parse):
    longest = max(parse(hostile_page).texts, key=len)
    assert len(longest) == 300
    assert longest == "x" * 299 + "…"


def test_a_picture_or_text_that_is_not_there_is_told(hostile_page, parse):
    assert "no such file" in parse(hostile_page).text
    assert any(f'alt="Picture of {i} ' in hostile_page for i in range(160))


def test_without_raw_data_there_are_ids_and_labels(saved, store, parse):
    html = report_html(saved, store)
    found = parse(html)
    assert "make the report again with --data-dir DIR" in found.text
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert html.count('class="labels missed"') > 5
    assert len(html) < 150_000


def test_is_written_where_it_is_told(saved, store, tmp_path, page, dataset):
    heard = []
    written = write_report(saved, store, tmp_path / "r.html", dataset, on_progress=lambda *now: heard.append(now))
    assert written.read_bytes() == page.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert {what for what, _, _ in heard} == {"intervals", "without image", "without text"}
    assert all(done <= total for _, done, total in heard)


@pytest.mark.parametrize(("name", "message"), [(".", "folder"), ("gone/r.html", "gone")], ids=["folder", "gone"])
def test_says_where_it_can_not_be_written(name, message, saved, store, tmp_path):
    with pytest.raises(ConfigError, match=naming(message)):
        write_report(saved, store, tmp_path / name)


def test_what_fails_leaves_the_old_page(saved, store, tmp_path):
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(DataError, match="test"):
        write_report(saved, store, tmp_path / "r.html", split="test")
    assert (tmp_path / "r.html").read_text() == "old"


def test_a_store_that_has_changed_since_is_refused(saved, store, dataset, tmp_path):
    splits = np.where(dataset.splits == "val", "test", dataset.splits)
    open_store(shutil.copytree(store.path, tmp_path / "mine.zarr"), replace(dataset, splits=splits))
    with pytest.raises(CachefuseError, match="mine"):
        report_html(saved, FeatureStore(tmp_path / "mine.zarr"))


def test_the_public_names_are_there():
    assert cachefuse.write_report is write_report
    assert cachefuse.report_html is report_html


@pytest.mark.parametrize("kind", ["none", "temperature"])
def test_a_reliability_curve_has_the_scores_before_and_after(kind, store, quick, parse):
    run = train_head(store, replace(quick, calibrate=kind))
    evaluation = evaluate(run, store, n_resamples=0)
    chart = reliability_chart(evaluation, "multilabel")
    x, y, counts = reliability(evaluation.targets, evaluation.scores, "multilabel")
    drawn = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", chart.paths[-1][1]), float)
    left, bottom = chart.left, chart.bottom
    expected = left + x * (chart.right - left), bottom - y * (bottom - chart.top)
    np.testing.assert_allclose(drawn, np.stack(expected, axis=1)[counts >= 10], atol=0.06)
    lines = {"none": ["scores"], "temperature": ["before calibration", "after calibration"]}
    assert [title for _, _, title in chart.paths] == ["as it should be", *lines[kind]]
    text = parse(report_html(run, store)).text
    assert f"the calibration error, is {evaluation.metrics['calibration_error']:.3f}" in text
    assert ("before calibration" in text) == (kind != "none")
    assert reliability_chart(evaluation, "vqa") is None
