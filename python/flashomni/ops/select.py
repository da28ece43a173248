"""From queries and keys to symbols: norm and RoPE, block means, and the paper's selection; and what the
symbols come to."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.ops._dispatch import (
    Native,
    define,
    expect,
    expect_dims,
    expect_integer,
    expect_symbols,
    no_result,
    tile_arguments,
)
from flashomni.symbols import SparseSymbols

_MEAN = Native("block_mean", "x, out?, similarity?")
_SELECT = Native("select_flashomni", "q_mean, k_mean, symbols.cache, symbols.skip, ramp?, k_similarity?")
_SUMMARIZE = Native("summarize_symbols", "symbols.cache, symbols.skip, rows, shares, awake")
_NORM = Native("norm_rope", "x, weight?, cos?, sin?, symbols.cache?, keys?, keys_weight?")
_NORM_MEAN = Native("norm_rope_mean", "x, weight?, cos?, sin?, mean, similarity?")


_mean_operator = define(
    "block_mean(Tensor x, Tensor(a!) out, Tensor(b!)? similarity, int block) -> ()", _MEAN.invoke, no_result
)
_select_operator = define(
    "select_flashomni(Tensor q_mean, Tensor k_mean, Tensor(a!) cache, Tensor(b!) skip, Tensor? ramp, "
    "Tensor? k_similarity, int tokens, int text_start, int text_length, float tau_q, float tau_kv, "
    "float s_q, float scale, float self_similarity, int block_q, int block_kv) -> ()",
    _SELECT.invoke,
    no_result,
)
_summarize_operator = define(
    "summarize_symbols(Tensor cache, Tensor skip, Tensor(a!) rows, Tensor(b!) shares, Tensor(c!) awake, "
    "int heads, int q_tokens, int kv_tokens, int block_q, int block_kv) -> ()",
    _SUMMARIZE.invoke,
    no_result,
)
_norm_operator = define(
    "norm_rope(Tensor(a!) x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor? cache, Tensor(b!)? keys, "
    "Tensor? keys_weight, float eps, int row_offset, int tokens, int block_q) -> ()",
    _NORM.invoke,
    no_result,
)
_norm_mean_operator = define(
    "norm_rope_mean(Tensor(a!) x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor(b!) mean, "
    "Tensor(c!)? similarity, float eps, int row_offset, int tokens, int block) -> ()",
    _NORM_MEAN.invoke,
    no_result,
)


def block_mean(x: Tensor, block: int, similarity: Tensor | None = None) -> Tensor:
    """Means over blocks of tokens: x [B, N, H, D] of any float type -> float32 [B, ceil(N / block), H, D].

    similarity: float32 [B, ceil(N / block), H] to write into, from the same read: how alike each block's
        tokens are, as the mean cosine over all pairs of them (SpargeAttn, arXiv 2502.18137). A token of zeros
        counts as a cosine of 0.

    Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require grad.
    """
    direct = _MEAN.is_direct((x, None, similarity))
    expect_dims("x", x, "B, N, H, D")
    expect_integer("block", block)
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    batch, tokens, heads, head_dim = x.shape
    shape = (batch, -(-tokens // block), heads, head_dim)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    (_MEAN.invoke if direct else _mean_operator)(x, out, similarity, block)
    return out


def select_flashomni(
    q_mean: Tensor,
    k_mean: Tensor,
    symbols: SparseSymbols,
    *,
    text_start: int,
    text_length: int,
    tau_q: float,
    tau_kv: float,
    s_q: float = 0.0,
    scale: float | None = None,
    ramp: Tensor | None = None,
    k_similarity: Tensor | None = None,
    self_similarity: float = 0.0,
) -> SparseSymbols:
    """The paper's multi-granularity selection (arXiv 2509.25401, section 3), written into `symbols`.

    q_mean: float32 [B, q_blocks, H, D]; k_mean: float32 [B, kv_blocks, Hkv, D]: block means after norm and
        RoPE.
    symbols: both parts present, [B, bytes] each, q_tokens == kv_tokens (a joint sequence).
    text_start, text_length: where the text tokens lie; blocks that hold one are never cached nor skipped.
    tau_q: share of importance to cache; tau_kv: softmax mass a row to skip.
    s_q: where the share of active tiles of a batch element is <= s_q, all of it is reused; 0 switches that
        off.
    scale: 1 / sqrt(D) unless given.
    ramp: float32 [1] on the means' device: scales tau_q and tau_kv, so that a captured CUDA graph can follow
        f(t). None: they are taken as they are.
    k_similarity: float32 [B, kv_blocks, Hkv], of block_mean: a KV block where it is not above self_similarity
        is never skipped, as its mean does not stand for its tokens. None: no such guard.

    Returns `symbols`. Raises ValueError or TypeError that names the argument, RuntimeError for tensors that
    require grad.
    """
    _expect_both_parts(symbols)
    expect("symbols.kv_tokens", "as q_tokens", symbols.kv_tokens, symbols.q_tokens)
    direct = _SELECT.is_direct((q_mean, k_mean, symbols.cache, symbols.skip, ramp, k_similarity))
    expect_dims("q_mean", q_mean, "B, q_blocks, H, D")
    expect("symbols.batch", "as in q_mean", symbols.batch, q_mean.shape[0])
    expect("symbols.heads", "as in q_mean", symbols.heads, q_mean.shape[2])
    expect_integer("text_start", text_start)
    expect_integer("text_length", text_length)
    (_SELECT.invoke if direct else _select_operator)(
        *(q_mean, k_mean, symbols.cache, symbols.skip, ramp, k_similarity),
        *(symbols.q_tokens, text_start, text_length),
        *(tau_q, tau_kv, s_q, 0.0 if scale is None else scale, self_similarity),
        *(symbols.block_q, symbols.block_kv),
    )
    return symbols


def summarize_symbols(symbols: SparseSymbols, rows: Tensor, shares: Tensor, awake: Tensor) -> None:
    """What symbols come to, from one read of their bits, written into the other three.

    symbols: both parts present, [B, bytes] each.
    rows: uint8 [B, ceil(q_blocks / 8)], cache bits of one head: bit i says whether any head of row block i is
        active; bits past the last block are 0.
    shares: float32 [2, H], of each head over batch and rows: the selected share of (query block, KV block)
        pairs, where those of cached tiles are not selected; and the share of active tiles.
    awake: uint8 [B], 1 where the element has any active tile, else 0.

    Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require grad.
    """
    _expect_both_parts(symbols)
    direct = _SUMMARIZE.is_direct((symbols.cache, symbols.skip, rows, shares, awake))
    (_SUMMARIZE.invoke if direct else _summarize_operator)(
        *(symbols.cache, symbols.skip, rows, shares, awake),
        *(symbols.heads, symbols.q_tokens, symbols.kv_tokens, symbols.block_q, symbols.block_kv),
    )


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    symbols: SparseSymbols | None = None,
    row_offset: int = 0,
    keys: Tensor | None = None,
    keys_weight: Tensor | None = None,
) -> Tensor:
    """x = rope(rms_norm(x) * weight), in place on active tiles; and of keys on all tiles.

    x: [B, N, H, D], any strides whose last is 1 (a view into a fused qkv will do): rows
        row_offset..row_offset + N of the joint sequence.
    weight: of x's dtype: [D], a norm over each head; [H * D], one norm over all heads of a token, whose
        cached tiles are then read too where its row block has an active one; None: no norm.
    cos, sin: float32 [tokens, D], the joint sequence's rows, with pairs (2i, 2i + 1) as diffusers' FLUX has
        them; both None: no rotation.
    symbols: their cache bits; cached tiles stay as they were.
    keys: [B, N, H_k, D] of the same tokens, x's dtype and device: normed and rotated in the same launch,
        whatever the symbols say. keys_weight: [D], [H_k * D] or None, in place of weight.

    Returns x. Raises ValueError, TypeError or NotImplementedError that names the argument, RuntimeError for
    tensors that require grad.
    """
    cache, cache_indptr = tile_arguments(symbols)
    if cache_indptr is not None:
        raise ValueError("symbols: expected [batch, bytes] without indptr, got ragged bits")
    direct = _NORM.is_direct((x, weight, cos, sin, cache, keys, keys_weight))
    expect_dims("x", x, "B, N, H, D")
    expect_integer("row_offset", row_offset)
    block_q = 128
    if symbols is not None:
        expect("symbols.batch", "as in x", symbols.batch, x.shape[0])
        expect("symbols.heads", "as in x", symbols.heads, x.shape[2])
        tokens, block_q = symbols.q_tokens, symbols.block_q
    else:
        tokens = row_offset + x.shape[1] if cos is None else cos.shape[0]
    (_NORM.invoke if direct else _norm_operator)(
        x, weight, cos, sin, cache, keys, keys_weight, eps, row_offset, tokens, block_q
    )
    return x


def norm_rope_mean(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor,
    similarity: Tensor | None = None,
    *,
    block: int,
    eps: float = 1e-6,
    row_offset: int = 0,
) -> Tensor:
    """norm_rope on all of x, then block_mean of the result: on a GPU in one read and one write.

    x, weight, cos, sin, eps, row_offset: as norm_rope takes them, but for norms over all heads. Blocks of
        `block` tokens are counted from x's first row.
    mean: float32 [B, ceil(N / block), H, D], similarity: float32 [B, ceil(N / block), H] or None; both
        written. Means are of x's rounded values, as attention sees them.

    Returns x. Raises ValueError, TypeError or NotImplementedError that names the argument, RuntimeError for
    tensors that require grad.
    """
    direct = _NORM_MEAN.is_direct((x, weight, cos, sin, mean, similarity))
    expect_dims("x", x, "B, N, H, D")
    expect_integer("row_offset", row_offset)
    expect_integer("block", block)
    tokens = row_offset + x.shape[1] if cos is None else cos.shape[0]
    (_NORM_MEAN.invoke if direct else _norm_mean_operator)(
        x, weight, cos, sin, mean, similarity, eps, row_offset, tokens, block
    )
    return x


def _expect_both_parts(symbols: SparseSymbols) -> None:
    expect_symbols(symbols)
    if symbols.cache is None or symbols.skip is None:
        raise ValueError("symbols: expected both cache and skip bits, got None")
    if symbols.cache_indptr is not None or symbols.skip_indptr is not None:
        raise ValueError("symbols: expected [batch, bytes] without indptr, got ragged bits")
