"""sparse_attention on the GPU, against float64 and against itself."""

from __future__ import annotations

import os

import pytest
import torch
from gpu_problems import Problem, check, make_problem, random_problem

from flashomni import sparse_attention

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
BLOCKS = [(128, 128), (128, 64), (64, 64)]
PROBLEMS = int(os.environ.get("FLASHOMNI_GPU_PROBLEMS", "2500"))
CHUNKS = 10  # of the random problems, for workers to share


def run(p: Problem) -> None:
    sparse_attention(p.q, p.k, p.v, p.symbols, out=p.out, lse=p.lse, **p.options)


def solved(p: Problem) -> Problem:
    run(p)
    check(p)
    return p


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_problems(chunk: int) -> None:
    for seed in range(chunk, PROBLEMS, CHUNKS):
        try:
            solved(random_problem(seed))
        except AssertionError as error:
            raise AssertionError(f"random_problem({seed}): {error}") from None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_kernel_at_some_thousand_tokens(dtype: torch.dtype, dim: int, block: tuple[int, int]) -> None:
    solved(make_problem(dtype, dim, block, 5, 5, [(2177, 2177)], 0.4, skewed=True, cached=0.9, strided=True))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_lengths_around_the_blocks(tokens: int, block: tuple[int, int]) -> None:
    solved(make_problem(BF16, 128, block, 2, 1, [(tokens, 300 - tokens)], 0.7, cached=0.8))
    solved(make_problem(FP16, 64, block, 2, 1, [(tokens, 300 - tokens), (5, tokens)], 1, ragged=True))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_few_tiles_with_long_lists_are_split(block: tuple[int, int], heads: int) -> None:
    """Where SMs would idle, a tile's list goes over several CTAs: the sums of its parts must agree."""
    for options in ({}, {"skewed": True}, {"causal": True}, {"summaries": True}, {"peaked": True}):
        solved(make_problem(BF16, 128, block, heads, heads, [(300, 12001)], 0.5, **options))
    solved(make_problem(BF16, 64, block, heads, heads, [(300, 9000), (1, 7001)], 0.5, ragged=True))


def test_more_blocks_than_a_warp_holds_at_once() -> None:
    solved(make_problem(BF16, 64, (64, 64), 1, 1, [(200, 70_000)], 0.02))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_runs_repeat_to_the_bit(block: tuple[int, int]) -> None:
    for lengths in ([(3000, 3000)], [(300, 12001)]):
        p = make_problem(BF16, 128, block, 7, 7, lengths, 0.4, skewed=True)
        run(p)
        first, first_lse = p.out.clone(), p.lse.clone()
        for _ in range(10):
            p.out.fill_(float("nan"))
            run(p)
            assert torch.equal(p.out, first) and torch.equal(p.lse, first_lse)


def test_cached_rows_keep_their_bits() -> None:
    p = make_problem(BF16, 128, (128, 128), 4, 4, [(1000, 1000)], 0.5, cached=0.5)
    p.out.copy_(torch.randn_like(p.out))
    before = p.out.clone()
    run(p)
    rows = p.masks[0][0].repeat_interleave(128, 0)[:1000]
    assert torch.equal(p.out[0][~rows], before[0][~rows])
    assert not torch.equal(p.out[0][rows], before[0][rows])


def test_views_of_one_fused_projection() -> None:
    p = make_problem(BF16, 128, (128, 64), 3, 3, [(700, 700)], 0.5)
    fused = torch.randn(1, 700, 3, 3, 128, device="cuda", dtype=BF16)
    p.q, p.k, p.v = fused.unbind(2)
    solved(p)


def test_all_tiles_cached_writes_nothing() -> None:
    p = make_problem(BF16, 128, (128, 128), 4, 4, [(900, 900)], 1, cached=0.0)
    run(p)
    assert p.out.isnan().all() and p.lse.isnan().all()


def test_a_graph_obeys_symbols_changed_in_place() -> None:
    problems = [
        make_problem(BF16, 128, (128, 128), 4, 4, [(1500, 1500)], density, cached=0.7)
        for density in (0.2, 0.9)
    ]
    p, other = problems
    bits = [(s.cache.clone(), s.skip.clone()) for s in (p.symbols, other.symbols)]
    masks = [p.masks, other.masks]
    run(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(p)
    for turn in (1, 0, 1):
        p.symbols.cache.copy_(bits[turn][0])
        p.symbols.skip.copy_(bits[turn][1])
        p.masks = masks[turn]
        p.out.fill_(float("nan"))
        p.lse.fill_(float("nan"))
        graph.replay()
        check(p)


def test_torch_compile_does_not_break() -> None:
    p = make_problem(BF16, 128, (128, 128), 2, 2, [(513, 513)], 0.5)

    def layer(q, k, v):
        return sparse_attention(q * 1.0, k, v, p.symbols) * 1.0

    expected = layer(p.q, p.k, p.v)
    got = torch.compile(layer, fullgraph=True)(p.q, p.k, p.v)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_streams_do_not_disturb_each_other() -> None:
    problems = [make_problem(BF16, 128, (128, 128), 6, 6, [(2000, 2000)], 0.3) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        for p, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                run(p)
    torch.cuda.synchronize()
    for p in problems:
        check(p)


def test_the_cpu_backend_agrees() -> None:
    p = make_problem(BF16, 128, (128, 64), 4, 2, [(700, 900)], 0.5, cached=0.8)
    run(p)
    host = [t.cpu() for t in (p.q, p.k, p.v)]
    out = torch.full(p.out.shape, float("nan"), dtype=BF16)
    sparse_attention(*host, p.symbols.to("cpu"), out=out, **p.options)
    torch.testing.assert_close(p.out.cpu(), out, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_what_it_cannot_serve_it_refuses() -> None:
    p = make_problem(BF16, 128, (128, 128), 2, 2, [(200, 200)], 0.5)
    with pytest.raises((TypeError, NotImplementedError), match="q: expected"):
        sparse_attention(p.q.float(), p.k.float(), p.v.float(), p.symbols)
    odd = torch.empty(1, 200, 2, 129, device="cuda", dtype=BF16)[..., :128]
    with pytest.raises(ValueError, match="q: expected strides"):
        sparse_attention(odd, p.k, p.v, p.symbols)
    with pytest.raises(ValueError, match="k"):
        sparse_attention(p.q, p.k.cpu(), p.v, p.symbols)
