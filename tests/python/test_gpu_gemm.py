"""gemm_q, gemm_o_update and gemm_o_dispatch on the GPU, against float64 and against themselves.

FLASHOMNI_GPU_GEMM_PROBLEMS=n: how many random problems of each operator (fuzzing: some thousands);
FLASHOMNI_GPU_GEMM_SEED=n: the first one's seed.
"""

from __future__ import annotations

import os
import random
from contextlib import nullcontext

import gpu_gemm_problems as problems
import pytest
import torch
from gpu_gemm_problems import Problem, make_problem, random_problem

from flashomni import SparseSymbols, gemm_o_dispatch, gemm_o_update, gemm_q
from flashomni.ops import _dispatch
from flashomni.symbols import pack

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
FIRST = int(os.environ.get("FLASHOMNI_GPU_GEMM_SEED", "0"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("FLASHOMNI_GPU_GEMM_PROBLEMS", "300")))
HEAD_DIMS = (64, 72, 80, 96, 128, 256)


def solve_q(p: Problem, activation: str | None = None) -> torch.Tensor:
    out = p.output()
    problems.run_q(p, activation, out)
    problems.check_q(p, activation, out)
    return out


def solve_o(p: Problem, coefficients: list[float] | None = None) -> None:
    """An Update, then a Dispatch from what it cached."""
    orders = len(p.derivatives) + 1
    out, cached = p.output(), [p.output() for _ in range(orders)]
    problems.run_update(p, out, cached)
    problems.check_update(p, out, cached)
    solve_dispatch(p, cached, coefficients or [1.0, 2.0, -0.5, 0.25][:orders])


def solve_dispatch(p: Problem, cached: list[torch.Tensor], coefficients: list[float]) -> None:
    problems.hide_cached(p)
    factors = torch.tensor(coefficients, device="cuda")
    out = p.dispatch_output()
    problems.run_dispatch(p, cached, factors, out)
    problems.check_dispatch(p, cached, factors, out)


def test_random_problems_of_gemm_q() -> None:
    for seed in SEEDS:
        try:
            with problems.without_counter() if seed % 4 == 3 else nullcontext():
                solve_q(random_problem(seed, for_q=True), random.Random(seed).choice(problems.ACTIVATIONS))
        except AssertionError as error:
            raise AssertionError(f"random_problem({seed}, for_q=True): {error}") from None


def test_random_problems_of_gemm_o() -> None:
    for seed in SEEDS:
        try:
            with problems.without_counter() if seed % 4 == 3 else nullcontext():
                solve_o(random_problem(seed, for_q=False))
        except AssertionError as error:
            raise AssertionError(f"random_problem({seed}, for_q=False): {error}") from None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block", [64, 128])
def test_each_head_dim(dtype: torch.dtype, head_dim: int, block: int) -> None:
    shape = {"block": block, "row_offset": 77, "rest": 50}
    solve_q(make_problem(dtype, 1000, 5, head_dim, 5 * head_dim, 0.5, for_q=True, width=640, **shape))
    solve_o(make_problem(dtype, 1000, 5, head_dim, 648, 0.5, past=72, order=1, **shape))


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("row_offset", [0, 1, 64, 77, 127, 226])
def test_rows_around_the_blocks(rows: int, row_offset: int) -> None:
    for block in (64, 128):
        shape = {"block": block, "row_offset": row_offset, "batch": 2}
        solve_q(make_problem(BF16, rows, 3, 128, 384, 0.7, for_q=True, width=192, **shape))
        solve_o(make_problem(BF16, rows, 3, 128, 264, 0.7, **shape))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("rows", [4608, 16896])
def test_densities_at_full_size(density: float, clustered: bool, rows: int) -> None:
    """Whole rounds of tiles and what is left over, halved or not."""
    solve_q(make_problem(BF16, rows, 24, 128, 3072, density, for_q=True, width=3072, clustered=clustered))
    solve_o(make_problem(BF16, rows, 24, 128, 3072, density, clustered=clustered, order=1))


@pytest.mark.parametrize("tiles", [1, 2, 5, 13, 40, 66, 100, 131, 132, 133, 150, 200, 264, 265])
@pytest.mark.parametrize("width", [64, 640, 704, 3072])
def test_tiles_left_over_from_whole_rounds(tiles: int, width: int) -> None:
    """One head, as many tiles as said: where their halves fit a round they are halved."""
    solve_q(make_problem(BF16, tiles * 256 - 100, 1, 128, 128, 1.0, for_q=True, width=width))
    solve_q(make_problem(FP16, tiles * 256 - 200, 1, 128, 128, 1.0, for_q=True, width=width), "gelu_tanh")


def test_a_row_sparse_mlp() -> None:
    p = make_problem(BF16, 2000, 1, 128, 6144, 0.5, for_q=True, width=1536, row_offset=226, rest=40)
    for activation in problems.ACTIVATIONS:
        solve_q(p, activation)


def test_columns_past_the_heads() -> None:
    """A single block's proj_out: attention and MLP columns."""
    solve_o(make_problem(BF16, 1500, 8, 128, 1024, 0.4, past=4096, order=1))
    solve_o(make_problem(FP16, 700, 3, 96, 520, 0.4, past=40, row_offset=5))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("past", [0, 4096])
def test_rows_without_an_active_head_are_left_alone(block: int, past: int) -> None:
    """One head, so that a block is a row; a tile of the kernel holds blocks of both kinds."""
    shape = {"past": past, "block": block, "keep_rows": True}
    for density in (0.0, 0.1, 0.5, 0.9, 1.0):
        solve_o(make_problem(BF16, 1500, 1, 128, 1024, density, order=1, apart=True, **shape))
        solve_o(make_problem(FP16, 700, 2, 96, 520, density / 2, row_offset=77, batch=2, **shape))
    solve_o(make_problem(BF16, 4608, 1, 128, 3072, 0.5, apart=True, clustered=True, order=1, **shape))


@pytest.mark.parametrize("block", [64, 128])
def test_plans_that_shared_memory_does_not_hold(block: int) -> None:
    """Many bands of many lists; more lists than one band has room for."""
    solve_q(make_problem(BF16, 33000, 48, 8, 384, 0.3, for_q=True, width=64, row_offset=77, block=block))
    solve_q(make_problem(FP16, 300, 50, 8, 400, 0.5, for_q=True, width=64, batch=20, block=block))
    solve_q(make_problem(BF16, 200, 256, 8, 2048, 0.5, for_q=True, width=64, batch=16, block=block))


def test_without_symbols_it_is_linear() -> None:
    p = make_problem(BF16, 1000, 4, 128, 512, 1.0, for_q=True, width=512, symbols=False)
    solve_q(p)
    got = gemm_q(p.x, p.weight, p.bias)
    expected = torch.nn.functional.linear(p.x, p.weight, p.bias)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    solve_o(make_problem(BF16, 500, 4, 128, 512, 1.0, symbols=False, order=1))


def test_bits_with_indptr() -> None:
    p = make_problem(BF16, 600, 3, 128, 384, 0.5, for_q=True, width=256, batch=2)
    bits = p.symbols.cache
    starts = [1 + b * bits.shape[1] for b in range(3)]
    p.symbols.cache_indptr = torch.tensor(starts, dtype=torch.int32, device="cuda")
    p.symbols.cache = torch.cat([bits.new_full((1,), 255), bits.flatten()])
    solve_q(p)


def test_an_order_without_history_is_not_read() -> None:
    p = make_problem(BF16, 700, 4, 64, 520, 0.5)
    cached = [torch.randn(p.shape, device="cuda").to(BF16) for _ in range(3)]
    cached[1].fill_(float("nan"))
    solve_dispatch(p, cached, [1.0, 0.0, 0.5])
    solve_dispatch(p, cached, [0.0, 0.0, 0.0])


def test_cached_tiles_keep_their_bits() -> None:
    p = make_problem(BF16, 1000, 4, 96, 384, 0.5, for_q=True, width=320, row_offset=77)
    larger = torch.randn(1, 1004, 400, device="cuda").to(BF16)
    before, out = larger.clone(), larger[:, 2:1002, 8:392]
    problems.run_q(p, None, out)
    tiles = torch.zeros_like(larger, dtype=torch.bool)
    tiles[:, 2:1002, 8:392] = p.active.repeat_interleave(96, -1)
    assert torch.equal(larger[~tiles], before[~tiles])
    assert not torch.equal(larger[tiles], before[tiles])


def test_all_tiles_cached() -> None:
    p = make_problem(BF16, 900, 4, 128, 512, 0.0, for_q=True, width=512)
    assert solve_q(p).isnan().all()
    solve_o(make_problem(BF16, 900, 4, 128, 512, 0.0, order=1))


@pytest.mark.parametrize("rows", [4608, 20000])
def test_runs_repeat_to_the_bit(rows: int) -> None:
    p = make_problem(BF16, rows, 5, 128, 640, 0.6, for_q=True, width=3072)
    first = solve_q(p)
    for _ in range(20):
        out = p.output()
        problems.run_q(p, None, out)
        assert torch.equal(out.nan_to_num(7), first.nan_to_num(7))


@pytest.mark.parametrize("keep_rows", [False, True])
def test_a_graph_obeys_symbols_and_coefficients_changed_in_place(keep_rows: bool) -> None:
    p = make_problem(BF16, 3000, 6, 128, 768, 0.3, order=1, row_offset=40, keep_rows=keep_rows)
    q = make_problem(BF16, 3000, 6, 128, 768, 0.3, for_q=True, width=512, row_offset=40)
    q.symbols, q.active = p.symbols, p.active
    out_q, out_update, out = p.output(), p.output(), p.dispatch_output()
    cached, coefficients = [p.output() for _ in range(2)], torch.tensor([1.0, 2.0], device="cuda")

    def step() -> None:
        problems.run_q(q, "gelu", out_q)
        problems.run_update(p, out_update, cached)
        problems.run_dispatch(p, cached, coefficients, out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for density, factors in ((0.9, [1.0, 0.0]), (0.0, [1.0, -3.0]), (0.5, [0.5, 1.0])):
        other = make_problem(BF16, 3000, 6, 128, 768, density, row_offset=40)
        p.symbols.cache.copy_(other.symbols.cache)
        p.active = q.active = other.active
        coefficients.copy_(torch.tensor(factors))
        for tensor in (out_q, out_update, *cached):
            tensor.fill_(float("nan"))
        out.copy_(p.dispatch_output())
        graph.replay()
        problems.check_q(q, "gelu", out_q)
        problems.check_update(p, out_update, cached)
        problems.check_dispatch(p, cached, coefficients, out)


def test_counters_are_zero_again() -> None:
    for seed in range(30):
        solve_q(random_problem(seed, for_q=True))
        solve_o(random_problem(seed, for_q=False))
    counters = _dispatch._counters[torch.cuda.current_device()]
    assert counters.take() > counters._memory[0].data_ptr()  # some are in use
    assert not any(memory.any() for memory in counters._memory)


def test_a_graph_without_a_counter() -> None:
    """Where none is left, the graph sets one of its own to zero."""
    q = make_problem(BF16, 20000, 5, 128, 640, 0.6, for_q=True, width=512)
    o = make_problem(BF16, 20000, 4, 128, 3072, 0.6, past=0)
    out_q, out, cached = q.output(), o.output(), [o.output()]
    problems.run_q(q, None, out_q)  # makes what a first call makes
    graph = torch.cuda.CUDAGraph()
    with problems.without_counter(), torch.cuda.graph(graph):
        problems.run_q(q, None, out_q)
        problems.run_update(o, out, cached)
    for _ in range(2):
        for tensor in (out_q, out, *cached):
            tensor.fill_(float("nan"))
        graph.replay()
        problems.check_q(q, None, out_q)
        problems.check_update(o, out, cached)


def test_one_workspace_serves_calls_of_all_shapes() -> None:
    """Calls follow each other on one stream: none may meet what the last one left."""
    for seed in range(40):
        p, q = random_problem(seed, for_q=False), random_problem(seed, for_q=True)
        outs = [q.output() for _ in range(3)]
        out, cached = p.output(), [p.output() for _ in range(len(p.derivatives) + 1)]
        for each in outs:
            problems.run_q(q, None, each)
        problems.run_update(p, out, cached)
        for each in outs:
            problems.check_q(q, None, each)
        problems.check_update(p, out, cached)


def test_streams_do_not_disturb_each_other() -> None:
    found = [make_problem(BF16, 4608, 6, 128, 768, 0.3, for_q=True, width=1536) for _ in range(4)]
    outs = [p.output() for p in found]
    streams = [torch.cuda.Stream() for _ in found]
    torch.cuda.synchronize()
    for _ in range(5):
        for p, out, stream in zip(found, outs, streams, strict=True):
            with torch.cuda.stream(stream):
                problems.run_q(p, None, out)
    torch.cuda.synchronize()
    for p, out in zip(found, outs, strict=True):
        problems.check_q(p, None, out)


def test_torch_compile_does_not_break() -> None:
    p = make_problem(BF16, 513, 2, 128, 256, 0.5, for_q=True, width=256)

    def layer(x):
        return gemm_q(x * 1.0, p.weight, p.bias, p.symbols) * 1.0

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(p.x), layer(p.x), rtol=0, atol=0)


def test_the_cpu_backend_agrees() -> None:
    p = make_problem(BF16, 700, 4, 64, 256, 0.5, order=1, row_offset=77)
    out, cached = p.output(), [p.output() for _ in range(2)]
    problems.run_update(p, out, cached)
    host = (p.x.cpu(), p.weight.cpu(), p.bias.cpu(), p.symbols.to("cpu"))
    options = {"head_dim": 64, "row_offset": 77}
    on_host, cached_there = gemm_o_update(*host, derivatives=[p.derivatives[0].cpu()], **options)
    for got, expected in zip((out, *cached), (on_host, *cached_there), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_what_it_cannot_serve_it_refuses_before_anything_runs() -> None:
    p = make_problem(BF16, 200, 2, 64, 128, 0.5, for_q=True, width=128)
    out = p.output()
    with pytest.raises(TypeError, match="x: expected float16 or bfloat16"):
        gemm_q(p.x.float(), p.weight.float(), None, p.symbols)
    with pytest.raises(ValueError, match="x: expected strides"):
        odd = torch.empty(1, 200, 129, device="cuda", dtype=BF16)[..., :128]
        gemm_q(odd, p.weight, p.bias, p.symbols, out=out)
    with pytest.raises(ValueError, match="out: expected strides"):
        narrow = torch.empty(1, 200, 129, device="cuda", dtype=BF16)[..., :128]
        gemm_q(p.x, p.weight, p.bias, p.symbols, out=narrow)
    with pytest.raises(ValueError, match="x: expected data aligned to 16 bytes"):
        shifted = torch.empty(1, 200, 136, device="cuda", dtype=BF16)[..., 1:129]
        gemm_q(shifted, p.weight, p.bias, p.symbols, out=out)
    with pytest.raises(ValueError, match="weight"):
        gemm_q(p.x, p.weight.cpu(), p.bias, p.symbols)
    with pytest.raises(NotImplementedError, match="weight: expected rows a head that are a multiple of 8"):
        mask = torch.ones(1, 2, 2, dtype=torch.bool)
        s = SparseSymbols(pack(mask.transpose(1, 2).reshape(1, -1)).cuda(), None, 1, 2, 200, 200, 128, 128)
        gemm_q(p.x, torch.zeros(24, 128, device="cuda", dtype=BF16), None, s)
    with pytest.raises(ValueError, match="coefficients"):
        coefficients = torch.ones(1)
        gemm_o_dispatch(p.x, p.weight, [out], coefficients, p.symbols, head_dim=64, out=torch.empty_like(out))
    assert out.isnan().all()
