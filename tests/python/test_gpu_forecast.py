"""taylor_update and taylor_forecast on the GPU: against float64, on views, in graphs."""

from __future__ import annotations

import random

import pytest
import reference
import torch

from flashomni import taylor_forecast, taylor_update
from flashomni.schedule import coefficients

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]
NAN = float("nan")


def tensor(values: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values on the GPU; with padding, rows lie apart and what is between them is NaN."""
    wide = torch.full(
        (*values.shape[:-1], values.shape[-1] + padding), NAN, dtype=values.dtype, device="cuda"
    )
    part = wide[..., : values.shape[-1]]
    part.copy_(values)
    return part


def neighbours_are_untouched(part: torch.Tensor, padding: int) -> bool:
    wide = part.as_strided((*part.shape[:-1], part.shape[-1] + padding), part.stride(), part.storage_offset())
    return not padding or bool(wide[..., part.shape[-1] :].isnan().all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_random_shapes(dtype: torch.dtype, order: int) -> None:
    rng = random.Random(order)
    for seed in range(60):
        torch.manual_seed(seed)
        sizes = [1, 2, 3, 8, 33, 64, 200]
        shape = [rng.choice(sizes[: 4 if i else 7]) for i in reversed(range(rng.randint(1, 4)))]
        rng.shuffle(shape)
        valid, gap = rng.randint(0, order), rng.choice([1.0, 2.0, 5.0])
        feature = torch.randn(shape).to(dtype)
        old = [torch.randn(shape).to(dtype) for _ in range(order + 1)]
        expected = reference.taylor_update(feature, old, gap, valid)
        for part in old[valid:]:
            part.fill_(NAN)  # what is no history must not be read
        paddings = [rng.choice([0, 8, 3]) for _ in range(order + 2)]
        new = [tensor(part, padding) for part, padding in zip(old, paddings, strict=False)]
        taylor_update(tensor(feature, paddings[-1]), new, gap=gap, valid=valid)
        for i, part in enumerate(expected):
            scale = 4.0 * 2**i
            reference.assert_close(new[i].cpu() / scale, part / scale, dtype, f"derivatives[{i}] of {shape}")
            assert neighbours_are_untouched(new[i], paddings[i]), (shape, paddings)
        factors = torch.randn(order + 1)
        factors[order] *= rng.choice([0, 1])
        wanted = sum(float(c) * d.cpu().double() for c, d in zip(factors, new, strict=True))
        out = tensor(torch.full(shape, NAN, dtype=dtype), paddings[-1])
        taylor_forecast(new, factors.cuda(), out)
        reference.assert_close(out.cpu() / 16, wanted / 16, dtype, f"forecast of {shape}")
        assert neighbours_are_untouched(out, paddings[-1]), (shape, paddings)


def test_the_gpu_and_the_cpu_agree_to_the_last_bit_in_differences() -> None:
    """Both subtract and multiply in float32 and round once; forecasts add products in their own way."""
    torch.manual_seed(0)
    feature, old = torch.randn(2, 3, 500, 40).bfloat16().unbind(0)
    cpu = [old.clone(), torch.empty_like(old)]
    gpu = [part.cuda() for part in cpu]
    taylor_update(feature, cpu, gap=5, valid=1)
    taylor_update(feature.cuda(), gpu, gap=5, valid=1)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, gpu, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_coefficient_of_zero_reads_nothing(order: int) -> None:
    derivatives = [torch.full((1000, 24), NAN, device="cuda", dtype=torch.bfloat16) for _ in range(order + 1)]
    derivatives[0] = torch.randn_like(derivatives[0])
    factors = torch.zeros(order + 1, device="cuda")
    factors[0] = 1
    assert torch.equal(taylor_forecast(derivatives, factors), derivatives[0])


def test_a_graph_follows_the_coefficients() -> None:
    derivatives = [torch.randn(1, 3000, 96, device="cuda").bfloat16() for _ in range(2)]
    factors, out = torch.ones(2, device="cuda"), torch.empty_like(derivatives[0])
    taylor_forecast(derivatives, factors, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taylor_forecast(derivatives, factors, out)
    for k in (1.0, 2.0, 3.0):
        factors.copy_(coefficients(1, k))
        out.fill_(NAN)
        graph.replay()
        assert torch.equal(out, taylor_forecast(derivatives, coefficients(1, k).cuda()))


def test_what_is_linear_in_time_comes_back() -> None:
    base = torch.randint(-8, 8, (4, 30), device="cuda").bfloat16()  # exact in bfloat16, as are all sums here
    slope = torch.randint(-4, 4, (4, 30), device="cuda").bfloat16()
    derivatives = [torch.full_like(base, NAN) for _ in range(2)]
    for update in range(2):
        taylor_update(base + 4 * update * slope, derivatives, gap=4, valid=update)
    forecast = taylor_forecast(derivatives, coefficients(1, 3.0).cuda())
    assert torch.equal(forecast, base + 7 * slope)
