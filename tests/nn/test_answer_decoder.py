"""Answers written token by token, against T5's own logits for one answer after another, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from cachefuse.errors import ConfigError
from cachefuse.fusion.midfusion import MidFusion
from cachefuse.nn.answer_decoder import END, AnswerWriter, words_of
from cachefuse.nn.losses import cross_entropy
from cachefuse.nn.t5 import T5, T5Settings
from fixtures.messages import naming
from fixtures.specs import specs_of

VOCABULARY, WIDTH, ROWS, LENGTH = 23, 16, 5, 7
# Of one token and of several, one the beginning of another, with paths that part early, late and never.
ANSWERS = [[7, 1], [7, 9, 1], [7, 9, 11, 1], [5, 1], [12, 5, 7, 7, 1], [12, 5, 7, 8, 1], [1], [5, 20, 1]]
KINDS = {"1.0": {"tied": True}, "1.1": {"tied": False, "feed_forward_proj": "gated-gelu"}}


def settings(kind="1.0", layers=2, **more):
    return T5Settings.from_scratch(
        WIDTH, 1, 4, vocab_size=VOCABULARY, num_decoder_layers=layers, dropout_rate=0.3, **KINDS[kind], **more
    )


@pytest.fixture(params=[(kind, layers) for kind in KINDS for layers in (1, 3)], ids=str)
def pair(request):
    """A T5, and a writer with its weights."""
    torch.manual_seed(0)
    t5 = T5(settings(*request.param)).double().eval()
    writer = AnswerWriter(t5.settings, ANSWERS).double().eval()
    writer.load(t5)
    return t5, writer


def memories(width=WIDTH):
    torch.manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([7, 1, 4, 2, 6])[:, None]
    return torch.randn(ROWS, LENGTH, width, dtype=torch.float64), mask


def reference(t5, memory, mask, answers=ANSWERS):
    """Return log p (B, C): each answer is fed to the T5, and its tokens compete with those that go on to another."""
    found = torch.zeros(len(memory), len(answers), dtype=torch.float64)
    for c, answer in enumerate(answers):
        logits = t5.decode(torch.tensor([answer] * len(memory)), memory, mask)  # (B, T, V)
        for i, token in enumerate(answer):
            others = sorted({other[i] for other in answers if other[:i] == answer[:i] and len(other) > i})
            sample_weights = logits[:, i, others].softmax(-1)
            found[:, c] += sample_weights[:, others.index(token)].log()
        found[:, c] -= math.log(answers.count(answer))
    return found


class TestProbabilities:
    def test_are_those_of_a_t5_that_may_write_nothing_else(self, pair):
        t5, writer = pair
        memory, mask = memories()
        found = writer(memory, mask)
        torch.testing.assert_close(found, reference(t5, memory, mask), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(ROWS, dtype=torch.float64), rtol=0, atol=1e-12)
        assert found.argmax(1).unique().numel() > 1

    def test_answers_that_are_written_alike_share_theirs(self, pair):
        t5, _ = pair
        memory, mask = memories()
        answers = [*ANSWERS, ANSWERS[1]]
        writer = AnswerWriter(t5.settings, answers).double().eval()
        writer.load(t5)
        found = writer(memory, mask)
        torch.testing.assert_close(found, reference(t5, memory, mask, answers), rtol=0, atol=1e-12)
        assert torch.equal(found[:, 1], found[:, -1])

    def test_one_answer_alone_is_certain(self):
        writer = AnswerWriter(settings(), [[4, 6, 1]]).double().eval()
        assert torch.equal(writer(*memories()), torch.zeros(ROWS, 1, dtype=torch.float64))

    def test_padding_and_what_it_holds_change_nothing(self, pair):
        _, writer = pair
        memory, mask = memories()
        longer = torch.full((ROWS, LENGTH + 30, WIDTH), torch.nan, dtype=torch.float64)
        longer[:, :LENGTH] = memory.masked_fill(~mask.unsqueeze(-1), torch.nan)
        more = torch.nn.functional.pad(mask, (0, 30))
        torch.testing.assert_close(writer(longer, more), writer(memory, mask), rtol=0, atol=1e-12)
        targets = torch.rand(ROWS, len(ANSWERS), dtype=torch.float64)
        torch.testing.assert_close(
            writer.learn(longer, more, targets), writer.learn(memory, mask, targets), rtol=0, atol=1e-12
        )

    def test_a_row_without_a_memory_has_finite_ones(self, pair):
        _, writer = pair
        memory, mask = memories()
        found = writer(memory, torch.zeros_like(mask))
        assert found.isfinite().all()
        torch.testing.assert_close(found[0], found[1])

    def test_are_the_same_in_parts(self, pair, monkeypatch):
        _, writer = pair
        expected = writer(*memories())
        monkeypatch.setattr("cachefuse.nn.answer_decoder.AT_ONCE", 1)
        torch.testing.assert_close(writer(*memories()), expected, rtol=0, atol=1e-13)


class TestLearning:
    """Only the paths of right answers are walked; the loss and its gradients are those of all probabilities."""

    @pytest.mark.parametrize("graded", [False, True])
    def test_equals_cross_entropy_of_all(self, pair, graded):
        _, writer = pair
        torch.manual_seed(2)
        targets = torch.rand(ROWS, len(ANSWERS), dtype=torch.float64).round(decimals=1)
        targets = (
            targets * (torch.rand_like(targets) < 0.4) if graded else targets.argmax(1)[:, None] == torch.arange(8)
        )
        targets = targets.double()
        memory, mask = memories()
        gradients = []
        for loss in (
            writer.learn(memory, mask, targets),
            -(targets * writer(memory, mask)).sum(1).mean(),
        ):
            writer.zero_grad()
            loss.backward()
            gradients.append((loss.item(), {name: p.grad.clone() for name, p in writer.named_parameters()}))
        (short, ours), (long, theirs) = gradients
        assert short == pytest.approx(long, abs=1e-12)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
        assert short == pytest.approx(cross_entropy(writer(memory, mask), targets).item(), abs=1e-5)

    def test_without_a_right_answer_there_is_nothing_to_learn(self, pair):
        _, writer = pair
        loss = writer.learn(*memories(), torch.zeros(ROWS, len(ANSWERS)))
        loss.backward()
        assert loss.item() == 0
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in writer.parameters())

    def test_gradients_reach_every_parameter(self, pair):
        _, writer = pair
        writer.learn(*memories(), torch.ones(ROWS, len(ANSWERS))).backward()
        assert [name for name, p in writer.named_parameters() if p.grad is None or not p.grad.any()] == []


class TestTokens:
    def test_words(self):
        assert words_of(["red", "dark red", "2"]) == [[4, END], [3, 4, END], [2, END]]

    @pytest.mark.parametrize("answers", [[], [[]], [[3, 1], []], [[-1, 1]], [[VOCABULARY, 1]], [["a", 1]], [[2.0, 1]]])
    def test_what_can_not_be_written(self, answers):
        with pytest.raises(ConfigError, match=naming("answers 23")):
            AnswerWriter(settings(), answers)

    def test_too_many(self, monkeypatch):
        monkeypatch.setattr("cachefuse.nn.answer_decoder.MOST", 10)
        with pytest.raises(ConfigError, match=naming("8 tokens")):
            AnswerWriter(settings(), ANSWERS)

    def test_on_meta_it_takes_no_memory_and_then_has_its_weights(self, pair):
        t5, writer = pair
        with torch.device("meta"):
            other = AnswerWriter(t5.settings, ANSWERS)
        other.load_state_dict(writer.state_dict(), assign=True)
        torch.testing.assert_close(other.eval()(*memories()), writer(*memories()), rtol=0, atol=0)


class TestInMidFusion:
    def fusion(self, **more):
        options = {"decoder_layers": 2, "answers": "text", "answer_tokens": words_of(["a", "b c", "b"]), **more}
        options |= {"width": WIDTH, "depth": 2, "heads": 4, "dropout": 0.0}
        specs = specs_of({"image_tokens": (6, 3), "text_tokens": (5, 2)})
        return MidFusion(specs, 3, lambda width, classes: torch.nn.Linear(width, classes), **options)

    def batch(self):
        torch.manual_seed(3)
        features = {"image_tokens": torch.randn(4, 3, 6), "text_tokens": torch.randn(4, 2, 5)}
        return features, {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in features.items()}

    def test_the_decoder_takes_the_head_s_place(self):
        torch.manual_seed(0)
        fusion = self.fusion()
        assert fusion.head is None
        features, present = self.batch()
        logits = fusion(features, present)
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(4))
        targets = torch.eye(3)[[0, 1, 2, 1]]
        objective = fusion.objective(features, present, targets, cross_entropy)
        torch.testing.assert_close(objective, cross_entropy(logits, targets))
        objective.backward()
        assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"decoder_layers": 0}, "answers=text decoder_layers=2"),
            ({"answers": "both"}, "answers both"),
            ({"answer_tokens": None}, "answer_tokens 3 0"),
            ({"answer_tokens": [[1]]}, "answer_tokens 3 1"),
        ],
    )
    def test_what_contradicts(self, more, message):
        with pytest.raises(ConfigError, match=naming(message)):
            self.fusion(**more)

    def test_other_settings_of_a_t5_are_another(self):
        torch.manual_seed(0)
        fusion = self.fusion()
        with pytest.raises(ConfigError, match=naming("weights T5")):
            fusion.load_t5(T5(replace(settings(), d_ff=9)))
