"""The published sparse linear layers, on gemm_q and gemm_o_dispatch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashomni.compat.bits import expect_no_indptr, renamed, row_symbols
from flashomni.ops._dispatch import describe, expect_dims, expect_integer
from flashomni.ops.gemm import gemm_o_dispatch, gemm_q
from flashomni.symbols import SparseSymbols

_NAMES = {
    "x": "A",
    "o": "A",
    "weight": "W",
    "heads": "num_qo_heads",
    "row_offset": "num_text_tokens",
    "block_q": "sparse_q_size",
    "cached[0]": "bias",
}
_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
_WIDEST_HEAD = 256


def flashomni_gemm(
    A: Tensor,
    W: Tensor,
    num_qo_heads: int,
    sparse_info: Tensor | None = None,
    sparse_info_indptr: Tensor | None = None,
    num_text_tokens: int = 512,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    sparse_q_size: int = 128,
    is_full: bool = False,
) -> Tensor:
    """GEMM-Q: A W^T + bias on the active (row block, head) tiles only.

    A: [B, M, K]; W: [N, K], N a multiple of num_qo_heads; bias: [N]. float32 (CPU), float16 or bfloat16.
    sparse_info: uint8 cache bits with sparse_info_indptr int32 [B + 1] in bytes, or [B, bytes] without; None
        or is_full: everything computes.
    num_text_tokens: where A's first row lies in the sequence that the bits describe (0: A is all of it).
    out: [B, M, N]; its cached tiles stay as they were. A new one is zero there.
    sparse_q_size: tokens a row block, 64 or 128.

    Returns out. Raises ValueError, TypeError or NotImplementedError that names the argument, RuntimeError for
    tensors that require grad.
    """
    _check(A, num_qo_heads, num_text_tokens, sparse_q_size)
    _expect_flag("is_full", is_full)
    expect_no_indptr("sparse_info", sparse_info, sparse_info_indptr)
    symbols = None
    if sparse_info is not None and not is_full:
        symbols = _symbols(A, num_qo_heads, sparse_info, sparse_info_indptr, num_text_tokens, sparse_q_size)
    try:
        return gemm_q(
            A, W, bias, symbols, heads=num_qo_heads, row_offset=num_text_tokens if symbols else 0, out=out
        )
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def flashomni_gemm_reduction(
    A: Tensor,
    W: Tensor,
    num_qo_heads: int,
    sparse_info: Tensor | None,
    sparse_info_indptr: Tensor | None,
    num_text_tokens: int,
    bias: Tensor | None = None,
    is_for_cache: bool = False,
    sparse_q_size: int = 128,
    *,
    head_dim: int | None = None,
) -> Tensor:
    """GEMM-O, the heads along A's last axis: one of the two parts of a dense product.

    is_for_cache=True, at an Update: B_c = bias + sum over cached heads of A_h W_h^T; bias [N] or None.
    is_for_cache=False: bias + sum over active heads of A_h W_h^T; bias [B, M, N], that B_c, or None.

    A: [B, M, K]; W: [N, K], any N; sparse_info, sparse_info_indptr, num_text_tokens, sparse_q_size: as in
    flashomni_gemm. bias is only read.
    head_dim: columns a head; columns past num_qo_heads * head_dim (a single block's MLP) are always active.
        Unless given: K / num_qo_heads; where that is no attention head (it does not divide, or is over 256),
        N / num_qo_heads, as in FLUX's single blocks, whose A is attention and MLP side by side.

    Returns [B, M, N]. Raises ValueError, TypeError or NotImplementedError that names the argument,
    RuntimeError for tensors that require grad.
    """
    _check(A, num_qo_heads, num_text_tokens, sparse_q_size)
    _expect_flag("is_for_cache", is_for_cache)
    expect_dims("W", W, "N, K")
    expect_no_indptr("sparse_info", sparse_info, sparse_info_indptr)
    head_dim = _head_dim(A, W, num_qo_heads, head_dim)
    cached = _cached(A, W, bias, is_for_cache)
    if sparse_info is None:
        symbols = _all_active(A, num_qo_heads, num_text_tokens, sparse_q_size)
    else:
        symbols = _symbols(A, num_qo_heads, sparse_info, sparse_info_indptr, num_text_tokens, sparse_q_size)
    if is_for_cache:
        # The cached heads' share is what a Dispatch of the opposite bits computes; columns past the heads are
        # no part of it.
        symbols = replace(symbols, cache=~symbols.cache)
        A, W = A[..., : num_qo_heads * head_dim], W[:, : num_qo_heads * head_dim]
    one = torch.ones(1, dtype=torch.float32, device=A.device)
    try:
        return gemm_o_dispatch(A, W, [cached], one, symbols, head_dim=head_dim, row_offset=num_text_tokens)
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def _check(A: Tensor, num_qo_heads: int, num_text_tokens: int, sparse_q_size: int) -> None:
    if not isinstance(A, Tensor):
        raise TypeError(f"A: expected a torch.Tensor, got {type(A).__name__}")
    expect_dims("A", A, "B, M, K")
    for name, value, least in (("num_qo_heads", num_qo_heads, 1), ("num_text_tokens", num_text_tokens, 0)):
        expect_integer(name, value)
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if sparse_q_size not in (64, 128):
        raise ValueError(f"sparse_q_size: expected 64 or 128, got {sparse_q_size}")


def _expect_flag(name: str, value: bool) -> None:
    if not isinstance(value, int):  # bool is one, and callers give 0 and 1
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def _symbols(
    A: Tensor, heads: int, bits: Tensor, indptr: Tensor | None, offset: int, block: int
) -> SparseSymbols:
    return row_symbols(bits, indptr, A.shape[0], heads, offset + A.shape[1], block)


def _all_active(A: Tensor, heads: int, offset: int, block: int) -> SparseSymbols:
    tokens = offset + A.shape[1]
    symbols = SparseSymbols.ones(A.shape[0], heads, tokens, tokens, block, block, A.device)
    return replace(symbols, skip=None)


def _head_dim(A: Tensor, W: Tensor, heads: int, given: int | None) -> int:
    if given is not None:
        return given
    columns, features = A.shape[2], W.shape[0]
    if columns % heads == 0 and columns // heads <= _WIDEST_HEAD:
        return columns // heads
    if features % heads == 0 and features // heads <= _WIDEST_HEAD and features < columns:
        return features // heads
    raise ValueError(
        f"head_dim: expected the columns of A a head, as neither K / num_qo_heads = {columns} / {heads} nor "
        f"N / num_qo_heads = {features} / {heads} is one of at most {_WIDEST_HEAD}, got None"
    )


def _cached(A: Tensor, W: Tensor, bias: Tensor | None, is_for_cache: bool) -> Tensor:
    """What the reduction starts from, as [B, M, N]."""
    features = W.shape[0]
    shape = (A.shape[0], A.shape[1], features)
    if bias is None:
        return torch.zeros(features, dtype=A.dtype, device=A.device).expand(shape)
    wanted = (features,) if is_for_cache else shape
    if tuple(bias.shape) != wanted:
        raise ValueError(
            f"bias: expected {list(wanted)} with is_for_cache={is_for_cache}, got {describe(bias)}"
        )
    return bias.expand(shape)
