"""Block-sparse attention on a GPU beside cuDNN's and FlashAttention-3's dense attention, in one run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashomni import ops
from flashomni.bench import cuda, harness
from flashomni.symbols import SparseSymbols, pack

SKEW_POWER = 2.33  # a row's density is uniform^2.33: 0.3 on average, from nothing to everything


@dataclass(frozen=True)
class Case:
    """Which blocks are set. pattern: "random" (as many in each row), "skewed" (rows differ), "tiles" (whole
    tiles cached), "summaries" (random; their means, made beforehand, stand for skipped blocks)."""

    density: float
    pattern: str = "random"
    block: tuple[int, int] = (128, 128)


CASES = (
    *(Case(density) for density in (1.0, 0.5, 0.3, 0.1, 0.05)),
    Case(0.3, "skewed"),
    Case(0.3, "summaries"),
    Case(0.5, "tiles"),
    *(Case(density, block=(128, 64)) for density in (1.0, 0.3, 0.1)),
    *(Case(density, block=(64, 64)) for density in (1.0, 0.3, 0.1)),
    Case(0.0, "tiles"),  # the last one, as the chip rests under it
)


@torch.inference_mode()
def run(
    *, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, rounds: int, seed: int = 0
) -> list[dict]:
    """Rows of suite "attention_cuda". The plan is part of every time.

    gflops: of selected work. baseline: cuDNN's dense SDPA. ratio: of rates, ours over cuDNN's, so that it
    says what sparsity keeps; ratio_fa3: over FlashAttention-3's, None where PyPI's fa3-fwd is missing;
    share_of_dense: over our own with every bit set; plan_us: the plan kernel alone.
    """
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, tokens, heads, head_dim, device="cuda", dtype=dtype)
    out = torch.empty_like(q)
    calls, work = {}, {}
    for case in CASES:
        symbols = _symbols(case, tokens, heads)
        options = {}
        if case.pattern == "summaries":
            options = {"k_mean": ops.block_mean(k, case.block[1]), "v_mean": ops.block_mean(v, case.block[1])}
        calls[case] = _call(q, k, v, symbols, out, options)
        work[case] = harness.attention_flops(symbols, head_dim)
    arms = {str(case): call for case, call in calls.items()}
    arms["cudnn"] = cudnn(q, k, v)
    if (fa3 := _fa3()) is not None:
        arms["fa3"] = lambda: fa3(q, k, v)
    ms = cuda.interleave(arms, rounds)
    full = 4.0 * heads * head_dim * tokens * tokens
    best = work[CASES[0]] / ms[str(CASES[0])]
    kernels = cuda.kernels_us({str(case): call for case, call in calls.items()})
    rows = []
    for case in calls:
        took, rate = ms[str(case)], work[case] / ms[str(case)]
        found = harness.row(
            "attention_cuda", _described(case, q), took, work[case], ("cudnn", ms["cudnn"], full)
        )
        found["ratio"] = rate / (full / ms["cudnn"])
        found["ratio_fa3"] = rate / (full / ms["fa3"]) if "fa3" in ms else None
        found["fa3_ms"] = ms.get("fa3")
        found["share_of_dense"] = rate / best
        found["plan_us"] = cuda.plan_us(kernels[str(case)])
        rows.append(found)
    return rows


def _call(
    q: Tensor, k: Tensor, v: Tensor, symbols: SparseSymbols, out: Tensor, options: dict
) -> Callable[[], object]:
    return lambda: ops.sparse_attention(q, k, v, symbols, out=out, **options)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """cuDNN's SDPA on the transposed views that diffusers passes."""
    tq, tk, tv = (t.transpose(1, 2) for t in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(tq, tk, tv)

    return call


def _fa3() -> Callable | None:
    try:
        return importlib.import_module("fa3_fwd_interface").flash_attn_func
    except ImportError:
        return None


def _symbols(case: Case, tokens: int, heads: int) -> SparseSymbols:
    """On the GPU, made there: at 33280 tokens a mask on the host takes seconds."""
    rows, columns = (-(-tokens // block) for block in case.block)
    active = torch.ones(rows, heads, dtype=torch.bool, device="cuda")
    selected = torch.ones(rows, heads, columns, dtype=torch.bool, device="cuda")
    if case.pattern == "tiles":
        active = torch.rand(rows, heads, device="cuda").argsort(0).argsort(0) < round(case.density * rows)
    elif case.pattern == "skewed":
        selected = (
            torch.rand(rows, heads, columns, device="cuda")
            < torch.rand(rows, heads, 1, device="cuda") ** SKEW_POWER
        )
        selected[..., 0] = True
    elif case.density < 1:
        order = torch.rand(rows, heads, columns, device="cuda").argsort(-1).argsort(-1)
        selected = order < harness.equal_count(case.density, columns)
    symbols = SparseSymbols(None, None, 1, heads, tokens, tokens, *case.block)
    symbols.cache = pack(active.flatten()[None])
    symbols.skip = pack(selected.flatten()[None])
    return symbols


def _described(case: Case, q: Tensor) -> dict:
    return {
        "seqlen": q.shape[1],
        "heads": q.shape[2],
        "head_dim": q.shape[3],
        "density": case.density,
        "pattern": case.pattern,
        "block": list(case.block),
        "dtype": str(q.dtype).removeprefix("torch."),
    }
