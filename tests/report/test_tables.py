import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from cachefuse.report import tables


def test_of_very_many_classes_the_weakest_that_occur_are_shown():
    n = tables.MAX_ROWS + 60
    rng = np.random.default_rng(0)
    by = {key: rng.random(n).tolist() for key in ("precision", "recall", "f1", "ap")}
    by["support"] = [0 if c < 20 else int(rng.integers(1, 9)) for c in range(n)]
    classes = tuple(f"class {c}" for c in range(n))
    found = tables.class_figures(by, classes, np.linspace(0, 1, n))
    weakest = sorted(range(20, n), key=lambda c: by["f1"][c])[: tables.MAX_ROWS]
    assert {row.name for row in found} == {classes[c] for c in weakest}
    assert [row.support for row in found] == sorted((row.support for row in found), reverse=True)
    for row in found:
        c = classes.index(row.name)
        assert (row.precision, row.recall, row.f1, row.ap) == tuple(
            by[k][c] for k in ("precision", "recall", "f1", "ap")
        )
        assert row.threshold == pytest.approx(c / (n - 1))
    assert [name for name, _ in tables.weakest(by, classes)] == [classes[c] for c in weakest[:3]]


def test_labels_together_by_counting(random_rows):
    measured = random_rows()
    found = tables.cooccurrence(measured.targets, measured.classes)
    for i, name in enumerate(found.names):
        for j, other in enumerate(found.names):
            a, b = (measured.classes.index(label) for label in (name, other))
            n = sum(bool(row[a] and row[b]) for row in measured.targets)
            cell = found.cells[i][j]
            assert (cell.count, cell.same) == (n, i == j)
            assert cell.share == pytest.approx(n / measured.targets[:, a].sum(), abs=1e-3)


def test_mistakes_by_counting(random_rows):
    measured = random_rows()
    classes = measured.classes
    found = tables.mistakes(measured, classes)
    assert found.names[-1] == "nothing"
    counts = {}
    for true, given in zip(measured.targets, measured.predictions, strict=True):
        missed = [classes[c] for c in range(6) if true[c] and not given[c]] or ["nothing"]
        wrong = [classes[c] for c in range(6) if given[c] and not true[c]] or ["nothing"]
        for a in missed:
            for b in wrong:
                counts[a, b] = counts.get((a, b), 0) + 1
    counts["nothing", "nothing"] = 0
    table = {(a, b): cell.count for a, row in zip(found.names, found.cells, strict=True)
             for b, cell in zip(found.names, row, strict=True)}  # fmt: skip
    assert {pair: n for pair, n in table.items() if n} == {pair: n for pair, n in counts.items() if n}
    shares = [cell.share for row in found.cells for cell in row]
    assert max(shares) == 1
    assert all(row[-1].share == 0 for row in found.cells)
    pairs = sorted(((n, a, b) for (a, b), n in counts.items() if "nothing" not in (a, b)), reverse=True)
    frequent = tables.frequent_mistakes(measured, classes)
    assert [n for _, _, n in frequent] == [n for n, _, _ in pairs[:10]]
    assert all(counts[a, b] == n for a, b, n in frequent)


def test_confusion_is_scikit_learns(random_rows):
    measured = random_rows(task="multiclass", n_classes=50, n=800)
    found = tables.confusion(measured, measured.classes)
    assert (found.n_shown, found.n_classes, len(found.cells), found.numbered) == (40, 50, 40, False)
    theirs = confusion_matrix(measured.targets.argmax(axis=1), measured.predictions.argmax(axis=1))
    order = [measured.classes.index(name) for name in found.names]
    assert [[cell.count for cell in row] for row in found.cells] == theirs[np.ix_(order, order)].tolist()
    support = measured.targets.sum(axis=0)
    assert min(support[order]) >= max(np.delete(support, order))
