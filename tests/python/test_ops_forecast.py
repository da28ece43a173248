"""taylor_update and taylor_forecast against the float64 reference, and what forecasting is for."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random

from flashomni import taylor_forecast, taylor_update
from flashomni.schedule import coefficients

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=shapes,
    order=st.integers(0, 3),
    valid=st.integers(0, 3),
    gap=st.sampled_from([1.0, 2.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_update(seed, shape, order, valid, gap, dtype) -> None:
    valid = min(valid, order)
    generator = torch.Generator().manual_seed(seed)
    feature = random(generator, *shape, dtype=dtype)
    old = [random(generator, *shape, dtype=dtype) for _ in range(order + 1)]
    expected = reference.taylor_update(feature, old, gap, valid)
    new = [part.clone() for part in old]
    for part in new[valid:]:
        part.fill_(float("nan"))  # what is no history must not be read
    taylor_update(feature, new, gap=gap, valid=valid)
    for i, part in enumerate(expected):
        # A difference of order i sums up to 2^i values of order 1.
        scale = 4.0 * 2**i
        reference.assert_close(new[i] / scale, part / scale, dtype, f"derivatives[{i}]")


@given(seed=st.integers(0, 2**32 - 1), shape=shapes, order=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_forecast(seed, shape, order, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    derivatives = [random(generator, *shape, dtype=dtype) for _ in range(order + 1)]
    factors = random(generator, order + 1)
    expected = sum(float(c) * d.double() for c, d in zip(factors, derivatives, strict=True))
    out = poison(*shape, dtype=dtype)
    assert taylor_forecast(derivatives, factors, out) is out
    reference.assert_close(out / 8, expected / 8, dtype)
    reference.assert_close(taylor_forecast(derivatives, factors) / 8, expected / 8, dtype)


def test_strided_features() -> None:
    wide = torch.randn(3, 50, 90)
    feature, old = wide[:, :, 10:60], torch.randn(3, 50, 120)[:, :, 40:90]
    derivatives = [old.clone(), torch.zeros(3, 50, 70)[:, :, :50]]
    taylor_update(feature, derivatives, gap=2, valid=1)
    torch.testing.assert_close(derivatives[0], feature)
    torch.testing.assert_close(derivatives[1], (feature - old) / 2)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_what_is_linear_in_time_comes_back(order: int) -> None:
    """Differences at steps 0, gap, 2 gap, ..., then a forecast at +k.

    Exact for a constant at any order, and at order >= 1 for what is linear in time.
    """
    base, slope = torch.randn(4, 30), torch.randn(4, 30)
    derivatives = [torch.full((4, 30), float("nan")) for _ in range(order + 1)]
    for update in range(order + 1):
        taylor_update(base + 5 * update * slope * min(order, 1), derivatives, gap=5, valid=min(update, order))
    forecast = taylor_forecast(derivatives, coefficients(order, 3.0))
    torch.testing.assert_close(forecast, base + (5 * order + 3) * slope * min(order, 1), atol=1e-4, rtol=1e-4)
