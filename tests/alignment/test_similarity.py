"""How alike sentences are: cosines, correlations, the tolerance curve and the threshold, each against another way."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support

from cachefuse.alignment import similarity as module
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.similarity import TOLERANCES, best_threshold, pair_cosines, similarity
from cachefuse.alignment.train import align
from cachefuse.errors import ConfigError, DataError, RunError
from cachefuse.store.store import FeatureStore
from fixtures.messages import naming

SCORED = 'task = "similarity"\nscale = [0.0, 5.0]'
PARAPHRASES = 'task = "paraphrase"\nclasses = ["0", "1"]'
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("one_thread")


def at(cosines, length=1.0):
    """Return two texts a sample with these cosines, in float32: N arrays (2, 2)."""
    return [np.array([[length, 0], [2 * c, 2 * np.sqrt(1 - c * c)]], np.float32) for c in cosines]


def random_texts(n, width=8, seed=0):
    """Return two texts a sample, more or less alike."""
    rng = np.random.default_rng(seed)
    first, other = rng.normal(size=(2, n, width))
    second = first + rng.uniform(0.1, 3, (n, 1)) * other
    return list(np.stack([first, second], 1).astype(np.float16))


def direct(texts):
    found = []
    for pair in texts:
        x, y = pair.astype(np.float64)
        found.append(float(sum(x * y) / (sum(x * x) ** 0.5 * sum(y * y) ** 0.5)))
    return found


@pytest.fixture
def scored(make_store):
    """Return ``make(texts, scores)``, and its splits, all test where they are not given."""

    def make(texts, scores, splits=None, about=SCORED, dtype=np.float32):
        encoders = texts if isinstance(texts, dict) else {"toy": texts}
        return make_store(
            splits or ["test"] * len(scores), texts=encoders, targets=np.array(scores, dtype), about=about,
            dtype=next(iter(encoders.values()))[0].dtype.name,
        )  # fmt: skip

    return make


@pytest.fixture
def labelled(scored):
    def make(texts, labels, splits=None):
        return scored(texts, labels, splits, PARAPHRASES, np.int32)

    return make


class TestCosines:
    def test_are_direct_ones(self, scored, monkeypatch):
        texts = random_texts(50)
        store = scored(texts, np.zeros(50))
        expected = direct(texts)
        features = store.open_features("toy", "text")
        np.testing.assert_allclose(pair_cosines(features), expected, atol=1e-12)
        monkeypatch.setattr(module, "CHUNK", 7)
        np.testing.assert_allclose(pair_cosines(features), expected, atol=1e-12)

    def test_across_the_first_is_by_one_and_the_second_by_the_other(self, scored):
        texts, others = random_texts(20), random_texts(20, seed=1)
        store = scored({"one": texts, "two": others}, np.zeros(20))
        one, two = (store.open_features(name, "text") for name in ("one", "two"))
        mixed = [np.stack([a[0], b[1]]) for a, b in zip(texts, others, strict=True)]
        np.testing.assert_allclose(pair_cosines(one, two), direct(mixed), atol=1e-12)
        np.testing.assert_allclose(pair_cosines(two, one), direct([np.stack([b[0], a[1]]) for a, b in
                                                                   zip(texts, others, strict=True)]))  # fmt: skip

    def test_vectors_of_zeros_have_a_cosine_of_0(self, scored):
        texts = random_texts(3)
        texts[1][0] = 0
        texts[2][:] = 0
        cosines = pair_cosines(scored(texts, np.zeros(3)).open_features("toy", "text"))
        assert cosines[1:].tolist() == [0, 0]
        assert cosines[0] == pytest.approx(direct(texts[:1])[0])

    def test_the_extremes_of_float16_are_no_infinity(self, scored):
        texts = [np.full((2, 8), 65504, np.float16), np.full((2, 8), 6e-8, np.float16)]
        assert pair_cosines(scored(texts, np.zeros(2)).open_features("toy", "text")) == pytest.approx([1, 1])

    def test_what_is_no_pair_has_none(self, make_store):
        texts = [np.ones((n, 3)) for n in (2, 1, 0, 3, 2)]
        cosines = pair_cosines(make_store(["train"] * 5, texts={"toy": texts}).open_features("toy", "text"))
        assert np.isnan(cosines).tolist() == [False, True, True, True, False]

    def test_nor_has_what_was_found_to_be_unusable(self, scored, monkeypatch):
        store = scored(random_texts(3), np.zeros(3))
        monkeypatch.setattr(FeatureStore, "present", lambda self, modality: np.array([True, False, True]))
        assert np.isnan(pair_cosines(store.open_features("toy", "text"))).tolist() == [False, True, False]

    def test_one_text_a_sample_is_refused(self, make_store):
        store = make_store(["train"] * 3, texts={"toy": [np.ones((1, 3))] * 3})
        with pytest.raises(DataError, match=naming("made text")):
            pair_cosines(store.open_features("toy", "text"))


class TestScored:
    def test_correlations_by_hand(self, scored):
        """Ranks 1 2 3 4 against 2 1 3 4: Spearman is 1 - 6 * 2 / (4 * 15)."""
        cosines, scores = np.array([0.1, 0.2, 0.6, 0.8]), np.array([1.0, 0.5, 3, 5])
        found = similarity(scored(at(cosines), scores))["toy"]["test"]
        assert found.n_pairs == 4
        assert found.spearman == pytest.approx(0.8)
        a, b = cosines - cosines.mean(), scores - scores.mean()
        assert found.pearson == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), abs=1e-6)

    def test_correlations_are_scipys_with_ties(self, scored):
        texts = random_texts(200)
        scores = np.clip(np.round(np.random.default_rng(1).normal(2.5, 1, 200) + 2 * np.array(direct(texts)), 1), 0, 5)
        found = similarity(scored(texts, scores))["toy"]["test"]
        cosines = direct(texts)
        assert found.pearson == pytest.approx(stats.pearsonr(scores.astype(np.float32), cosines)[0], abs=1e-9)
        assert found.spearman == pytest.approx(stats.spearmanr(scores.astype(np.float32), cosines)[0], abs=1e-9)
        assert found.pearson > 0.3

    @pytest.mark.parametrize(
        ("cosines", "scores"),
        [([0.5], [3]), ([0.5, 0.7, 0.9], [2, 2, 2]), ([0.5, 0.5, 0.5], [1, 2, 3])],
    )
    def test_what_does_not_vary_has_no_correlation(self, scored, cosines, scores):
        found = similarity(scored(at(cosines), scores))["toy"]["test"]
        assert np.isnan([found.pearson, found.spearman]).all()
        assert found.n_pairs == len(cosines)

    def test_the_tolerance_curve_by_hand(self, scored):
        """Cosines lie on the scale at 0, 2, 2.5 and 5, a negative one at its lower end: off by 0.55, 0.3, 1.5 and 0."""
        found = similarity(scored(at([-0.3, 0.4, 0.5, 1.0]), [0.55, 2.3, 4.0, 5.0]))["toy"]["test"]
        assert list(found.tolerance) == ["all", "0-1", "2-3", "4-5"]
        assert all(len(curve) == len(TOLERANCES) == 100 for curve in found.tolerance.values())

        def share(name, e):
            return found.tolerance[name][int(np.searchsorted(TOLERANCES, e))]

        assert [share("all", e) for e in (0.1, 0.29, 0.32, 0.54, 0.56, 1.0)] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
        assert [share("0-1", e) for e in (0.1, 0.54, 0.56, 1.0)] == [0, 0, 1, 1]
        assert [share("2-3", e) for e in (0.29, 0.32)] == [0, 1]
        assert [share("4-5", e) for e in (0.1, 1.0)] == [0.5, 0.5]  # 4 and 5 are both in the last unit

    def test_the_tolerance_curve_is_that_of_a_loop(self, scored):
        texts = random_texts(80)
        scores = np.random.default_rng(1).uniform(0, 5, 80).astype(np.float32)
        found = similarity(scored(texts, scores))["toy"]["test"].tolerance
        cosines = direct(texts)
        for name, curve in found.items():
            mine = [i for i in range(80) if name == "all" or int(name[0]) <= scores[i] < int(name[2])]
            for e, share in zip(TOLERANCES, curve, strict=True):
                near = [abs(5 * max(0.0, cosines[i]) - float(scores[i])) < e for i in mine]
                assert share == pytest.approx(sum(near) / len(near))
        assert list(found) == ["all", "0-1", "1-2", "2-3", "3-4", "4-5"]

    def test_the_scale_is_the_datasets(self, scored):
        """From -1 to 2: a cosine of 0.5 stands for 0.5."""
        about = 'task = "similarity"\nscale = [-1.0, 2.0]'
        found = similarity(scored(at([0.5, 0.0, 1.0]), [0.5, -1.0, 1.5], about=about))["toy"]["test"]
        assert list(found.tolerance) == ["all", "-1-0", "0-1", "1-2"]
        assert [found.tolerance[name][1] for name in found.tolerance] == [pytest.approx(2 / 3), 1, 1, 0]
        assert found.tolerance["1-2"][-1] == 1  # off by 0.5

    def test_a_scale_of_one_unit_has_no_parts(self, scored):
        about = 'task = "similarity"\nscale = [0.0, 1.0]'
        assert list(similarity(scored(at([0.5, 0.2]), [0.4, 0.3], about=about))["toy"]["test"].tolerance) == ["all"]

    def test_by_split_without_those_that_have_no_score(self, scored):
        splits = ["train", "test", "val", "test", "test"]
        store = scored(at([0.1, 0.2, 0.3, 0.4, 0.9]), [1, 2, 3, 4, NAN], splits)
        found = similarity(store)["toy"]
        assert {split: figures.n_pairs for split, figures in found.items()} == {"train": 1, "val": 1, "test": 2}
        assert list(found) == ["train", "val", "test"]
        assert list(similarity(store, split="val")["toy"]) == ["val"]

    def test_every_encoder_or_those_named(self, scored):
        store = scored({"one": random_texts(9), "two": random_texts(9, seed=1)}, np.linspace(0, 5, 9))
        assert sorted(similarity(store)) == ["one", "two"]
        assert list(similarity(store, encoders=["two"])) == ["two"]


class TestThreshold:
    def accuracy(self, cosines, truth, threshold):
        return np.mean((np.array(cosines) >= threshold) == np.array(truth))

    def by_brute_force(self, cosines, truth):
        """The best accuracy of any threshold, and the lowest that has it, as the cosines that are called similar."""
        between = [-2.0, *sorted({*cosines}), 2.0]
        tried = [(a + b) / 2 for a, b in pairwise(between)]
        accuracies = [self.accuracy(cosines, truth, threshold) for threshold in tried]
        first = tried[int(np.argmax(accuracies))]
        return max(accuracies), [c >= first for c in cosines]

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 40])
    @pytest.mark.parametrize("decimals", [1, 16])
    def test_is_the_best_of_all(self, n, decimals):
        rng = np.random.default_rng(n)
        for _ in range(50):
            truth = rng.random(n) < rng.choice([0.0, 0.3, 0.7, 1.0])
            cosines = np.round(np.clip(rng.normal(0.3 * truth, 0.4), -1, 1), decimals)
            threshold = best_threshold(cosines, truth)
            best, called = self.by_brute_force(cosines.tolist(), truth.tolist())
            assert self.accuracy(cosines, truth, threshold) == pytest.approx(best)
            assert (cosines >= threshold).tolist() == called

    def test_by_hand(self):
        assert best_threshold(np.array([0.2, 0.9, 0.6]), np.array([False, True, True])) == pytest.approx(0.4)
        assert best_threshold(np.array([0.6, 0.2, 0.8]), np.array([True, False, False])) == pytest.approx(0.4)

    def test_lies_below_or_above_all_where_all_are_alike(self):
        cosines = np.array([0.2, 0.9, 0.6])
        assert (cosines >= best_threshold(cosines, np.ones(3, bool))).all()
        assert not (cosines >= best_threshold(cosines, np.zeros(3, bool))).any()
        assert not (np.array([1.0]) >= best_threshold(np.array([1.0]), np.array([False]))).any()

    def test_equal_cosines_are_called_the_same(self):
        cosines, truth = np.array([0.5, 0.5, 0.5, 0.7]), np.array([True, False, False, True])
        assert best_threshold(cosines, truth) == pytest.approx(0.6)

    def test_of_nothing_there_is_one_all_the_same(self):
        assert best_threshold(np.zeros(0), np.zeros(0, bool)) == 0

    def test_tells_neighbouring_numbers_apart(self):
        cosines = np.array([0.5, np.nextafter(0.5, 1)])
        assert (cosines >= best_threshold(cosines, np.array([False, True]))).tolist() == [False, True]


class TestParaphrases:
    def made(self, n=60, seed=0):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        return at(np.clip(rng.normal(0.3 + 0.4 * labels, 0.25), -1, 1)), labels

    def test_figures_are_scikit_learns(self, labelled):
        texts, labels = self.made()
        splits = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
        store = labelled(texts, labels, splits)
        cosines = np.array(direct(texts))
        threshold = best_threshold(cosines[:30], labels[:30] == 1)
        found = similarity(store)["toy"]
        for split in ("val", "test"):
            here = np.array(splits) == split
            truth, called = labels[here], (cosines[here] >= threshold).astype(int)
            figures = found[split]
            assert figures.threshold == pytest.approx(threshold, abs=1e-6)
            assert figures.chosen_on == "train"
            assert figures.n_pairs == here.sum()
            assert figures.accuracy == pytest.approx(accuracy_score(truth, called))
            assert figures.average_precision == pytest.approx(average_precision_score(truth, cosines[here]))
            expected = precision_recall_fscore_support(truth, called)
            for c, name in enumerate(("dissimilar", "similar")):
                assert list(figures.by_class[name]) == ["precision", "recall", "f1"]
                assert list(figures.by_class[name].values()) == pytest.approx([part[c] for part in expected[:3]])

    def test_by_hand(self, labelled):
        """Test pairs at 0.3 to 0.8 with a threshold of 0.5, halfway between the train ones."""
        store = labelled(at([0.4, 0.6, 0.3, 0.45, 0.55, 0.8]), [0, 1, 0, 1, 0, 1], ["train"] * 2 + ["test"] * 4)
        found = similarity(store, split="test")["toy"]["test"]
        assert found.threshold == pytest.approx(0.5)
        assert found.accuracy == 0.5
        assert found.by_class["similar"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
        assert found.by_class["dissimilar"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
        assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)

    @pytest.mark.parametrize(
        ("splits", "measured", "source"),
        [
            (("train", "val", "test"), "test", "train"),
            (("train", "val", "test"), "val", "train"),
            (("train", "val", "test"), "train", "val"),
            (("val", "test"), "test", "val"),
            (("test",), "test", "test"),
            (("train",), "train", "train"),
            (("train", "dev"), "dev", "train"),
        ],
    )
    def test_the_threshold_is_from_elsewhere_where_there_is_one(self, labelled, splits, measured, source):
        texts, labels = self.made()
        names = np.resize(splits, 60).tolist()
        store = labelled(texts, labels, names)
        found = similarity(store, split=measured)["toy"][measured]
        here = np.array(names) == source
        assert found.chosen_on == source
        assert found.threshold == pytest.approx(
            best_threshold(np.array(direct(texts))[here], labels[here] == 1), abs=1e-6
        )

    def test_unlabelled_pairs_choose_and_count_nothing(self, labelled):
        """A train split without labels, as a competition's test split may be."""
        texts, labels = self.made()
        splits = np.repeat(["train", "val", "test"], 20).tolist()
        labels[:20] = -1
        labels[45:] = -1
        found = similarity(labelled(texts, labels, splits))["toy"]
        assert {split: (one.n_pairs, one.chosen_on) for split, one in found.items()} == {
            "val": (20, "val"),
            "test": (5, "val"),
        }

    @pytest.mark.parametrize("label", [0, 1])
    def test_pairs_of_one_class_alone(self, labelled, label):
        store = labelled(at([0.2, 0.5, 0.9]), [label] * 3)
        found = similarity(store)["toy"]["test"]
        assert found.accuracy == 1
        assert found.by_class[("dissimilar", "similar")[label]] == {"precision": 1, "recall": 1, "f1": 1}
        assert found.by_class[("similar", "dissimilar")[label]] == {"precision": 0, "recall": 0, "f1": 0}
        assert found.average_precision == 1 if label else np.isnan(found.average_precision)


class TestAlignments:
    @pytest.fixture
    def encoded(self):
        texts = random_texts(60)
        other = list((np.stack(texts) @ np.random.default_rng(1).normal(size=(8, 6))).astype(np.float16))
        return {"bert": texts, "roberta": other}

    @pytest.fixture
    def store(self, scored, encoded):
        scores = np.clip(5 * np.array(direct(encoded["bert"])), 0, 5)
        return scored(encoded, scores, ["train"] * 40 + ["test"] * 20)

    @pytest.fixture
    def run(self, make_store, encoded, tmp_path):
        """An alignment on pairs that all mean the same, by the same encoders."""
        pairs = make_store(["train"] * 40 + ["test"] * 20, texts=encoded, name="pairs")
        run = align(pairs, AlignConfig(width=8, epochs=2, batch_size=16, patience=0), device="cpu")
        run.save(tmp_path / "runs")
        return run

    def test_pairs_that_differ_in_meaning_are_nothing_to_align_on(self, store):
        with pytest.raises(ConfigError, match="aligned"):
            align(store, AlignConfig(width=8, patience=0), device="cpu")

    def test_two_encoders_are_measured_before_after_and_across(self, store, run):
        found = similarity(store, run=run, device="cpu")
        sides = [f"aligned:{run.path}", f"aligned:{run.path}@2"]
        assert len(found) == 5
        assert list(found)[:2] == ["bert", "roberta"]
        assert list(found)[-1] == f"{run.name}, across"
        aligned = [store.open_features(name, "text") for name in list(found)[2:4]]
        assert [features.source for features in aligned] == sides
        across = (pair_cosines(*aligned) + pair_cosines(*aligned[::-1])) / 2
        here = store.splits == "test"
        expected = stats.pearsonr(across[here], store.targets[here])[0]
        assert found[f"{run.name}, across"]["test"].pearson == pytest.approx(expected)

    def test_of_encoders_named_beside_it_those_and_the_run(self, store, run):
        found = list(similarity(store, run=run, encoders=["roberta"], device="cpu"))
        assert found[0] == "roberta"
        assert "bert" not in found
        assert len(found) == 4


class TestRefusals:
    def test_of_other_tasks(self, make_store):
        store = make_store(["train"] * 2, texts={"toy": [np.ones((2, 3))] * 2})
        with pytest.raises(ConfigError, match=naming("made retrieval")):
            similarity(store)

    def test_of_splits_without_scores(self, scored):
        store = scored(random_texts(4), [1, 2, NAN, NAN], ["train", "val", "test", "test"])
        with pytest.raises(DataError, match="test"):
            similarity(store, split="test")

    def test_of_datasets_without_scores(self, scored):
        with pytest.raises(DataError, match=naming("made pairs")):
            similarity(scored(random_texts(2), [NAN, NAN]))

    def test_of_runs_without_texts(self, scored, make_store, tmp_path):
        texts = random_texts(12)
        store = make_store(["train"] * 12, texts={"one": texts, "two": texts}, name="pairs")
        run = align(store, AlignConfig(width=8, epochs=1, patience=0), device="cpu")
        run.sides = tuple(replace(side, modality="image") for side in run.sides)
        with pytest.raises(RunError, match=naming(f"{run.name} text")):
            similarity(scored(random_texts(4), [1, 2, 3, 4]), run=run)

    def test_of_encoders_of_images(self, make_store):
        images = list(np.random.default_rng(0).normal(size=(4, 4)))
        store = make_store(["test"] * 4, images={"vit": images}, texts={"toy": random_texts(4)}, about=SCORED,
                           targets=np.arange(4, dtype=np.float32))  # fmt: skip
        with pytest.raises(ConfigError, match=naming("text --encoder")):
            similarity(store, encoders=["vit"])
