"""The adaptive norm before a DiT block's projections (adaLN, arXiv 2212.09748)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.ops._dispatch import Native, define, expect_dims, no_result

_NATIVE = Native("ada_layer_norm", "x, scale, shift, out?")


_operator = define(
    "ada_layer_norm(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out, float eps) -> ()",
    _NATIVE.invoke,
    no_result,
)


def ada_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift, the norm over the last dimension and without weights of its own.

    x, out: [B, M, C], any strides whose last is 1; scale, shift: [B, C]. float32 (CPU), float16 or bfloat16,
        one dtype for all; rounded once, at the end. On a GPU C is at most 12,288.

    Returns out, a new tensor unless given. Raises ValueError, TypeError or NotImplementedError that names the
    argument, RuntimeError for tensors that require grad.
    """
    direct = _NATIVE.is_direct((x, scale, shift, out))
    expect_dims("x", x, "B, M, C")
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (_NATIVE.invoke if direct else _operator)(x, scale, shift, out, eps)
    return out
