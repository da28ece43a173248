"""Forecasting a feature over the steps between two Updates (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni.ops._dispatch import Native, define, expect_integer, no_result, orders

_ORDERS = 4
SCALE_COLUMNS = 128  # of a row of a quantised tensor, that share a scale

_UPDATE = Native("taylor_update", "feature, derivatives, derivatives?, derivatives?, derivatives?")
_FORECAST = Native(
    "taylor_forecast",
    "derivatives, derivatives?, derivatives?, derivatives?, scales?, scales?, scales?, scales?, "
    "coefficients, out?",
)
_QUANTIZE = Native("quantize_fp8", "x, values?, scales?")


def _call_update(feature: Tensor, derivatives: Sequence[Tensor], gap: float, valid: int) -> None:
    padded = (*derivatives, *(None,) * (_ORDERS - len(derivatives)))
    _UPDATE.invoke(feature, feature, *padded, gap, valid)


def _call_forecast(
    derivatives: Sequence[Tensor], scales: Sequence[Tensor], coefficients: Tensor, out: Tensor
) -> None:
    padded = (*derivatives, *(None,) * (_ORDERS - len(derivatives)))
    padded_scales = (*scales, *(None,) * (_ORDERS - len(scales)))
    _FORECAST.invoke(out, *padded, *padded_scales, coefficients, out)


def _call_quantize(x: Tensor, values: Tensor, scales: Tensor) -> None:
    _QUANTIZE.invoke(x, x, values, scales)


_update_operator = define(
    "taylor_update(Tensor feature, Tensor(a!)[] derivatives, float gap, int valid) -> ()",
    _call_update,
    no_result,
)
_forecast_operator = define(
    "taylor_forecast(Tensor[] derivatives, Tensor[] scales, Tensor coefficients, Tensor(a!) out) -> ()",
    _call_forecast,
    no_result,
)
_quantize_operator = define(
    "quantize_fp8(Tensor x, Tensor(a!) values, Tensor(b!) scales) -> ()", _call_quantize, no_result
)


def taylor_update(feature: Tensor, derivatives: Sequence[Tensor], *, gap: float, valid: int) -> None:
    """Finite differences at an Update.

    new[0] = feature; new[i + 1] = (new[i] - old[i]) / gap for i < valid, 0 above.

    derivatives: D + 1 tensors of feature's shape and dtype, D <= 3; old in, new out.
    gap: steps since the previous recorded step. valid: how many differences the history supports, 0 at first.

    Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require grad.
    """
    direct = _UPDATE.is_direct((feature, *orders("derivatives", derivatives, 1, _ORDERS)))
    expect_integer("valid", valid)
    (_call_update if direct else _update_operator)(feature, list(derivatives), gap, valid)


def taylor_forecast(
    derivatives: Sequence[Tensor],
    coefficients: Tensor,
    out: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """out = sum_i coefficients[i] * derivatives[i].

    derivatives: D + 1 tensors of one shape and dtype, D <= 3; coefficients: float32 [D + 1] on their device.
    scales: those of quantize_fp8, one a derivative, where the derivatives are its values; `out` must be given
        then.

    Returns out. Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require
    grad.
    """
    all_derivatives = orders("derivatives", derivatives, 1, _ORDERS)
    scaled = [] if scales is None else list(scales)
    if scaled:
        orders("scales", scaled, len(derivatives), len(derivatives))
    all_scales = orders("scales", scaled, 0, _ORDERS)
    direct = _FORECAST.is_direct((*all_derivatives, *all_scales, coefficients, out))
    parts = [_bits(part) for part in derivatives] if scaled else list(derivatives)
    if out is None:
        if scaled:
            raise TypeError("out: expected a tensor, as the derivatives are quantised, got None")
        out = torch.empty_like(derivatives[0], memory_format=torch.contiguous_format)
    (_call_forecast if direct else _forecast_operator)(parts, scaled, coefficients, out)
    return out


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
    (_call_quantize if direct else _quantize_operator)(x, _bits(values, "values"), scales)
    return values, scales


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape."""
    return (*shape[:-1], -(-shape[-1] // SCALE_COLUMNS))


def _bits(values: Tensor, name: str = "derivatives") -> Tensor:
    """float8 as the library takes it: its bytes."""
    if values.dtype is not torch.float8_e4m3fn:
        raise TypeError(f"{name}: expected float8_e4m3fn, got {str(values.dtype).removeprefix('torch.')}")
    return values.view(torch.uint8)
