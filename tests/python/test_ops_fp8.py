"""quantize_fp8 and forecasts of what it makes, against float64."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random

from flashomni import quantize_fp8, taylor_forecast, taylor_update

COLUMNS = 128
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 7, 127, 128, 129, 300, 512]))


def spread_scales(scales: torch.Tensor, width: int) -> torch.Tensor:
    """The scale of each element, in float64."""
    return scales.double().repeat_interleave(COLUMNS, -1)[..., :width]


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_every_value_is_the_nearest(seed, shape, dtype, magnitude) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = magnitude * random(generator, *shape) * torch.exp(2 * random(generator, *shape))
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    x = x.clamp(-6e4, 6e4).to(dtype)
    values, scales = quantize_fp8(x)
    assert values.dtype is torch.float8_e4m3fn and scales.shape == (
        *shape[:-1],
        math.ceil(shape[-1] / COLUMNS),
    )
    exact, scale = x.double(), spread_scales(scales, shape[-1])
    for run, found in zip(exact.split(COLUMNS, -1), scales.unbind(-1), strict=True):
        torch.testing.assert_close(found.double(), run.abs().amax(-1) / 448, rtol=1e-6, atol=0)
    # All that e4m3 can say, from its definition.
    grid = torch.tensor([m / 512 if m < 8 else (8 + m % 8) / 8 * 2.0 ** (m // 8 - 7) for m in range(127)])
    grid = torch.cat([-grid, grid]).double()
    best = (grid * scale.unsqueeze(-1) - exact.unsqueeze(-1)).abs().amin(-1)
    error = (values.double() * scale - exact).abs()
    assert (error <= best + 1e-6 * exact.abs()).all()


def test_it_is_torchs_own_rounding() -> None:
    """A run's largest magnitude of 448 makes its scale 1: every tie and every subnormal number."""
    grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, ties, ties * 1.0001, ties * 0.9999, -grid, -ties])
    x = torch.cat([x, torch.zeros(-len(x) % 127)]).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], 1)
    values, scales = quantize_fp8(x)
    assert (scales == 1).all()
    assert torch.equal(values.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_told(bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 130] = bad
    values, scales = quantize_fp8(x)
    out = taylor_forecast([values], torch.ones(1), torch.empty_like(x), [scales])
    lost = torch.zeros(2, 256, dtype=torch.bool)
    lost[1, 128 if bad != bad else 128 :] = True
    if bad != bad:
        lost[1] = False
        lost[1, 130] = True
    assert torch.equal(out.isnan(), lost)
    assert torch.equal(out[~lost], x[~lost])


def test_nothing_stays_nothing() -> None:
    values, scales = quantize_fp8(torch.tensor([[0.0, 1e-35, -1e-32]]))
    assert (values.float() == 0).all() and (scales == 0).all()


@given(seed=st.integers(0, 2**32 - 1), shape=shapes, order=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_forecast(seed, shape, order, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = [quantize_fp8(random(generator, *shape, dtype=dtype)) for _ in range(order + 1)]
    factors = random(generator, order + 1)
    if order:
        factors[order] = 0  # an order without history may hold anything
        made[order][0].view(torch.uint8).fill_(0x7F)
        made[order][1].fill_(float("nan"))
    expected = torch.zeros(shape, dtype=torch.float64)
    for factor, (values, scales) in zip(factors, made, strict=True):
        if factor != 0:
            expected += float(factor) * values.double() * spread_scales(scales, shape[-1])
    out = poison(*shape, dtype=dtype)
    values, scales = zip(*made, strict=True)
    assert taylor_forecast(values, factors, out, scales) is out
    reference.assert_close(out / 8, expected / 8, dtype)


def read(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return values.double() * spread_scales(scales, values.shape[-1])


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=shapes,
    order=st.integers(0, 3),
    valid=st.integers(0, 3),
    gap=st.sampled_from([1.0, 2.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
    with_last=st.booleans(),
)
def test_differences(seed, shape, order, valid, gap, dtype, with_last) -> None:
    """Each is within half a step of e4m3 of the exact one: of the feature and of what was kept. The last one
    is rounded to the feature's type alone."""
    valid = min(valid, order + with_last)
    generator = torch.Generator().manual_seed(seed)
    feature = random(generator, *shape, dtype=dtype)
    made = [quantize_fp8(random(generator, *shape, dtype=dtype)) for _ in range(order + 1)]
    exact = [feature.double()]
    for i in range(order + with_last):
        old = read(*made[i])
        exact.append((exact[i] - old) / gap if i < valid else torch.zeros(shape, dtype=torch.float64))
    for values, scales in made[valid:]:  # what is no history must not be read
        values.view(torch.uint8).fill_(0x7F)
        scales.fill_(float("nan"))
    values, scales = zip(*made, strict=True)
    last = poison(*shape, dtype=dtype) if with_last else None
    taylor_update(feature, values, gap=gap, valid=valid, scales=scales, last=last)
    if with_last:
        reference.assert_close(last / 2 ** (order + 3), exact.pop() / 2 ** (order + 3), dtype, "last")
    for i, (found, scale) in enumerate(made):
        for run, one in zip(exact[i].split(COLUMNS, -1), scale.unbind(-1), strict=True):
            torch.testing.assert_close(one.double(), run.abs().amax(-1) / 448, rtol=1e-4, atol=1e-6)
        # Four bits of a number and a tie; below the smallest normal number 2^-6, steps of 2^-9.
        step = torch.maximum(exact[i].abs() / 16, spread_scales(scale, shape[-1]) / 1024)
        error = (read(found, scale) - exact[i]).abs()
        assert (error <= 1.001 * step + 1e-5).all(), f"derivatives[{i}]"


@pytest.mark.parametrize("valid", [0, 1, 2, 3, 4])
def test_differences_are_quantised_and_nothing_else_is_rounded(valid: int) -> None:
    """The bits of float32 differences put through quantize_fp8, at odd widths, strides and magnitudes; those
    of the last one as they are."""
    generator = torch.Generator().manual_seed(valid)
    for width in (1, 100, 128, 129, 700):
        shape = (2, 9, width)
        size = torch.exp(3 * random(generator, 2, 9, 1))
        feature = torch.full((2, 9, width + 5), float("nan"))[..., 2 : 2 + width]
        feature.copy_(size * random(generator, *shape))
        values = [torch.zeros(2, 9, width + 3, dtype=torch.float8_e4m3fn)[..., :width] for _ in range(4)]
        scales = [torch.zeros(2, 9, 11)[..., 1 : 1 + math.ceil(width / COLUMNS)] for _ in range(4)]
        for value, scale in zip(values, scales, strict=True):
            quantize_fp8(size * random(generator, *shape), value, scale)
        plain = [
            taylor_forecast([value], torch.ones(1), torch.empty(shape), [scale])
            for value, scale in zip(values, scales, strict=True)
        ]
        around = poison(2, 9, width + 4, dtype=torch.float32)
        expected_last, last = torch.empty(shape), around[..., 1 : 1 + width]
        taylor_update(feature, plain, gap=3, valid=valid, last=expected_last)
        taylor_update(feature, values, gap=3, valid=valid, scales=scales, last=last)
        assert torch.equal(last, expected_last)
        assert bool(last.any()) == (valid == 4)
        assert around[..., 0].isnan().all() and around[..., 1 + width :].isnan().all()
        for value, scale, difference in zip(values, scales, plain, strict=True):
            expected = quantize_fp8(difference)
            assert torch.equal(value.view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_differences_tell_what_is_no_number(bad: float) -> None:
    """In the feature, then in what was kept of it: the run of an infinity, or the one NaN, in every order."""
    feature = torch.ones(2, 256)
    made = [quantize_fp8(torch.zeros(2, 256)) for _ in range(3)]
    values, scales = zip(*made, strict=True)
    feature[1, 130] = bad
    lost = torch.zeros(2, 256, dtype=torch.bool)
    lost[1, 128 if bad == float("inf") else 130 : 256 if bad == float("inf") else 131] = True
    taylor_update(feature, values, gap=1, valid=2, scales=scales)
    for one in made:
        assert torch.equal(read(*one).isnan(), lost)
    taylor_update(torch.ones(2, 256), values, gap=1, valid=2, scales=scales)
    assert not read(*made[0]).isnan().any()
    for one in made[1:]:
        assert torch.equal(read(*one).isnan(), lost)


def test_views() -> None:
    """Rows of a wider tensor in; into and out of rows that lie apart."""
    wide = torch.randn(3, 50, 400)
    x = wide[:, :, 60:310]
    values = torch.zeros(3, 50, 300, dtype=torch.float8_e4m3fn)[:, :, :250]
    scales = torch.zeros(3, 50, 5)[:, :, :2]
    quantize_fp8(x, values, scales)
    expected = quantize_fp8(x.contiguous())
    assert torch.equal(values.float(), expected[0].float()) and torch.equal(scales, expected[1])
    out = torch.zeros(3, 50, 333)
    taylor_forecast([values], torch.ones(1), out[:, :, 11:261], [scales])
    assert torch.equal(out[:, :, 11:261], values.float() * spread_scales(scales, 250).float())
    assert not out[:, :, :11].any() and not out[:, :, 261:].any()


def test_a_forecast_of_quantised_orders_needs_an_output() -> None:
    values, scales = quantize_fp8(torch.ones(2, 3))
    with pytest.raises(TypeError, match="^out: expected a tensor"):
        taylor_forecast([values], torch.ones(1), scales=[scales])
