import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

import cachefuse
from cachefuse.report import tables
from cachefuse.report.run_page import report_html
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.save import save_run
from cachefuse.runs.train import train_head
from cachefuse.training.loop import Epoch, History
from fixtures.messages import says


def test_a_run_without_rows_held_out_says_so(dataset, open_store, parse, quick):
    store = open_store(replace(dataset, splits=np.where(dataset.splits == "val", "<dev>", dataset.splits)))
    run = train_head(store, replace(quick, patience=0))
    assert run.held_out is None
    found = parse(report_html(run, store, dataset))
    assert "This run held out no rows: only its figures on <dev> are on new rows." in found.text
    assert found.sections == ["classes", "together", "training", "figures", "settings"]
    n = (store.splits == "<dev>").sum()
    assert f"On {n} <dev> rows." in found.text
    assert [row[0] for row in found.rows["figures"]] == ["split", "train", "<dev>"]
    dev = parse(report_html(run, store, dataset, split="<dev>"))
    assert "held out no rows" not in dev.text
    assert f"{n} <dev> rows that were not trained on" in dev.text
    assert {"errors", "modalities", "confusion"} <= set(dev.sections)


def test_a_split_that_was_trained_on_is_told(saved, store, parse):
    html = report_html(saved, store, split="train")
    found = parse(html)
    warning = re.search(r'<p class="warning">(.*?)</p>', html).group(1)
    assert says(warning, "train new rows")
    assert "rows that were not trained on" not in found.text


def test_rows_held_out_can_be_named(saved, store, dataset, page):
    assert report_html(saved, store, dataset, split="oof") == page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fusion": "image"}, "The run reads only image: there is nothing to leave out."),
        ({"folds": 2, "refit": True, "patience": 0}, "have seen the held-out rows; name another labelled --split."),
    ],
)
def test_an_ablation_that_makes_no_sense_is_left_out(options, said, store, parse, quick):
    found = parse(report_html(train_head(store, replace(quick, **options)), store))
    assert said in found.text
    assert "modalities" not in found.rows


def test_a_refitted_run_says_which_models_its_curves_are_of(store, parse, quick):
    found = parse(report_html(train_head(store, replace(quick, folds=2, refit=True, patience=0)), store))
    assert "2 models, a line for each" in found.text
    assert "Afterwards, the models that predict were trained on all rows." in found.text


def test_gates_are_shown(store, parse, quick):
    run = train_head(store, replace(quick, fusion="gated"))
    found = parse(report_html(run, store))
    everything = cachefuse.evaluate(run, store, n_resamples=0)
    rows = {row[0]: row[1:] for row in found.rows["modalities"]}
    assert rows["rows with"] == ["image", "text"]
    assert rows["any label"] == [f"{everything.gates[modality]:.3f}" for modality in ("image", "text")]
    assert rows["star"] == [
        f"{everything.gates_per_class[modality][run.classes.index('star')]:.3f}" for modality in ("image", "text")
    ]


def test_an_ensemble(saved, store, tmp_path, parse):
    other = train_head(store, replace(saved.config, loss="focal", monitor="macro_f1"))
    save_run(other, tmp_path)
    joined = ensemble([saved, other], store)
    found = parse(report_html(joined, store))
    assert f"cachefuse ensemble {saved.name} {other.name} --thresholds class" in found.text
    assert "10 models, a line for each" in found.text
    assert "Validation score" in found.text
    assert "have seen the held-out rows" in found.text
    assert "not saved" in found.text


def test_multi_class(dataset, open_store, parse, quick):
    targets = np.where(dataset.targets[:, 0] < 0, -1, dataset.targets[:, :4].argmax(axis=1)).astype(np.int32)
    manifest = dataset.manifest.model_copy(update={"task": "multiclass"})
    store = open_store(replace(dataset, manifest=manifest, targets=targets, classes=dataset.classes[:4]))
    run = train_head(store, replace(quick, loss="ce"))
    found = parse(report_html(run, store, dataset))
    assert "together" not in found.sections
    assert found.rows["classes"][0][-1] == "recall"
    matrix = confusion_matrix(targets[run.held_out.rows], run.held_out.scores.argmax(axis=1))
    names, *rows = found.rows["confusion"][:5]
    for row in rows:
        assert row[0] in names
        for name, cell in zip(names[1:], row[1:], strict=True):
            i, j = dataset.classes.index(row[0]), dataset.classes.index(name)
            assert int(cell or 0) == matrix[i, j]
    assert f"The class is right for {100 * matrix.trace() / matrix.sum():.0f}% of" in found.text


def test_one_class(dataset, open_store, parse, quick):
    store = open_store(replace(dataset, classes=("<i>only</i>",), targets=dataset.targets[:, :1]))
    found = parse(report_html(train_head(store, quick), store, dataset))
    assert found.sections.count("together") == 0
    assert [row[0] for row in found.rows["classes"]] == ["class", "<i>only</i>"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [150, 1000])
def test_many_classes(n, dataset, open_store, parse, quick):
    rng = np.random.default_rng(0)
    targets = np.where(dataset.targets[:, :1] < 0, -1, rng.random((len(dataset), n)) < 0.02).astype(np.int8)
    classes = tuple(f"a class with a name that is rather long, number {c} & more" for c in range(n))
    wide = replace(dataset, classes=classes, targets=targets)
    store = open_store(wide)
    html = report_html(train_head(store, replace(quick, epochs=2)), store, wide)
    found = parse(html)
    assert len(html) < 1_000_000
    assert len(found.rows["classes"]) == 1 + tables.MAX_ROWS
    assert f"the 100 classes with the lowest F1 of {n:,}" in found.text
    assert "Each class, the 12 with the most rows" in found.text
    assert len(found.rows["together"]) == 1 + tables.MAX_CELLS
    assert f"The 40 of {n:,} classes with the most rows." in found.text


def test_an_unsaved_run_and_one_that_is_right_everywhere(store, dataset, parse, quick):
    run = train_head(store, replace(quick, thresholds="none"))
    run.held_out = replace(run.held_out, scores=(store.targets[run.held_out.rows] > 0).astype(np.float32))
    found = parse(report_html(run, store, dataset))
    assert "None: every row has all its labels right." in found.text
    assert "100% of the labels are found" in found.text
    assert "not saved" in found.text
    assert "torch" not in found.text


def test_many_models_and_many_epochs_stay_small(saved, store):
    epochs = [Epoch(i + 1, 1 / (i + 1), 0.5, False, 2 / (i + 1), 0.4) for i in range(5000)]
    run = replace(saved, histories=[History(epochs, best_epoch=5000)] * 60)
    html = report_html(run, store)
    assert len(html) < 1_500_000
    assert "60 models, a line for each of the first 50" in html
    assert html.count("validation, model") + html.count("averaged weights (EMA), model") == 2 * 50


def test_a_history_of_one_epoch_or_none(saved, store):
    one = report_html(replace(saved, histories=[History([Epoch(1, 0.5, None, True)], best_epoch=1)]), store)
    assert "Loss: training over 1 epochs." in one
    assert "Validation micro-F1" not in one
    none = report_html(replace(saved, histories=[]), store)
    assert "The run keeps no record of its epochs." in none
