"""Ranks and recall against plain loops; what is undecided counts as not found."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cachefuse.alignment import ranks
from cachefuse.alignment.ranks import Embedded, best_ranks, modality_gap, recall_at


def unit(n, width, seed=0):
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(vectors, dim=1).float()


def embedded(vectors, owners, items=None):
    return Embedded(torch.as_tensor(vectors, dtype=torch.float32), np.array(owners), items)


def by_loops(queries, gallery):
    """For each query, the items of other samples that score as high as its best own one, and one."""
    found = []
    for q, owner in enumerate(queries.owners):
        own, others = [], []
        for g, other in enumerate(gallery.owners):
            score = float(queries.vectors[q].double() @ gallery.vectors[g].double())
            itself = queries.items is not None and queries.items[q] == gallery.items[g]
            if owner == other:
                own.append((score, itself))
            else:
                others.append(score)
        if len(own) > 1:
            own = [(score, itself) for score, itself in own if not itself]
        best = max(score for score, _ in own)
        found.append(1 + sum(score >= best - 1e-7 for score in others))
    return found


def several(n=23, width=6, seed=0, same=False):
    """Return queries and a gallery of n samples with 1 to 4 items each, in no order."""
    rng = np.random.default_rng(seed)
    made = []
    centres = unit(n, width, seed)
    for side in (0, 1):
        if not same or not side:
            owners = rng.permutation(np.repeat(np.arange(n), rng.integers(1, 5, n)))
        vectors = F.normalize(
            centres[torch.from_numpy(owners)] + 0.7 * unit(len(owners), width, seed + 1 + side), dim=1
        )
        made.append(Embedded(vectors, owners, np.arange(len(owners)) if same else None))
    return made


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_are_those_of_a_loop(seed, same):
    queries, gallery = several(seed=seed, same=same)
    assert best_ranks(queries, gallery).tolist() == by_loops(queries, gallery)
    assert best_ranks(gallery, queries).tolist() == by_loops(gallery, queries)
    assert len({*best_ranks(queries, gallery).tolist()}) > 3


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("block", [1, 60, 61, 119, 1000, 1 << 24])
def test_by_blocks_they_are_the_same(monkeypatch, block, same):
    queries, gallery = several(same=same)
    expected = by_loops(queries, gallery)
    monkeypatch.setattr(ranks, "BLOCK_FLOATS", block)
    assert best_ranks(queries, gallery).tolist() == expected


def test_by_hand():
    """Two images at right angles, three captions: the second one's own is in the wrong place."""
    images = embedded([[1.0, 0], [0, 1]], [0, 1])
    texts = embedded([[1.0, 0], [0.6, 0.8], [0.8, 0.6]], [0, 0, 1])
    assert best_ranks(images, texts).tolist() == [1, 2]
    assert best_ranks(texts, images).tolist() == [1, 2, 2]


def test_the_first_of_several_items_counts():
    query = embedded([[1.0, 0]], [7])
    gallery = embedded([[0.9, 0], [0.1, 0], [0.5, 0], [0.8, 0], [0.7, 0]], [3, 7, 7, 3, 4])
    assert best_ranks(query, gallery).tolist() == [4]  # behind the two of sample 3 and the one of sample 4


class TestTies:
    @pytest.mark.parametrize(("n", "width"), [(5, 3), (33, 300), (517, 512), (1003, 7)])
    def test_vectors_that_are_all_alike_find_nothing(self, n, width):
        alike = Embedded(unit(1, width).expand(n, width).contiguous(), np.arange(n))
        assert best_ranks(alike, alike).tolist() == [n] * n

    def test_vectors_of_zeros_find_nothing(self):
        nothing = embedded(np.zeros((6, 4)), [0, 0, 1, 1, 2, 2])
        assert best_ranks(nothing, nothing).tolist() == [5] * 6
        assert best_ranks(embedded(unit(6, 4), nothing.owners), nothing).tolist() == [5] * 6

    def test_another_samples_equal_item_comes_first_wherever_it_lies(self):
        query = embedded([[1.0, 0]], [0])
        for owners in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
            assert best_ranks(query, embedded([[1.0, 0], [1, 0], [0, 1]], owners)).tolist() == [2 if owners[2] else 3]

    def test_ones_own_equal_items_do_not_stand_in_the_way(self):
        query = embedded([[1.0, 0]], [0])
        assert best_ranks(query, embedded([[1.0, 0]] * 3 + [[0.5, 0]], [0, 0, 0, 1])).tolist() == [1]

    def test_vectors_that_are_nan_find_nothing(self):
        nothing = embedded(np.full((4, 3), np.nan), range(4))
        assert best_ranks(nothing, embedded(unit(4, 3), range(4))).tolist() == [4] * 4
        assert best_ranks(embedded(unit(4, 3), range(4)), nothing).tolist() == [4] * 4


class TestTheSameItems:
    def test_an_item_is_no_answer_to_itself(self):
        """Each is nearest to itself; then to a stranger; then to the other of its own sample."""
        vectors = [[1.0, 0], [0.6, 0.8], [0.98, 0.2], [0, 1]]
        both = embedded(vectors, [0, 0, 1, 1], np.arange(4))
        assert best_ranks(both, both).tolist() == by_loops(both, both) == [2, 3, 3, 2]

    def test_unless_its_sample_has_no_other(self):
        both = embedded([[1.0, 0], [0.9, 0.1], [0, 1]], [0, 1, 2], np.arange(3))
        assert best_ranks(both, both).tolist() == [1, 2, 1]

    def test_without_numbers_it_is_one(self):
        both = embedded([[1.0, 0], [0.6, 0.8], [0.98, 0.2], [0, 1]], [0, 0, 1, 1])
        assert best_ranks(both, both).tolist() == [1, 1, 1, 1]

    def test_they_go_by_their_numbers_and_not_by_their_places(self):
        queries = embedded([[1.0, 0], [0, 1]], [5, 6], np.array([10, 12]))
        gallery = embedded([[0, 1.0], [1, 0], [0.5, 0], [0, 0.5]], [6, 5, 5, 6], np.array([12, 10, 11, 13]))
        assert best_ranks(queries, gallery).tolist() == [1, 1]
        assert best_ranks(queries, embedded(gallery.vectors * torch.tensor([[1], [1], [-1], [1]]), gallery.owners,
                                            gallery.items)).tolist() == [3, 1]  # fmt: skip

    def test_the_vectors_stay_as_they_were(self):
        queries, gallery = several(same=True)
        before = queries.vectors.clone(), gallery.vectors.clone()
        best_ranks(queries, gallery)
        assert torch.equal(queries.vectors, before[0])
        assert torch.equal(gallery.vectors, before[1])


def test_no_queries_have_no_ranks():
    nobody = Embedded(torch.zeros(0, 3), np.zeros(0, np.int64))
    assert best_ranks(nobody, embedded(unit(4, 3), range(4))).shape == (0,)


def test_recall_by_hand():
    found = np.array([1, 3, 2, 11, 5, 1])
    assert [recall_at(found, k) for k in (1, 2, 5, 10, 11)] == pytest.approx([2 / 6, 3 / 6, 5 / 6, 5 / 6, 1])


def test_recall_of_nothing_is_nan():
    assert np.isnan(recall_at(np.zeros(0, np.int64), 5))


def test_the_modality_gap_by_hand():
    x = torch.tensor([[1.0, 0], [0, 1]])
    y = torch.tensor([[-1.0, 0], [0, 1], [0, -1]])
    assert modality_gap(x, y) == pytest.approx(np.hypot(0.5 + 1 / 3, 0.5))
    assert modality_gap(y, x) == pytest.approx(modality_gap(x, y))


def test_the_modality_gap_of_the_same_is_none_and_of_opposites_two():
    x = unit(1, 8).expand(5, 8)
    assert modality_gap(x, x) == 0
    assert modality_gap(x, -x) == pytest.approx(2)
    assert modality_gap(unit(20, 8), unit(20, 8).flip(0)) == pytest.approx(0, abs=1e-12)
