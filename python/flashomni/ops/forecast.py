"""Forecasting a feature over the steps between two Updates (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni.ops._dispatch import (
    Native,
    define,
    expect,
    expect_dims,
    expect_integer,
    no_result,
    orders,
    tile_arguments,
)
from flashomni.symbols import SparseSymbols

_ORDERS = 4
SCALE_COLUMNS = 128  # of a row of a quantised tensor, that share a scale
_ROWS = {"cached": 1, "active": 2}  # the native library's 0: all of them

_KEPT = "derivatives, derivatives?, derivatives?, derivatives?, scales?, scales?, scales?, scales?"
_UPDATE = Native("taylor_update", f"feature, {_KEPT}, last?")
_FORECAST = Native("taylor_forecast", f"{_KEPT}, coefficients, symbols.cache?, symbols.cache_indptr?, out?")
_QUANTIZE = Native("quantize_fp8", "x, values?, scales?")


def _padded(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return (*tensors, *(None,) * (_ORDERS - len(tensors)))


def _call_update(
    feature: Tensor,
    derivatives: Sequence[Tensor],
    scales: Sequence[Tensor],
    last: Tensor | None,
    gap: float,
    valid: int,
) -> None:
    _UPDATE.invoke(feature, *_padded(derivatives), *_padded(scales), last, gap, valid)


def _call_forecast(
    derivatives: Sequence[Tensor],
    scales: Sequence[Tensor],
    coefficients: Tensor,
    cache: Tensor | None,
    cache_indptr: Tensor | None,
    out: Tensor,
    *numbers: int,
) -> None:
    kept = (*_padded(derivatives), *_padded(scales))
    _FORECAST.invoke(*kept, coefficients, cache, cache_indptr, out, *numbers)


_update_operator = define(
    "taylor_update(Tensor feature, Tensor(a!)[] derivatives, Tensor(b!)[] scales, Tensor(c!)? last, "
    "float gap, int valid) -> ()",
    _call_update,
    no_result,
)
_forecast_operator = define(
    "taylor_forecast(Tensor[] derivatives, Tensor[] scales, Tensor coefficients, Tensor? cache, "
    "Tensor? cache_indptr, Tensor(a!) out, int heads, int tokens, int row_offset, int block_q, int rows) "
    "-> ()",
    _call_forecast,
    no_result,
)
_quantize_operator = define(
    "quantize_fp8(Tensor x, Tensor(a!) values, Tensor(b!) scales) -> ()", _QUANTIZE.invoke, no_result
)


def taylor_update(
    feature: Tensor,
    derivatives: Sequence[Tensor],
    *,
    gap: float,
    valid: int,
    scales: Sequence[Tensor] | None = None,
    last: Tensor | None = None,
) -> None:
    """Finite differences at an Update.

    new[0] = feature; new[i + 1] = (new[i] - old[i]) / gap for i < valid, 0 above.

    derivatives: 1 to 4 tensors of feature's shape and dtype; old in, new out.
    gap: steps since the previous recorded step. valid: how many differences the history supports, 0 at first;
        less than there are derivatives, or as many if `last` is given.
    scales: where the derivatives are kept as quantize_fp8 makes them, one a derivative; old in, new out as
        well. A difference is of the new[i] that has not been quantised yet.
    last: of feature's shape and dtype; receives the difference one order above the derivatives', as it is.

    Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require grad.
    """
    parts, scaled, tensors = _kept(derivatives, scales)
    direct = _UPDATE.is_direct((feature, *tensors, last))
    expect_integer("valid", valid)
    (_call_update if direct else _update_operator)(feature, parts, scaled, last, gap, valid)


def taylor_forecast(
    derivatives: Sequence[Tensor],
    coefficients: Tensor,
    out: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    symbols: SparseSymbols | None = None,
    *,
    row_offset: int = 0,
    rows: str = "cached",
) -> Tensor:
    """out = sum_i coefficients[i] * derivatives[i], on all rows or on some row blocks' alone.

    derivatives: D + 1 tensors of one shape and dtype, D <= 3; coefficients: float32 [D + 1] on their device.
    scales: those of quantize_fp8, one a derivative, where the derivatives are its values; `out` must be given
        then.
    symbols: with one head, whose cache bits say which row blocks are active. Tensors are [B, M, N] then, rows
        row_offset..row_offset + M of the joint sequence that the symbols describe.
    rows: which row blocks are forecast, "cached" or "active"; the rows of the others are not read, and stay
        as they were in `out` (zero where this allocates it). Without symbols all rows are.

    Returns out. Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require
    grad.
    """
    if rows not in _ROWS:
        raise ValueError(f'rows: expected "cached" or "active", got {rows!r}')
    parts, scaled, tensors = _kept(derivatives, scales)
    cache, cache_indptr = tile_arguments(symbols)
    direct = _FORECAST.is_direct((*tensors, coefficients, cache, cache_indptr, out))
    geometry = _geometry(symbols, derivatives[0], row_offset, rows)
    if out is None:
        if scaled:
            raise TypeError("out: expected a tensor, as the derivatives are quantised, got None")
        make = torch.empty_like if symbols is None else torch.zeros_like
        out = make(derivatives[0], memory_format=torch.contiguous_format)
    (_call_forecast if direct else _forecast_operator)(
        parts, scaled, coefficients, cache, cache_indptr, out, *geometry
    )
    return out


def _kept(
    derivatives: Sequence[Tensor], scales: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor | None, ...]]:
    """(what the library takes of the derivatives, their scales, both as so many arguments)."""
    all_derivatives = orders("derivatives", derivatives, 1, _ORDERS)
    if scales is None:
        return list(derivatives), [], (*all_derivatives, *(None,) * _ORDERS)
    orders("scales", scales, len(derivatives), len(derivatives))
    tensors = (*all_derivatives, *_padded(scales))
    return [_bits(part) for part in derivatives], list(scales), tensors


def _geometry(
    symbols: SparseSymbols | None, x: Tensor, row_offset: int, rows: str
) -> tuple[int, int, int, int, int]:
    """(heads, tokens, row_offset, block_q) of the joint sequence that x's rows lie in, and which rows."""
    expect_integer("row_offset", row_offset)
    if symbols is None:
        return 1, 0, row_offset, 128, 0
    expect_dims("derivatives", x, "B, M, N")
    expect("symbols.heads", "as a row block has one bit", symbols.heads, 1)
    expect("symbols.batch", "as in the derivatives", symbols.batch, x.shape[0])
    return 1, symbols.q_tokens, row_offset, symbols.block_q, _ROWS[rows]


def quantize_fp8(
    x: Tensor, values: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x / scale as float8_e4m3fn, each run of 128 columns of a row with a scale of its own: its largest
    magnitude / 448.

    x: [.., W] of any float type. values: float8_e4m3fn of x's shape, scales: float32 [.., ceil(W / 128)], to
        write into; new ones unless given.

    Rounds to the nearest, ties to even. A run with an infinity reads back as NaN. taylor_forecast reads the
    result. Returns (values, scales). Raises ValueError or TypeError that names the argument, RuntimeError for
    tensors that require grad.
    """
    direct = _QUANTIZE.is_direct((x, values, scales))
    if x.ndim == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if values is None:
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    if scales is None:
        scales = torch.empty(scales_shape(x.shape), dtype=torch.float32, device=x.device)
    (_QUANTIZE.invoke if direct else _quantize_operator)(x, _bits(values, "values"), scales)
    return values, scales


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape."""
    return (*shape[:-1], -(-shape[-1] // SCALE_COLUMNS))


def _bits(values: Tensor, name: str = "derivatives") -> Tensor:
    """float8 as the library takes it: its bytes."""
    if values.dtype is not torch.float8_e4m3fn:
        raise TypeError(f"{name}: expected float8_e4m3fn, got {str(values.dtype).removeprefix('torch.')}")
    return values.view(torch.uint8)
