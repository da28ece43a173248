"""taylor_update and taylor_forecast on the GPU: against float64, on views, in graphs."""

from __future__ import annotations

import random

import pytest
import reference
import torch
from inputs import random_symbols, set_padding, token_mask

from flashomni import quantize_fp8, taylor_forecast, taylor_update
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
        with_last = rng.choice([False, True])
        valid, gap = rng.randint(0, order + with_last), rng.choice([1.0, 2.0, 5.0])
        feature = torch.randn(shape).to(dtype)
        old = [torch.randn(shape).to(dtype) for _ in range(order + 1)]
        expected = reference.taylor_update(feature, [*old, *[feature] * with_last], gap, valid)
        for part in old[valid:]:
            part.fill_(NAN)  # what is no history must not be read
        paddings = [rng.choice([0, 8, 3]) for _ in range(order + 3)]
        new = [tensor(part, padding) for part, padding in zip(old, paddings, strict=False)]
        written = list(new)
        if with_last:
            written.append(tensor(torch.full(shape, NAN, dtype=dtype), paddings[order + 1]))
        last = written[-1] if with_last else None
        taylor_update(tensor(feature, paddings[-1]), new, gap=gap, valid=valid, last=last)
        for i, (part, found) in enumerate(zip(expected, written, strict=True)):
            scale, what = 4.0 * 2**i, f"difference {i} of {shape}, {valid} valid"
            reference.assert_close(found.cpu() / scale, part / scale, dtype, what)
            assert neighbours_are_untouched(found, paddings[i]), (shape, paddings)
        factors = torch.randn(order + 1)
        factors[order] *= rng.choice([0, 1])
        wanted = sum(float(c) * d.cpu().double() for c, d in zip(factors, new, strict=True))
        out = tensor(torch.full(shape, NAN, dtype=dtype), paddings[-1])
        taylor_forecast(new, factors.cuda(), out)
        reference.assert_close(out.cpu() / 16, wanted / 16, dtype, f"forecast of {shape}")
        assert neighbours_are_untouched(out, paddings[-1]), (shape, paddings)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "e4m3"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_random_rows(dtype: torch.dtype, fp8: bool) -> None:
    """What is left out stays to the bit, and is not read: over all densities, blocks and offsets."""
    rng = random.Random(0)
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        widths = [1, 7, 64, 129, 300, 1536]
        shape = [rng.choice(sizes) for sizes in ([1, 2, 3], [1, 63, 64, 200, 333], widths)]
        order, offset, block = rng.randint(0, 3), rng.choice([0, 5, 64, 77, 300]), rng.choice([64, 128])
        tokens = offset + shape[1] + rng.choice([0, 1, 150])
        density = rng.choice([0.0, 0.3, 0.7, 1.0])
        symbols = random_symbols(generator, shape[0], 1, tokens, 1, (block, 64), density)
        set_padding(symbols)
        active = token_mask(symbols.masks()[0], shape[1], block, offset).expand(shape)
        if seed % 3 == 0:
            ends = torch.arange(shape[0] + 1, dtype=torch.int32) * symbols.cache_bytes
            symbols.cache, symbols.cache_indptr = symbols.cache.flatten(), ends
        chosen = rng.choice(["cached", "active"])
        forecast = active if chosen == "active" else ~active
        paddings = [rng.choice([0, 8, 3]) for _ in range(3)]
        factors = torch.randn(order + 1, generator=generator)
        expected, values, scales = torch.zeros(shape, dtype=torch.float64), [], []
        for factor in factors:
            x = torch.randn(shape, generator=generator).to(dtype)
            if fp8:
                x, scale = quantize_fp8(x)
                exact = x.double() * scale.double().repeat_interleave(128, -1)[..., : shape[-1]]
                scale[~forecast[..., :1].expand(scale.shape)] = NAN
                scales.append(tensor(scale, paddings[0]))
                wide = torch.full((*shape[:-1], shape[-1] + paddings[1]), 0x7F, dtype=torch.uint8).cuda()
                part = wide[..., : shape[-1]]
                part.copy_(x.view(torch.uint8).masked_fill(~forecast, 0x7F))
                values.append(part.view(torch.float8_e4m3fn))
            else:
                exact = x.double()
                values.append(tensor(x.masked_fill(~forecast, NAN), paddings[1]))
            expected += float(factor) * exact
        out = tensor(torch.full(shape, NAN, dtype=dtype), paddings[2])
        arguments = {"row_offset": offset, "rows": chosen}
        taylor_forecast(values, factors.cuda(), out, scales or None, symbols.to("cuda"), **arguments)
        got, what = out.cpu(), f"{shape} from {offset}, {chosen} of {density}"
        reference.assert_close(got[forecast] / 16, expected[forecast] / 16, dtype, what)
        assert bool(got[~forecast].isnan().all()), what
        assert neighbours_are_untouched(out, paddings[2]), what


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "e4m3"])
@pytest.mark.parametrize("tokens", [4500, 20001])
def test_many_rows(tokens: int, fp8: bool) -> None:
    """Where a thread takes several rows: 2 to 8 of a batch element, which they need not divide."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 1032, generator=generator).bfloat16().cuda()
    symbols = random_symbols(generator, 2, 1, tokens + 77, 1).to("cuda")
    active = token_mask(symbols.masks()[0].cpu(), tokens, 128, 77).cuda()
    values, scales = quantize_fp8(x) if fp8 else (x, None)
    given, one = None if scales is None else [scales], torch.ones(1, device="cuda")
    whole = taylor_forecast([values], one, torch.empty_like(x), given)
    for rows, chosen in (("active", active), ("cached", ~active)):
        out = torch.full_like(x, NAN)
        taylor_forecast([values], one, out, given, symbols, row_offset=77, rows=rows)
        assert torch.equal(out.nan_to_num(-999), torch.where(chosen, whole, -999.0))


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "e4m3"])
def test_a_graph_follows_the_symbols(fp8: bool) -> None:
    x, one = torch.randn(2, 1000, 96, device="cuda").bfloat16(), torch.ones(1, device="cuda")
    symbols = random_symbols(torch.Generator().manual_seed(0), 2, 1, 1100, 1).to("cuda")
    values, scales = quantize_fp8(x) if fp8 else (x, None)
    out = torch.empty_like(x)

    def run(to: torch.Tensor) -> torch.Tensor:
        given = None if scales is None else [scales]
        return taylor_forecast([values], one, to, given, symbols, row_offset=77, rows="active")

    run(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for seed in range(3):
        new = random_symbols(torch.Generator().manual_seed(seed), 2, 1, 1100, 1, cache_density=seed / 2)
        symbols.cache.copy_(new.cache)
        out.fill_(0)
        graph.replay()
        assert torch.equal(out, run(torch.zeros_like(out)))
        active = token_mask(new.masks()[0], 1000, 128, 77).cuda().squeeze(-1)
        assert torch.equal(out.any(-1), active)


def test_the_gpu_and_the_cpu_agree_to_the_last_bit_in_differences() -> None:
    """Both subtract and multiply in float32 and round once; forecasts add products in their own way."""
    torch.manual_seed(0)
    feature, old = torch.randn(2, 3, 500, 40).bfloat16().unbind(0)
    cpu = [old.clone(), old / 3, torch.empty_like(old)]
    gpu = [part.cuda() for part in cpu]
    taylor_update(feature, cpu[:2], gap=5, valid=2, last=cpu[2])
    taylor_update(feature.cuda(), gpu[:2], gap=5, valid=2, last=gpu[2])
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
