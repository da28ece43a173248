"""Forecasting a feature over the steps between two Updates (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni.ops._dispatch import define, expect_integer, invoke, is_direct, no_result, orders

_ORDERS = 4


def _call_update(feature: Tensor, derivatives: Sequence[Tensor], gap: float, valid: int) -> None:
    padded = (*derivatives, *(None,) * (_ORDERS - len(derivatives)))
    invoke("taylor_update", feature, feature, *padded, gap, valid)


def _call_forecast(derivatives: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    padded = (*derivatives, *(None,) * (_ORDERS - len(derivatives)))
    invoke("taylor_forecast", out, *padded, coefficients, out)


_update_operator = define(
    "taylor_update(Tensor feature, Tensor(a!)[] derivatives, float gap, int valid) -> ()",
    _call_update,
    no_result,
)
_forecast_operator = define(
    "taylor_forecast(Tensor[] derivatives, Tensor coefficients, Tensor(a!) out) -> ()",
    _call_forecast,
    no_result,
)


def taylor_update(feature: Tensor, derivatives: Sequence[Tensor], *, gap: float, valid: int) -> None:
    """Finite differences at an Update.

    new[0] = feature; new[i + 1] = (new[i] - old[i]) / gap for i < valid, 0 above.

    derivatives: D + 1 tensors of feature's shape and dtype, D <= 3; old in, new out.
    gap: steps since the previous recorded step. valid: how many differences the history supports, 0 at first.

    Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require grad.
    """
    orders("derivatives", derivatives, 1, _ORDERS)
    names = ("feature", *("derivatives",) * len(derivatives))
    direct = is_direct(names, (feature, *derivatives), 1)
    expect_integer("valid", valid)
    (_call_update if direct else _update_operator)(feature, list(derivatives), gap, valid)


def taylor_forecast(derivatives: Sequence[Tensor], coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """out = sum_i coefficients[i] * derivatives[i].

    derivatives: D + 1 tensors of one shape and dtype, D <= 3; coefficients: float32 [D + 1] on their device.

    Returns out. Raises ValueError or TypeError that names the argument, RuntimeError for tensors that require
    grad.
    """
    orders("derivatives", derivatives, 1, _ORDERS)
    names = ("coefficients", "out", *("derivatives",) * len(derivatives))
    direct = is_direct(names, (coefficients, out, *derivatives), 1)
    if out is None:
        out = torch.empty_like(derivatives[0], memory_format=torch.contiguous_format)
    (_call_forecast if direct else _forecast_operator)(list(derivatives), coefficients, out)
    return out
