from fractions import Fraction

import numpy as np
import pytest
from sklearn.model_selection import KFold, StratifiedKFold

from cachefuse.data.folds import join_groups, stratified_folds
from cachefuse.errors import ConfigError
from fixtures.messages import naming


def labels(seed, n, classes, prevalence=0.3):
    """Return targets whose labels go from common to rare and occur together, with rows that have none."""
    rng = np.random.default_rng(seed)
    common = prevalence * 0.7 ** np.arange(classes)
    busy = rng.choice([0.2, 1, 2], size=(n, 1))
    return (rng.random((n, classes)) < common * busy).astype(np.int8)


def per_fold(targets, folds, k):
    """Return the positives of each label in each fold, (k, C)."""
    return np.array([targets[folds == fold].sum(axis=0) for fold in range(k)])


def as_published(targets, k, seed):
    """Algorithm 1 in the paper's own terms, desired examples that shrink; draws are made as the package makes them."""
    rng = np.random.default_rng(seed)
    n = len(targets)
    desired = [Fraction(n, k)] * k
    desired_of_label = [[Fraction(int(total), k) for total in targets.sum(axis=0)] for _ in range(k)]
    left, folds = set(range(n)), [None] * n
    while left:
        remaining = {c: sum(targets[i, c] for i in left) for c in range(targets.shape[1])}
        remaining = {c: total for c, total in remaining.items() if total}
        label = min(remaining, key=remaining.get) if remaining else None
        rows = sorted(i for i in left if label is None or targets[i, label])
        for i, lots in zip(rng.permutation(rows), rng.random((len(rows), k)), strict=True):
            wants = desired if label is None else [row[label] for row in desired_of_label]
            most = [j for j in range(k) if wants[j] == max(wants)]
            most = [j for j in most if desired[j] == max(desired[m] for m in most)]
            folds[i] = fold = min(most, key=lots.__getitem__)
            for c in np.flatnonzero(targets[i]):
                desired_of_label[fold][c] -= 1
            desired[fold] -= 1
            left.remove(i)
    return folds


@pytest.mark.parametrize(
    ("n", "classes", "k"), [(2, 1, 2), (7, 3, 7), (40, 1, 3), (60, 5, 4), (150, 12, 5), (90, 30, 10)]
)
@pytest.mark.parametrize("prevalence", [0, 0.1, 0.5, 1])
def test_against_the_algorithm_as_published(n, classes, k, prevalence):
    targets = labels(n, n, classes, prevalence)
    assert stratified_folds(targets, k, seed=3).tolist() == as_published(targets, k, seed=3)


@pytest.mark.parametrize("k", [2, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_and_sizes_are_even(k, seed):
    targets = labels(seed, 3000, 18)
    folds = stratified_folds(targets, k, seed)
    assert folds.shape == (3000,)
    assert folds.dtype == np.int64
    assert np.ptp(per_fold(targets, folds, k), axis=0).max() <= 2
    sizes = np.bincount(folds)
    assert len(sizes) == k
    assert np.ptp(sizes) <= 2


def test_more_even_than_random_folds():
    for seed in range(5):
        targets = labels(seed, 400, 18)
        folds = stratified_folds(targets, 5, seed)
        random = np.empty(400, int)
        for fold, (_, rows) in enumerate(KFold(5, shuffle=True, random_state=seed).split(targets)):
            random[rows] = fold
        ours, theirs = (np.ptp(per_fold(targets, f, 5), axis=0).mean() for f in (folds, random))
        assert ours < theirs / 3


@pytest.mark.parametrize("k", [2, 3, 5])
def test_multi_class_is_stratified_within_one(k):
    rng = np.random.default_rng(0)
    classes = rng.choice(7, size=503, p=np.array([40, 25, 15, 10, 6, 3, 1]) / 100)
    targets = classes[:, None] == np.arange(8)  # the last has no row
    folds = stratified_folds(targets, k, seed=0)
    counts = per_fold(targets, folds, k)
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(np.bincount(folds)) <= 1
    rows = [rows for _, rows in StratifiedKFold(k).split(targets, classes)]
    np.testing.assert_array_equal(np.sort(counts, axis=0), np.sort([targets[r].sum(axis=0) for r in rows], axis=0))


@pytest.mark.parametrize("positives", [1, 2, 3, 5])
def test_a_rare_label_lands_in_as_many_folds_as_it_has_rows(positives):
    for seed in range(20):
        targets = labels(seed, 200, 6, prevalence=0.5)
        targets[:, 4] = 0
        rows = np.random.default_rng(seed).choice(200, size=positives, replace=False)
        targets[rows, 4] = 1
        targets[:, 5] = targets[:, 3]  # never rarer than the rare one
        folds = stratified_folds(targets, 5, seed)
        assert len(set(folds[rows])) == positives


def test_rows_without_labels_even_out_the_sizes():
    targets = np.zeros((103, 3), np.int8)
    targets[:7] = 1
    targets[7:13, 0] = 1
    folds = stratified_folds(targets, 5, seed=0)
    assert sorted(np.bincount(folds)) == [20, 20, 21, 21, 21]
    assert sorted(np.bincount(folds[:13], minlength=5)) == [2, 2, 3, 3, 3]
    assert np.ptp(np.bincount(stratified_folds(np.zeros((17, 0)), 5, seed=0))) == 1


@pytest.mark.parametrize("n", [2, 3, 10])
def test_as_many_folds_as_rows(n):
    for seed in range(20):
        targets = np.random.default_rng(seed).random((n, 4)) < 0.5
        assert sorted(stratified_folds(targets, n, seed)) == list(range(n))


def test_the_seed_decides():
    targets = labels(0, 300, 5)
    first = stratified_folds(targets, 5, 1)
    np.testing.assert_array_equal(stratified_folds(targets, 5, 1), first)
    np.testing.assert_array_equal(stratified_folds(targets, 5, np.random.default_rng(1)), first)
    np.testing.assert_array_equal(stratified_folds(targets.astype(bool), 5, 1), first)
    assert (stratified_folds(targets, 5, 2) != first).any()


def test_the_targets_stay_as_they_are():
    targets = labels(0, 50, 3)
    before = targets.copy()
    stratified_folds(targets, 5, 0)
    np.testing.assert_array_equal(targets, before)


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 0), (10, -2), (10, 11), (0, 2), (1, 2)])
def test_number_of_folds(n, k):
    with pytest.raises(ConfigError, match=naming(f"folds 2 {n} {k}")):
        stratified_folds(np.ones((n, 3)), k, seed=0)


def union_find(partitions):
    """The number of each row's group, by merging rows two at a time."""
    n = len(partitions[0])
    parent = list(range(n))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for partition in partitions:
        for i in range(n):
            for j in range(i):
                if partition[i] == partition[j]:
                    first, last = sorted((root(i), root(j)))
                    parent[last] = first
    numbers = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(n)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_partitions", [1, 2, 3])
def test_groups_that_share_a_row_are_one(seed, n_partitions):
    rng = np.random.default_rng(seed)
    partitions = [rng.integers(0, 40, 50) for _ in range(n_partitions)]
    groups = join_groups(partitions)
    assert groups.dtype == np.int64
    assert groups.tolist() == union_find(partitions)


def test_a_chain_of_groups_is_one():
    assert join_groups([np.array([0, 0, 1, 1, 2]), np.array([9, 8, 8, 7, 6])]).tolist() == [0, 0, 0, 0, 1]
    assert join_groups([np.empty(0, int), np.empty(0, int)]).tolist() == []
