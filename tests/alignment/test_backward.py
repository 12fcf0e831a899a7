"""The step of training: the same gradient, whatever the chunks."""

import pytest
import torch
from torch import nn

from cachefuse.alignment import METHODS, OPERATIONS
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.loop import backward
from cachefuse.alignment.model import Aligner
from cachefuse.nn import TARGETS

WIDTHS = (6, 5)
M, T = 10, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(seed=0, **options):
    """Return a model in float64; what stores hold is float32 at most, and so is what ``Standardize`` gives."""
    torch.manual_seed(seed)
    model = Aligner(WIDTHS, AlignConfig(width=8, **options))
    model.standardize = nn.ModuleList(nn.Identity() for _ in WIDTHS)
    return model.double()


def batch(n_tokens=T, seed=0):
    """Return ``read(side, rows)`` of 2 M rows of tokens in float64, and M of them on either side."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(2 * M, n_tokens, width, generator=generator, dtype=torch.float64) for width in WIDTHS]
    mask = torch.arange(n_tokens) < torch.randint(1, n_tokens + 1, (2 * M, 1), generator=generator)
    items = tuple(torch.randperm(2 * M, generator=generator)[:M] for _ in WIDTHS)
    return (lambda side, index: (x[side][index], mask[index])), items


def run_backward(model, read, items, chunk_size, targets="soft", seed=None):
    """Return the loss, and the gradients by name."""
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    value = backward(model, read, items, chunk_size, targets)
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    value, gradients = found
    assert value.item() == pytest.approx(expected[0].item(), abs=1e-12)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-10, msg=name)


class TestBackward:
    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("op", sorted(OPERATIONS))
    @pytest.mark.one_in(2)
    def test_by_chunks_it_is_the_whole_batchs(self, op, targets):
        model = exact(op=op, dropout=0.0)
        read, items = batch()
        expected = run_backward(model, read, items, 0, targets)
        assert len(expected[1]) > 10
        for chunk_size in (1, 2, 3, 4, 7, 9, 10, 11, 1000):
            assert_same(run_backward(model, read, items, chunk_size, targets), expected)

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_of_pooled_features_too(self, method):
        model = exact(method=method, dropout=0.0)
        read, items = batch(n_tokens=1)
        expected = run_backward(model, read, items, 0)
        for chunk_size in (1, 3, 5):
            assert_same(run_backward(model, read, items, chunk_size), expected)

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_the_temperature_has_the_gradient_of_the_loss(self, chunk_size):
        model = exact(dropout=0.0)
        read, items = batch()
        found = run_backward(model, read, items, chunk_size, "hard")[1]["log_temperature"].item()
        losses = []
        for moved in (1e-6, -1e-6):
            with torch.no_grad():
                model.log_temperature += moved
                losses.append(model.loss(*(model(i, read(i, items[i])) for i in (0, 1)), "hard").item())
                model.log_temperature -= moved
        assert found == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
        assert found != 0

    @pytest.mark.parametrize("chunk_size", [1, 3, 5, 9])
    def test_dropout_drops_the_same_on_the_way_back(self, chunk_size):
        """Against one graph through the same chunks, drawn in the same order."""
        model = exact(dropout=0.4)
        read, items = batch()
        torch.manual_seed(7)
        both = [torch.cat([model(i, read(i, part)) for part in items[i].split(chunk_size)]) for i in (0, 1)]
        after = torch.get_rng_state()
        value = model.loss(*both, "soft")
        model.zero_grad()
        value.backward()
        expected = value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same(run_backward(model, read, items, chunk_size, seed=7), expected)
        assert torch.equal(torch.get_rng_state(), after)  # as if the chunks had been embedded once

    def test_dropout_is_drawn_anew_each_time(self):
        model = exact(dropout=0.4)
        read, items = batch()
        values = [run_backward(model, read, items, 3, seed=seed)[0].item() for seed in (0, None, 0)]
        assert values[0] == values[2] != values[1]

    def test_what_is_drawn_next_does_not_depend_on_the_way_back(self):
        model = exact(dropout=0.0)
        read, items = batch()
        torch.manual_seed(3)
        expected = torch.rand(3)
        for chunk_size in (0, 3):
            run_backward(model, read, items, chunk_size, seed=3)
            assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_gradients_add_up(self, chunk_size):
        model = exact(dropout=0.0)
        read, items = batch()
        once = {name: x.clone() for name, x in run_backward(model, read, items, chunk_size)[1].items()}
        backward(model, read, items, chunk_size, "soft")
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * once[name])

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_leaves_modes_as_they_were(self, chunk_size):
        model = exact()
        value = run_backward(model, *batch(), chunk_size)[0]
        assert not value.requires_grad
        assert torch.is_grad_enabled()
        assert model.training

    def test_a_model_takes_as_many_rows_at_a_time_as_a_chunk_has(self):
        sizes = []
        model = exact(dropout=0.0)
        read, items = batch()

        def counting(side, index):
            sizes.append((side, len(index), torch.is_grad_enabled()))
            return read(side, index)

        backward(model, counting, items, 4, "soft")
        assert [(side, n) for side, n, _ in sizes] == [(0, 4), (0, 4), (0, 2), (1, 4), (1, 4), (1, 2)] * 2
        assert [with_graph for *_, with_graph in sizes] == [False] * 6 + [True] * 6
