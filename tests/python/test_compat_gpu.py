"""The published interface on a GPU: the same answers as on the CPU's reference, and graphs."""

from __future__ import annotations

import pytest
import reference
import torch
from inputs import BLOCKS
from published import Problem, indptr, wrapper
from test_compat_attention import check
from test_compat_gemm import Matrix

import flashomni

pytestmark = pytest.mark.gpu

TYPES = (torch.float16, torch.bfloat16)


def problem(lengths: list[tuple[int, int]], **options: object) -> Problem:
    return Problem(lengths, device="cuda", **{"dtype": torch.bfloat16, **options})


def has_operator(name: str) -> bool:
    """False while the GPU's backend lacks it."""
    x = torch.zeros(1, 8, 64, device="cuda", dtype=torch.bfloat16)
    w = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    try:
        if name == "gemm_q":
            flashomni.gemm_q(x, w)
        else:
            one = torch.ones(1, device="cuda")
            flashomni.gemm_o_dispatch(x, w, [x.clone()], one, None, head_dim=64)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dtype, block, causal) -> None:
    check(problem([(640, 640), (77, 226), (300, 1000)], heads=4, dtype=dtype, block=block, causal=causal))
    check(problem([(333, 500)] * 2, heads=4, kv_heads=2, dtype=dtype, block=block, causal=causal))


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim) -> None:
    check(problem([(640, 640)], head_dim=head_dim))


def test_no_symbols_and_all_skipped() -> None:
    check(problem([(640, 640)], cache_density=1, skip_density=1), bits=())
    check(problem([(640, 640)], cache_density=1, skip_density=0))


@pytest.mark.parametrize("block", BLOCKS)
def test_masks(block) -> None:
    padding = torch.ones(900, 900, dtype=torch.bool)
    padding[:, 77:512] = False
    valid = torch.arange(640) % 300 < 200
    document = torch.bucketize(torch.arange(500), torch.tensor([90, 333]))
    for mask in (padding, valid[:, None] & valid, document[:, None] == document):
        check(problem([tuple(mask.shape)], block=block, masks=[mask]))
    causal = torch.ones(300, 400, dtype=torch.bool).tril(100)
    check(problem([(300, 400)], block=block, masks=[causal]))
    scattered = torch.rand(300, 300) < 0.5
    with pytest.raises(NotImplementedError, match="custom_mask: expected at most 64 kinds of rows"):
        problem([(300, 300)], masks=[scattered]).plan(wrapper("cuda"))


def test_packing() -> None:
    x = torch.rand(1000) < 0.5
    for order in ("big", "little"):
        assert torch.equal(flashomni.packbits(x.cuda(), order).cpu(), flashomni.packbits(x, order))
        for sizes in ([1000], [0, 17, 8, 900], []):
            here = flashomni.segment_packbits(x, indptr(sizes), order)
            there = flashomni.segment_packbits(x.cuda(), indptr(sizes, "cuda"), order)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_a_graph_obeys_new_symbols_and_new_lengths() -> None:
    flashomni.warmup()
    first, other = problem([(300, 400), (212, 112)], seed=1), problem([(256, 256), (256, 256)], seed=2)
    buffers = [torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(2)]
    w = wrapper("cuda", "NHD", True, *buffers)
    first.plan(w)
    q, k, v = first.q.clone(), first.k.clone(), first.v.clone()
    # Room for the bits of any lengths, so that later ones fit the captured tensors.
    bits = [torch.zeros(64, dtype=torch.uint8, device="cuda") for _ in range(2)]
    offsets = [torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(2)]
    out = torch.empty_like(q)

    def load(source: Problem) -> None:
        source.plan(w)
        for target, value in zip((q, k, v), (source.q, source.k, source.v), strict=True):
            target.copy_(value)
        cache, skip, cache_indptr, skip_indptr = source.bits(w)
        for target, value in zip((*bits, *offsets), (cache, skip, cache_indptr, skip_indptr), strict=True):
            target[: len(value)].copy_(value)
        out.fill_(float("nan"))

    load(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w.run(q, k, v, *bits, *offsets, out=out)
    again = problem([(300, 400), (212, 112)], seed=3)
    for source in (first, again, other):
        load(source)
        graph.replay()
        expected, _, active = source.expected()
        got = out.cpu()
        assert torch.equal(~got.isnan().all(-1), active)
        reference.assert_close(got[active], expected[active], torch.bfloat16)


def test_a_masked_run_can_be_captured() -> None:
    flashomni.warmup()
    mask = torch.ones(500, 500, dtype=torch.bool)
    mask[:, 77:300] = False
    source, w = problem([(500, 500)], masks=[mask]), wrapper("cuda")
    source.plan(w)
    bits = source.bits(w)
    out = torch.empty_like(source.q)
    expected = w.run(source.q, source.k, source.v, *bits, out=out.fill_(7)).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w.run(source.q, source.k, source.v, *bits, out=out)
    out.fill_(7)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("offset", [0, 77, 226, 512])
@pytest.mark.parametrize("dtype", TYPES)
def test_gemm(offset, dtype) -> None:
    if not has_operator("gemm_q"):
        pytest.skip("gemm_q is not on this backend")
    case = Matrix(640, 4, 256, 512, offset, 100, 2, dtype=dtype)
    A, W, heads, info, offsets, _ = (x.cuda() if isinstance(x, torch.Tensor) else x for x in case.arguments)
    out = torch.full((2, 640, 512), float("nan"), dtype=dtype, device="cuda")
    flashomni.flashomni_gemm(A, W, heads, info, offsets, offset, case.bias.cuda(), out)
    active = case.active.repeat_interleave(128, -1)
    dense = case.A.double() @ case.W.double().T + case.bias.double()
    assert torch.equal(out.cpu().isnan(), ~active)
    reference.assert_close(out.cpu()[active], dense[active], dtype)


@pytest.mark.parametrize("features", [256, 1000])
@pytest.mark.parametrize("dtype", TYPES)
def test_reduction(features, dtype) -> None:
    if not has_operator("gemm_o_dispatch"):
        pytest.skip("gemm_o_dispatch is not on this backend")
    case = Matrix(640, 4, 256, features, 77, 100, 2, dtype=dtype)
    arguments = [x.cuda() if isinstance(x, torch.Tensor) else x for x in case.arguments]
    cached, active, _ = case.shares(64)
    B_c = flashomni.flashomni_gemm_reduction(*arguments, case.bias.cuda(), True)
    reference.assert_close(B_c.cpu(), cached + case.bias.double(), dtype)
    out = flashomni.flashomni_gemm_reduction(*arguments, B_c)
    reference.assert_close(out.cpu(), B_c.cpu().double() + active, dtype)
