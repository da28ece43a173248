"""The sparse linear layers of an attention block: GEMM-Q before it, GEMM-O after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashomni.ops._dispatch import (
    Native,
    define,
    expect,
    expect_bool,
    expect_dims,
    expect_integer,
    new_output,
    no_result,
    orders,
    tile_arguments,
)
from flashomni.symbols import SparseSymbols

_ORDERS = 4
_ACTIVATIONS = {None: 0, "gelu_tanh": 1, "gelu": 2}
_Q = Native("gemm_q", "x, weight, bias?, symbols.cache?, symbols.cache_indptr?, out?", counts=True)
_UPDATE = Native(
    "gemm_o_update",
    "o, derivatives?, derivatives?, derivatives?, past?, weight, bias?, symbols.cache?, "
    "symbols.cache_indptr?, out?, cached?, cached?, cached?, cached?",
    counts=True,
)
_DISPATCH = Native(
    "gemm_o_dispatch",
    "o, past?, weight, cached, cached?, cached?, cached?, coefficients, symbols.cache?, "
    "symbols.cache_indptr?, out?",
    counts=True,
)


def _call_update(
    o: Sequence[Tensor],
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    cache_indptr: Tensor | None,
    out: Tensor,
    cached: Sequence[Tensor],
    *numbers: int,
) -> None:
    o = (*o, *(None,) * (_ORDERS - len(o)))
    cached = (*cached, *(None,) * (_ORDERS - len(cached)))
    _UPDATE.invoke(*o, past, weight, bias, cache, cache_indptr, out, *cached, *numbers)


def _call_dispatch(
    o: Tensor,
    past: Tensor | None,
    weight: Tensor,
    cached: Sequence[Tensor],
    coefficients: Tensor,
    cache: Tensor | None,
    cache_indptr: Tensor | None,
    out: Tensor,
    *numbers: int | bool,
) -> None:
    cached = (*cached, *(None,) * (_ORDERS - len(cached)))
    _DISPATCH.invoke(o, past, weight, *cached, coefficients, cache, cache_indptr, out, *numbers)


_q_operator = define(
    "gemm_q(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? cache_indptr, Tensor(a!) out, "
    "int heads, int tokens, int row_offset, int block_q, int activation) -> ()",
    _Q.invoke,
    no_result,
)
_update_operator = define(
    "gemm_o_update(Tensor[] o, Tensor? past, Tensor weight, Tensor? bias, Tensor? cache, "
    "Tensor? cache_indptr, Tensor(a!) out, Tensor(b!)[] cached, int head_dim, int heads, "
    "int tokens, int row_offset, int block_q, bool keep_rows) -> ()",
    _call_update,
    no_result,
)
_dispatch_operator = define(
    "gemm_o_dispatch(Tensor o, Tensor? past, Tensor weight, Tensor[] cached, Tensor coefficients, "
    "Tensor? cache, Tensor? cache_indptr, Tensor(a!) out, int head_dim, int heads, "
    "int tokens, int row_offset, int block_q, bool keep_rows) -> ()",
    _call_dispatch,
    no_result,
)


def gemm_q(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    symbols: SparseSymbols | None = None,
    *,
    heads: int | None = None,
    row_offset: int = 0,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias), on the active (row block, head) tiles only.

    x: [B, M, K], rows row_offset..row_offset + M of the joint sequence that the symbols describe; weight: [N,
        K], N a multiple of the heads; bias: [N]. float32 (CPU), float16 or bfloat16, one dtype for all.
    symbols: their cache bits; with one head, whole row blocks are computed or not. heads: the symbols' unless
        given (1 without symbols).
    activation: None, "gelu" or "gelu_tanh".
    out: [B, M, N]; cached tiles stay as they were (zero where this allocates it).

    Returns out. Raises ValueError, TypeError or NotImplementedError that names the argument, RuntimeError for
    tensors that require grad.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation: expected None, "gelu" or "gelu_tanh", got {activation!r}')
    cache, cache_indptr = tile_arguments(symbols)
    direct = _Q.is_direct((x, weight, bias, cache, cache_indptr, out))
    expect_dims("x", x, "B, M, K")
    expect_dims("weight", weight, "N, K")
    heads, *geometry = _geometry(symbols, x, 1 if heads is None and symbols is None else heads, row_offset)
    if out is None:
        out = new_output((x.shape[0], x.shape[1], weight.shape[0]), x, cache)
    (_Q.invoke if direct else _q_operator)(
        x, weight, bias, cache, cache_indptr, out, heads, *geometry, _ACTIVATIONS[activation]
    )
    return out


def gemm_o_update(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: SparseSymbols | None,
    *,
    head_dim: int,
    row_offset: int = 0,
    derivatives: Sequence[Tensor] = (),
    past: Tensor | None = None,
    keep_rows: bool = False,
    out: Tensor | None = None,
    cached: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """GEMM-O at an Update: the dense result, and what Dispatch steps need of the cached heads.

    cached[i] = (bias if i == 0) + sum over cached heads of (i-th derivative of o)_h W_h^T
    out = cached[0] + sum over active heads of o_h W_h^T + the columns past the heads

    o: [B, M, K], K >= heads * head_dim; further columns (a single block's MLP) are always active. past: those
        columns in a tensor of their own, [B, M, K'], where o has the heads alone. weight: [N, K + K'];
        bias: [N]. derivatives: the differences of order 1..D of o, D <= 3, [B, M, >= heads * head_dim] each.
    symbols: their cache bits; rows as in gemm_q. out, cached: [B, M, N], D + 1 of the latter.
    keep_rows: as the Dispatch steps to come have it: no cached tensor is computed or written in rows of row
        blocks without an active head (zero where this allocates it).

    Returns (out, cached). Raises ValueError, TypeError or NotImplementedError that names the argument,
    RuntimeError for tensors that require grad.
    """
    derivatives = tuple(derivatives)
    expect_bool("keep_rows", keep_rows)
    all_derivatives = orders("derivatives", derivatives, 0, _ORDERS - 1)
    given = () if cached is None else tuple(cached)
    if cached is not None:
        orders("cached", given, len(derivatives) + 1, len(derivatives) + 1)
    cache, cache_indptr = tile_arguments(symbols)
    direct = _UPDATE.is_direct((o, *all_derivatives, past, weight, bias, cache, cache_indptr, out, *given))
    expect_dims("o", o, "B, M, K")
    expect_dims("weight", weight, "N, K")
    if past is not None:
        expect_dims("past", past, "B, M, K'")
    geometry = _geometry(symbols, o, _heads_of(symbols, o, head_dim), row_offset)
    shape = (o.shape[0], o.shape[1], weight.shape[0])
    if out is None:
        out = new_output(shape, o, None)
    kept = cache if keep_rows else None
    result = list(given) if given else [new_output(shape, o, kept) for _ in range(len(derivatives) + 1)]
    (_call_update if direct else _update_operator)(
        *([o, *derivatives], past, weight, bias, cache, cache_indptr, out, result),
        *(head_dim, *geometry, keep_rows),
    )
    return out, result


def gemm_o_dispatch(
    o: Tensor,
    weight: Tensor,
    cached: Sequence[Tensor],
    coefficients: Tensor,
    symbols: SparseSymbols | None,
    *,
    head_dim: int,
    row_offset: int = 0,
    past: Tensor | None = None,
    keep_rows: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """GEMM-O at a Dispatch.

    out = sum_i coefficients[i] cached[i] + sum over active heads of o_h W_h^T + the columns past the heads

    o, past, weight, symbols: as in gemm_o_update; the bias is inside cached[0], o's cached tiles are not
    read.
    cached: D + 1 tensors [B, M, N] from gemm_o_update; coefficients: float32 [D + 1] on the tensors' device
    (flashomni.schedule.coefficients). out: [B, M, N].
    keep_rows: rows of row blocks without an active head are neither computed nor written: they stay as they
        were in `out` (zero where this allocates it).

    Returns out. Raises ValueError, TypeError or NotImplementedError that names the argument, RuntimeError for
    tensors that require grad.
    """
    cached = tuple(cached) if not isinstance(cached, Tensor) else cached
    all_cached = orders("cached", cached, 1, _ORDERS)
    expect_bool("keep_rows", keep_rows)
    cache, cache_indptr = tile_arguments(symbols)
    direct = _DISPATCH.is_direct((o, past, weight, *all_cached, coefficients, cache, cache_indptr, out))
    expect_dims("o", o, "B, M, K")
    expect_dims("weight", weight, "N, K")
    if past is not None:
        expect_dims("past", past, "B, M, K'")
    geometry = _geometry(symbols, o, _heads_of(symbols, o, head_dim), row_offset)
    if out is None:
        out = new_output((o.shape[0], o.shape[1], weight.shape[0]), o, cache if keep_rows else None)
    rest = (coefficients, cache, cache_indptr, out, head_dim, *geometry, keep_rows)
    if direct:
        _DISPATCH.invoke(o, past, weight, *all_cached, *rest)
    else:
        _dispatch_operator(o, past, weight, list(cached), *rest)
    return out


def _heads_of(symbols: SparseSymbols | None, o: Tensor, head_dim: int) -> int:
    expect_integer("head_dim", head_dim)
    if head_dim < 1:
        raise ValueError(f"head_dim: expected at least 1, got {head_dim}")
    # Without symbols every head is active, as the columns past the heads are: any number of them will do.
    return symbols.heads if symbols is not None else max(1, o.shape[2] // head_dim)


def _geometry(
    symbols: SparseSymbols | None, x: Tensor, heads: int | None, row_offset: int
) -> tuple[int, int, int, int]:
    """(heads, tokens, row_offset, block_q) of the joint sequence that x's rows lie in."""
    expect_integer("row_offset", row_offset)
    if symbols is None:
        return heads, row_offset + x.shape[1], row_offset, 128
    expect("heads", "as in symbols", symbols.heads if heads is None else heads, symbols.heads)
    expect("symbols.batch", "as in the matrix", symbols.batch, x.shape[0])
    return symbols.heads, symbols.q_tokens, row_offset, symbols.block_q
