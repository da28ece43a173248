"""taylor_update and taylor_forecast against the float64 reference, and what forecasting is for."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random, random_symbols, set_padding, token_mask

from flashomni import quantize_fp8, taylor_forecast, taylor_update
from flashomni.schedule import coefficients

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=shapes,
    order=st.integers(0, 3),
    valid=st.integers(0, 3),
    gap=st.sampled_from([1.0, 2.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
    with_last=st.booleans(),
)
def test_update(seed, shape, order, valid, gap, dtype, with_last) -> None:
    valid = min(valid, order + with_last)
    generator = torch.Generator().manual_seed(seed)
    feature = random(generator, *shape, dtype=dtype)
    old = [random(generator, *shape, dtype=dtype) for _ in range(order + 1)]
    last = poison(*shape, dtype=dtype) if with_last else None
    expected = reference.taylor_update(feature, [*old, *[feature] * with_last], gap, valid)
    new = [part.clone() for part in old]
    for part in new[valid:]:
        part.fill_(float("nan"))  # what is no history must not be read
    taylor_update(feature, new, gap=gap, valid=valid, last=last)
    for i, (part, found) in enumerate(zip(expected, [*new, *[last] * with_last], strict=True)):
        # A difference of order i sums up to 2^i values of order 1.
        scale = 4.0 * 2**i
        reference.assert_close(found / scale, part / scale, dtype, f"difference {i}")


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


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 300), st.sampled_from([1, 7, 128, 129, 300])),
    order=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    offset=st.integers(0, 200),
    after=st.integers(0, 200),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    ragged=st.booleans(),
)
def test_rows(seed, shape, order, density, offset, after, block, dtype, fp8, ragged) -> None:
    """A forecast of cached rows, then of active ones: each leaves the others' bits alone and reads none."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows, width = shape
    symbols = random_symbols(generator, batch, 1, offset + rows + after, 1, (block, 64), density)
    set_padding(symbols)
    active = token_mask(symbols.masks()[0], rows, block, offset).expand(shape)
    if ragged:
        symbols.cache_indptr = torch.arange(batch + 1, dtype=torch.int32) * symbols.cache_bytes
        symbols.cache = symbols.cache.flatten()
    derivatives = [random(generator, *shape, dtype=dtype) for _ in range(order + 1)]
    factors = random(generator, order + 1)
    made = [quantize_fp8(d) for d in derivatives] if fp8 else [(d, None) for d in derivatives]
    exact = [d.double() for d in derivatives]
    if fp8:
        exact = [v.double() * s.double().repeat_interleave(128, -1)[..., :width] for v, s in made]
    expected = sum(float(c) * d for c, d in zip(factors, exact, strict=True))
    for chosen in ("cached", "active"):
        forecast = active if chosen == "active" else ~active
        kept = [(values.clone(), scales.clone() if fp8 else None) for values, scales in made]
        for values, scales in kept:  # what is left out is not read
            values.view(torch.uint8).view(*shape, -1)[~forecast] = 0x7F
            if fp8:
                scales[~forecast[..., :1].expand(scales.shape)] = float("nan")
        values, scales = zip(*kept, strict=True)
        before = random(generator, batch, rows, width + 9, dtype=dtype)
        wide = before.clone()
        out = wide[..., 3 : 3 + width]
        arguments = {"row_offset": offset, "rows": chosen}
        taylor_forecast(values, factors, out, scales if fp8 else None, symbols, **arguments)
        reference.assert_close(out[forecast] / 8, expected[forecast] / 8, dtype)
        written = torch.zeros(wide.shape, dtype=torch.bool)
        written[..., 3 : 3 + width] = forecast
        assert torch.equal(wide[~written], before[~written])
        if not fp8:
            fresh = taylor_forecast(values, factors, None, None, symbols, **arguments)
            assert torch.equal(fresh, torch.where(forecast, out, 0))


def test_without_cache_bits_every_row_is_active() -> None:
    symbols = random_symbols(torch.Generator(), 2, 1, 100, 1)
    symbols.cache = None
    derivatives, before = [torch.randn(2, 100, 5)], torch.randn(2, 100, 5)
    for rows, expected in (("cached", before), ("active", derivatives[0])):
        out = taylor_forecast(derivatives, torch.ones(1), before.clone(), symbols=symbols, rows=rows)
        assert torch.equal(out, expected)


def test_strided_features() -> None:
    wide = torch.randn(3, 50, 90)
    feature, old = wide[:, :, 10:60], torch.randn(3, 50, 120)[:, :, 40:90]
    around = poison(3, 50, 80, dtype=torch.float32)
    derivatives, last = [old.clone(), torch.zeros(3, 50, 70)[:, :, :50]], around[:, :, 20:70]
    taylor_update(feature, derivatives, gap=2, valid=2, last=last)
    torch.testing.assert_close(derivatives[0], feature)
    torch.testing.assert_close(derivatives[1], (feature - old) / 2)
    torch.testing.assert_close(last, (feature - old) / 4)
    assert around[:, :, :20].isnan().all() and around[:, :, 70:].isnan().all()


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
