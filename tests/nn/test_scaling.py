import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cachefuse.errors import ConfigError
from cachefuse.nn.scaling import FIT_ROWS, SCALINGS, Standardize
from fixtures.messages import naming


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_rows_are_scaled_each_on_its_own_and_none_are_unchanged(shape, dtype):
    x = torch.randn(shape).to(dtype)
    x[0] = 0
    rows, none = (SCALINGS[name](4).fit(x)(x) for name in ("rows", "none"))
    assert torch.equal(none, x.float())
    torch.testing.assert_close(rows[1:].norm(dim=-1), torch.ones(shape[:-1])[1:])
    assert not rows[0].any()
    assert F.cosine_similarity(rows[1:], x[1:].float(), dim=-1).min() > 1 - 1e-6
    assert rows.dtype == none.dtype == torch.float32


class TestStandardize:
    def test_is_the_identity_before_fit(self):
        x = torch.randn(4, 6)
        assert torch.equal(Standardize(6)(x), x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_against_numpy_over_several_chunks(self, dtype):
        generator = torch.Generator().manual_seed(0)
        x = (torch.randn(2 * FIT_ROWS + 17, 3, generator=generator) * torch.tensor([1, 0.1, 30])).to(dtype)
        x += torch.tensor([0, 2, -50], dtype=dtype)
        standardize = Standardize(3).fit(x)
        exact = x.double().numpy()
        np.testing.assert_allclose(standardize.mean, exact.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(standardize.scale, 1 / exact.std(0), rtol=1e-6)
        z = standardize(x)
        np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(z.std(0), 1, rtol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_any_precision_comes_out_as_float32(self, dtype):
        assert Standardize(2).fit(torch.randn(9, 2, dtype=dtype))(torch.ones(3, 2, dtype=dtype)).dtype == torch.float32

    def test_is_exact_just_above_dead(self):
        # A mean of 1700 standard deviations, where a sum of squares cancels most.
        x = 1700 + torch.randn(FIT_ROWS + 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        np.testing.assert_allclose(Standardize(1).fit(x).scale, 1 / x.numpy().std(0), rtol=1e-6)

    def test_rows(self):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        x[7] = torch.nan  # an absent row
        rows = torch.tensor([i for i in range(20) if i != 7])
        chosen, copied = Standardize(3).fit(x, rows), Standardize(3).fit(x[rows])
        assert torch.equal(chosen.mean, copied.mean)
        assert torch.equal(chosen.scale, copied.scale)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e-7, 6e4])
    def test_dead_dimensions_give_exactly_0(self, dtype, value):
        x = torch.full((FIT_ROWS + 3, 2), value, dtype=dtype)
        x[:, 1] = torch.linspace(-1, 1, len(x))
        z = Standardize(2).fit(x)(x)
        assert z[:, 0].count_nonzero() == 0
        assert z[:, 1].std().item() == pytest.approx(1, rel=1e-3)

    def test_a_constant_that_rounds_both_ways_is_dead(self):
        one = torch.tensor(0.1, dtype=torch.float16)
        next_up = torch.nextafter(one, torch.tensor(1.0, dtype=torch.float16))
        for flips in (1, 500):
            x = one.repeat(1000, 1)
            x[:flips] = next_up
            assert Standardize(1).fit(x)(x).count_nonzero() == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_float16_could_not_tell_apart_is_alive_in_a_wider_type(self, dtype):
        years = torch.tensor([[2008.0], [2009.0], [2010.0]], dtype=dtype)
        assert Standardize(1).fit(years)(years).std(correction=0).item() == pytest.approx(1, rel=1e-4)
        near = torch.tensor([[1.0], [1 + 1e-6]], dtype=dtype)
        assert Standardize(1).fit(near)(near).std(correction=0).item() == pytest.approx(1, rel=1e-2)

    def test_a_small_dimension_is_alive(self):
        x = torch.tensor([[1e-4], [-1e-4], [3e-4]]).half()
        assert Standardize(1).fit(x)(x).std(correction=0).item() == pytest.approx(1, rel=1e-3)

    def test_errors(self):
        with pytest.raises(ConfigError, match="rows"):
            Standardize(2).fit(torch.zeros(0, 2))
        with pytest.raises(ConfigError, match="rows"):
            Standardize(2).fit(torch.zeros(3, 2), torch.zeros(0, dtype=torch.int64))
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ConfigError, match=naming("1 2")):
                Standardize(2).fit(torch.tensor([[0.0, 1], [1, bad]]))
