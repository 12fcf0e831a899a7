"""Which rows a batch draws, and which modalities it takes away from them."""

import numpy as np
import pytest
import torch

from cachefuse.feature_spec import pooled_specs
from cachefuse.training.batches import Batches, balanced_sample_weights, drop_modalities
from cachefuse.training.feature_table import FeatureTable


def drawn(n, rows, batch_size, generator, sample_weights, epochs=1):
    """The row numbers of each batch, of a table of n rows, by epoch."""
    numbers = torch.arange(n)[:, None]
    table = FeatureTable(
        {"image": numbers},
        pooled_specs({"image": 1}),
        {"image": numbers >= 0},
        numbers,
        np.ones(n, bool),
        np.array([""] * n),
    )
    batches = Batches(table, rows, batch_size, generator, sample_weights)
    return [[features["image"][:, 0] for features, _, _ in batches] for _ in range(epochs)]


class TestBalancedChances:
    def test_by_hand(self):
        """Labels 0, 1 and 2 occur four times, twice and once; two rows have none."""
        targets = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
        sample_weights = balanced_sample_weights(targets.to(torch.uint8))
        assert sample_weights.dtype == torch.float64
        assert sample_weights.tolist() == [1 / 4, 1 / 2, 1 / 4, 1, 1 / 2, 1 / 2, 1 / 2]

    @pytest.mark.parametrize("counts", [[500, 1], [10, 10, 10], [300, 60, 7, 2]])
    def test_in_multi_class_each_class_is_as_likely(self, counts):
        numbers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        sample_weights = balanced_sample_weights(torch.eye(len(counts), dtype=torch.uint8)[numbers])
        of_class = torch.zeros(len(counts), dtype=torch.float64).index_add(0, numbers, sample_weights)
        np.testing.assert_allclose(of_class, 1, rtol=1e-12)

    def test_a_class_without_rows_changes_nothing(self):
        targets = torch.eye(3, dtype=torch.uint8)[torch.tensor([0, 0, 1])]
        assert balanced_sample_weights(targets).tolist() == [1 / 2, 1 / 2, 1]

    @pytest.mark.parametrize("value", [0, 1])
    def test_rows_that_are_all_alike_are_equally_likely(self, value):
        assert balanced_sample_weights(torch.full((4, 2), value, dtype=torch.uint8)).tolist() == [1 / 4] * 4

    @pytest.mark.parametrize("batch_size", [0, 64])
    def test_draws_follow_them(self, batch_size):
        """Over many epochs each class comes as often as the others: within five standard deviations."""
        numbers = torch.repeat_interleave(torch.arange(3), torch.tensor([160, 30, 10]))
        rows = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:200]
        class_of = torch.full((1000,), -1).index_copy(0, rows, numbers)
        sample_weights = balanced_sample_weights(torch.eye(3, dtype=torch.uint8)[numbers])
        epochs = drawn(1000, rows, batch_size, torch.Generator().manual_seed(0), sample_weights, epochs=50)
        for batches in epochs:
            assert [len(batch) for batch in batches] == ([64, 64, 64, 8] if batch_size else [200])
        taken = torch.cat([batch for batches in epochs for batch in batches])
        counts = torch.bincount(class_of[taken], minlength=3)  # -1 would raise: no other row is drawn
        assert counts.sum() == 10_000
        deviation = (10_000 * 1 / 3 * 2 / 3) ** 0.5
        assert (counts - 10_000 / 3).abs().max() < 5 * deviation
        assert len(taken.unique()) == 200

    def test_the_same_generator_draws_the_same(self):
        rows, sample_weights = torch.arange(50), torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1
        draws = [
            torch.cat(drawn(50, rows, 8, torch.Generator().manual_seed(seed), sample_weights)[0]) for seed in (0, 0, 1)
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_a_chance_of_zero_is_never_taken(self):
        rows, sample_weights = torch.arange(10, 14), torch.tensor([0.0, 1, 0, 3])
        epochs = drawn(20, rows, 2, torch.Generator().manual_seed(0), sample_weights, epochs=9)
        assert {row for batches in epochs for batch in batches for row in batch.tolist()} == {11, 13}


class TestDropModalities:
    @pytest.fixture
    def present(self):
        """40,000 rows: a fifth with everything, with all but the image, the text alone, the image alone, nothing."""
        kind = torch.arange(40_000) % 5
        return {
            "audio": (kind == 0) | (kind == 1),
            "image": (kind == 0) | (kind == 3),
            "text": (kind == 0) | (kind == 1) | (kind == 2),
        }

    def drop(self, present, p, seed=0):
        return drop_modalities(present, pooled_specs(dict.fromkeys(present, 1)), p, torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_never_takes_the_last_and_never_gives(self, present, p):
        kept = self.drop(present, p)
        assert list(kept) == list(present)
        assert all(x.dtype == torch.bool and x.shape == (40_000,) for x in kept.values())
        before, after = (torch.stack(list(x.values())) for x in (present, kept))
        assert not (after & ~before).any()
        assert torch.equal(after.any(0), before.any(0))

    def test_zero_takes_nothing_and_one_leaves_one(self, present):
        assert all(torch.equal(x, present[m]) for m, x in self.drop(present, 0.0).items())
        left = torch.stack(list(self.drop(present, 1.0).values())).sum(0)
        assert torch.equal(left, torch.stack(list(present.values())).any(0).long())

    @pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
    def test_as_often_as_it_should(self, present, p):
        """Of M present ones, each goes with p, unless all do and it is the one spared: 1 - p + p^M / M stay."""
        kept = self.drop(present, p)
        kind = torch.arange(40_000) % 5
        for rows, n in ((kind == 0, 3), (kind == 1, 2)):
            for modality, here in present.items():
                if here[rows].all():
                    expected = 1 - p + p**n / n
                    assert kept[modality][rows].float().mean() == pytest.approx(expected, abs=0.03)
        for rows, modality in ((kind == 2, "text"), (kind == 3, "image")):
            assert kept[modality][rows].all()  # the only one

    def test_modalities_go_independently(self, present):
        kept = self.drop(present, 0.5)
        rows = torch.arange(40_000) % 5 == 0
        both = (kept["image"] & kept["text"])[rows].float().mean()
        assert both == pytest.approx(1 / 4, abs=0.03)

    def test_the_same_generator_takes_the_same_and_leaves_its_input(self, present):
        before = {m: x.clone() for m, x in present.items()}
        one, again, other = (self.drop(present, 0.5, seed) for seed in (0, 0, 1))
        assert all(torch.equal(one[m], again[m]) for m in present)
        assert not all(torch.equal(one[m], other[m]) for m in present)
        assert all(torch.equal(present[m], before[m]) for m in present)

    def test_one_modality_always_stays(self):
        here = torch.tensor([True, False, True])
        assert torch.equal(self.drop({"text": here}, 0.9)["text"], here)

    def test_no_rows(self):
        none = {"image": torch.zeros(0, dtype=torch.bool), "text": torch.zeros(0, dtype=torch.bool)}
        assert {m: len(x) for m, x in self.drop(none, 0.5).items()} == {"image": 0, "text": 0}
