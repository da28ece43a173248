"""quantize_fp8, differences and forecasts of what it makes on the GPU: the CPU's bits, float64, graphs."""

from __future__ import annotations

import random

import pytest
import reference
import torch

from flashomni import quantize_fp8, taylor_forecast, taylor_update

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]


def apart(x: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values on the GPU in rows that lie `padding` elements apart."""
    wide = torch.zeros((*x.shape[:-1], x.shape[-1] + padding), dtype=x.dtype, device="cuda")
    part = wide[..., : x.shape[-1]]
    part.copy_(x)
    return part


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_cpus_bits_and_forecasts_in_float64(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for seed in range(120):
        torch.manual_seed(seed)
        shape = [rng.choice([1, 2, 3, 17]) for _ in range(rng.randint(0, 3))]
        shape.append(rng.choice([1, 7, 64, 127, 128, 129, 300, 1536]))
        order, paddings = rng.randint(0, 3), [rng.choice([0, 8, 3]) for _ in range(3)]
        made, factors = [], torch.randn(order + 1)
        expected = torch.zeros(shape, dtype=torch.float64)
        for factor in factors:
            x = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
            values, scales = quantize_fp8(x)
            there = apart(torch.zeros(shape, dtype=torch.uint8), paddings[0]).view(torch.float8_e4m3fn)
            there_scales = apart(torch.zeros_like(scales), paddings[1])
            quantize_fp8(apart(x, paddings[2]), there, there_scales)
            assert torch.equal(there.view(torch.uint8).cpu(), values.view(torch.uint8)), (seed, shape)
            assert torch.equal(there_scales.cpu(), scales)
            made.append((there, there_scales))
            expected += (
                float(factor) * values.double() * scales.double().repeat_interleave(128, -1)[..., : shape[-1]]
            )
        out = apart(torch.full(shape, float("nan"), dtype=dtype), paddings[2])
        values, scales = zip(*made, strict=True)
        taylor_forecast(values, factors.cuda(), out, scales)
        reference.assert_close(out.cpu() / 32, expected / 32, dtype, f"forecast of {shape}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_cpus_bits_in_differences(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    for seed in range(120):
        torch.manual_seed(seed)
        shape = [rng.choice([1, 2, 3, 17]) for _ in range(rng.randint(0, 3))]
        shape.append(rng.choice([1, 7, 64, 127, 128, 129, 300, 1536]))
        order, paddings = rng.randint(0, 3), [rng.choice([0, 8, 3]) for _ in range(3)]
        with_last = rng.choice([False, True])
        valid, gap = rng.randint(0, order + with_last), rng.choice([1.0, 3.0, 5.0])
        feature, *before = (
            (torch.randn(shape) * torch.randn(shape).exp()).to(dtype) for _ in range(order + 2)
        )
        if seed % 10 == 0:
            feature.view(-1)[0] = rng.choice([float("nan"), float("inf")])
        made = [quantize_fp8(x) for x in before]
        for values, scales in made[valid:]:  # what is no history must not be read
            values.view(torch.uint8).fill_(0x7F)
            scales.fill_(float("nan"))
        there = [
            (
                apart(values.view(torch.uint8), paddings[0]).view(torch.float8_e4m3fn),
                apart(scales, paddings[1]),
            )
            for values, scales in made
        ]
        nothing = torch.full(shape, float("nan"), dtype=dtype)
        lasts = (nothing, apart(nothing, rng.choice([0, 8, 3]))) if with_last else (None, None)
        both = (made, feature), (there, apart(feature, paddings[2]))
        for (kept, x), last in zip(both, lasts, strict=True):
            values, scales = zip(*kept, strict=True)
            taylor_update(x, values, gap=gap, valid=valid, scales=scales, last=last)
        if with_last:
            what = f"last of {order + 1} and {shape}, {valid} valid"
            torch.testing.assert_close(lasts[1].cpu(), lasts[0], rtol=0, atol=0, equal_nan=True, msg=what)
        for i, (wanted, got) in enumerate(zip(made, there, strict=True)):
            what = f"derivatives[{i}] of {shape}, {valid} valid"
            values = [part.cpu().float().nan_to_num(999) for part, _ in (wanted, got)]
            assert torch.equal(*values), what
            torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=0, atol=0, equal_nan=True, msg=what)


def test_what_is_no_number_is_told() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 256, dtype=torch.bfloat16)
        x[1, 130] = bad
        values, scales = quantize_fp8(x.cuda())
        out = torch.empty_like(x, device="cuda")
        taylor_forecast([values], torch.ones(1, device="cuda"), out, [scales])
        lost = out.isnan().cpu()
        assert lost[1, 130] and not lost[0].any() and not lost[1, :128].any()


def test_a_graph_follows_its_inputs() -> None:
    x, factors = torch.randn(4, 1000, 256, device="cuda").bfloat16(), torch.ones(1, device="cuda")
    values, scales = quantize_fp8(x)
    out = torch.empty_like(x)
    taylor_forecast([values], factors, out, [scales])
    graph, last = torch.cuda.CUDAGraph(), torch.full_like(x, float("nan"))
    with torch.cuda.graph(graph):
        taylor_update(x, [values], gap=1, valid=0, scales=[scales], last=last)
        taylor_forecast([values], factors, out, [scales])
    x.copy_(torch.randn_like(x))
    factors.fill_(0.5)
    graph.replay()
    assert not last.any()
    again = quantize_fp8(x)
    want = taylor_forecast([again[0]], factors, torch.empty_like(x), [again[1]])
    assert torch.equal(out, want)
