"""A planned run as calls of sparse_attention: a batch, a ragged batch, or class by class under a mask.

q [sum of Nq, H, D]; k, v [sum of Nkv, Hkv, D]; bits: cache, skip and their indptrs, each may be None; out and
lse (may be None) are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.compat.bits import element_bits
from flashomni.compat.masks import RowClass
from flashomni.compat.plan import Plan
from flashomni.ops.attention import sparse_attention
from flashomni.symbols import SparseSymbols

Bits = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def batched(plan: Plan, q: Tensor, k: Tensor, v: Tensor, bits: Bits, out: Tensor, lse: Tensor | None) -> None:
    """Sequences of one length."""
    q, k, v, out = (_batch_of(x, plan.batch) for x in (q, k, v, out))
    lse = None if lse is None else _batch_of(lse, plan.batch)
    sparse_attention(q, k, v, _symbols(plan, *bits), scale=plan.scale, causal=plan.causal, out=out, lse=lse)


def ragged(
    plan: Plan,
    indptrs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Bits,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Sequences of any length, which are read from the indptrs when the kernel runs."""
    sparse_attention(
        *(q, k, v, _symbols(plan, *bits)),
        scale=plan.scale,
        causal=plan.causal,
        out=out,
        lse=lse,
        q_indptr=indptrs[0],
        kv_indptr=indptrs[1],
    )


def masked(plan: Plan, q: Tensor, k: Tensor, v: Tensor, bits: Bits, out: Tensor, lse: Tensor | None) -> None:
    """Sequence by sequence, class by class."""
    q_first = kv_first = 0
    for b, (q_tokens, kv_tokens) in enumerate(plan.lengths):
        rows, keys = slice(q_first, q_first + q_tokens), slice(kv_first, kv_first + kv_tokens)
        cache, skip = _element_masks(plan, b, bits, q.device)
        part = (q[rows], k[keys], v[keys], cache, skip, out[rows], None if lse is None else lse[rows])
        for kind in plan.classes[b]:
            _run_class(plan, kind, *part)
        q_first, kv_first = q_first + q_tokens, kv_first + kv_tokens


def _batch_of(x: Tensor, batch: int) -> Tensor:
    """[B N, ...] -> [B, N, ...], a view."""
    return x.unflatten(0, (batch, x.shape[0] // batch))


def _symbols(
    plan: Plan,
    cache: Tensor | None,
    skip: Tensor | None,
    cache_indptr: Tensor | None,
    skip_indptr: Tensor | None,
) -> SparseSymbols | None:
    if cache is None and skip is None:
        return None
    cache, skip = (
        part.view(1, -1) if part is not None and indptr is None and part.ndim == 1 else part
        for part, indptr in ((cache, cache_indptr), (skip, skip_indptr))
    )
    longest = (max(q for q, _ in plan.lengths), max(kv for _, kv in plan.lengths))
    return SparseSymbols(
        *(cache, skip, plan.batch, plan.heads, *longest, plan.block_q, plan.block_kv),
        cache_indptr=cache_indptr,
        skip_indptr=skip_indptr,
    )


def _element_masks(plan: Plan, index: int, bits: Bits, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bits of one sequence: cache bool [q_blocks, H], skip bool [q_blocks, H, kv_blocks]."""
    flat = []
    for name, part, indptr, count in (
        ("sparse_info", bits[0], bits[2], plan.cache_bits(index)),
        ("sparse_kv_info", bits[1], bits[3], plan.skip_bits(index)),
    ):
        if part is None:
            flat.append(torch.ones(count, dtype=torch.bool, device=device))
        else:
            flat.append(element_bits(name, part, indptr, index, count))
    q_blocks = -(-plan.lengths[index][0] // plan.block_q)
    kv_blocks = -(-plan.lengths[index][1] // plan.block_kv)
    return flat[0].view(q_blocks, plan.heads), flat[1].view(q_blocks, plan.heads, kv_blocks)


def _run_class(
    plan: Plan,
    kind: RowClass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    skip: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """One class of rows of one sequence, into its rows of out and lse."""
    blocks = slice(kind.q_blocks.start, kind.q_blocks.stop)
    rows = slice(blocks.start * plan.block_q, min(blocks.stop * plan.block_q, q.shape[0]))
    targets = [x[rows] for x in (out, lse) if x is not None]
    q, results = q[rows], targets
    alone = not kind.whole and len(kind.q_blocks) == 1
    if alone:  # then the other rows of its block need not be computed
        q, results = q[kind.rows], [x[kind.rows] for x in targets]
    elif not kind.whole:
        results = [x.clone() for x in targets]
    if kind.order is not None:
        k, v = k[kind.order], v[kind.order]
    sparse_attention(
        *(q[None], k[None], v[None], _class_symbols(plan, kind, cache[blocks], skip[blocks], q, k)),
        scale=plan.scale,
        out=results[0][None],
        lse=results[1][None] if lse is not None else None,
        kv_block_len=kind.lengths if k.shape[0] else None,
    )
    if not kind.whole:
        for target, result in zip(targets, results, strict=True):
            target.index_copy_(0, kind.rows, result if alone else result[kind.rows])


def _class_symbols(
    plan: Plan, kind: RowClass, cache: Tensor, skip: Tensor, q: Tensor, k: Tensor
) -> SparseSymbols:
    """The bits of the class's query blocks, less what none of its rows needs."""
    cache, skip = cache & kind.q_holds[:, None], skip & kind.kv_holds
    return SparseSymbols.from_masks(
        cache.T[None],
        skip.transpose(0, 1)[None] if k.shape[0] else None,
        q_tokens=q.shape[0],
        kv_tokens=k.shape[0],
        block_q=plan.block_q,
        block_kv=plan.block_kv,
    )
