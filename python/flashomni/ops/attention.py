"""Block-sparse attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashomni.ops._dispatch import (
    Native,
    define,
    describe,
    expect,
    expect_symbols,
    new_output,
    no_result,
)
from flashomni.symbols import SparseSymbols

_ATTENTION = Native(
    "attention",
    "q, k, v, symbols.cache?, symbols.skip?, symbols.cache_indptr?, symbols.skip_indptr?, out?, lse?, "
    "q_indptr?, kv_indptr?, k_mean?, v_mean?, kv_block_len?",
)


_operator = define(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? cache, Tensor? skip, Tensor? cache_indptr, "
    "Tensor? skip_indptr, Tensor(a!) out, Tensor(b!)? lse, Tensor? q_indptr, Tensor? kv_indptr, "
    "Tensor? k_mean, Tensor? v_mean, Tensor? kv_block_len, float scale, bool causal, int block_q, "
    "int block_kv) -> ()",
    _ATTENTION.invoke,
    no_result,
)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    symbols: SparseSymbols | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    q_indptr: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    kv_block_len: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the blocks that the symbols select.

    q: [B, N, H, D]; k, v: [B, Nkv, Hkv, D], H a multiple of Hkv. Ragged: q [T, H, D]; k, v [Tkv, Hkv, D]
        with q_indptr, kv_indptr: int32 [B + 1], tokens. float32 (CPU), float16 or bfloat16; D one of 64, 72,
        80, 96, 128, 256; any strides whose last is 1.
    symbols: which tiles and blocks compute; None: all. A cached tile leaves its rows of `out` and `lse` as
        they were (zero where this allocates them); an active tile without a selected key gives out = 0 and
        lse = -inf.
    scale: 1 / sqrt(D) unless given.
    causal: exact to the token; the last query sees the last key.
    out: q's shape and dtype; lse: float32, q's shape without D, log2 of the sum of exponentials.
    k_mean, v_mean: float32 [B, kv_blocks, Hkv, D]: a skipped block is not dropped but stood for by its mean
        key and value, weighted by its length.
    kv_block_len: int32 [kv_blocks], the valid tokens at the head of each key block.

    Returns out, or (out, lse) with return_lse or given lse. Raises ValueError, TypeError or
    NotImplementedError that names the argument, RuntimeError for tensors that require grad.
    """
    cache = skip = cache_indptr = skip_indptr = None
    block_q = block_kv = 128
    if symbols is not None:
        expect_symbols(symbols)
        cache, skip = symbols.cache, symbols.skip
        cache_indptr, skip_indptr = symbols.cache_indptr, symbols.skip_indptr
        block_q, block_kv = symbols.block_q, symbols.block_kv
    tensors = (
        *(q, k, v, cache, skip, cache_indptr, skip_indptr, out, lse),
        *(q_indptr, kv_indptr, k_mean, v_mean, kv_block_len),
    )
    direct = _ATTENTION.is_direct(tensors)
    if symbols is not None:
        _check_symbols(symbols, q, k, q_indptr)
    if scale is None:
        scale = 0.0
    elif not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a finite number above 0, or None, got {scale}")
    if out is None:
        out = new_output(q.shape, q, cache)
    if lse is None and return_lse:
        lse = new_output(q.shape[:-1], q, cache, torch.float32)
    (_ATTENTION.invoke if direct else _operator)(
        *(q, k, v, cache, skip, cache_indptr, skip_indptr, out, lse),
        *(q_indptr, kv_indptr, k_mean, v_mean, kv_block_len),
        *(scale, causal, block_q, block_kv),
    )
    return out if lse is None else (out, lse)


def _check_symbols(symbols: SparseSymbols, q: Tensor, k: Tensor, q_indptr: Tensor | None) -> None:
    shape = q.shape
    if len(shape) != (4 if q_indptr is None else 3):
        layout = "B, N, H, D" if q_indptr is None else "T, H, D"
        raise ValueError(f"q: expected [{layout}], got {describe(q)}")
    expect("symbols.heads", "as in q", symbols.heads, shape[-2])
    if q_indptr is not None:
        expect("symbols.batch", "as in q_indptr", symbols.batch, q_indptr.shape[0] - 1)
        return
    expect("symbols.batch", "as in q", symbols.batch, shape[0])
    expect("symbols.q_tokens", "as in q", symbols.q_tokens, shape[1])
    keys = k.shape
    if len(keys) == 4:
        expect("symbols.kv_tokens", "as in k", symbols.kv_tokens, keys[1])
