"""Bit packing with numpy's semantics, for tensors on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni._native import library
from flashomni.ops._dispatch import define, describe, is_direct


def _call_pack(values: Tensor, little: bool) -> Tensor:
    out = torch.empty(-(-values.shape[0] // 8), dtype=torch.uint8, device=values.device)
    library.packbits(values, out, little)
    return out


def _fake_pack(values: Tensor, little: bool) -> Tensor:
    return values.new_empty((values.shape[0] + 7) // 8, dtype=torch.uint8)


def _call_segments(values: Tensor, indptr: Tensor, little: bool) -> tuple[Tensor, Tensor]:
    total = int(((indptr.diff() + 7) // 8).clamp(min=0).sum())
    out = torch.empty(total, dtype=torch.uint8, device=values.device)
    out_indptr = torch.empty_like(indptr)
    library.segment_packbits(values, indptr, out, out_indptr, little)
    return out, out_indptr


def _fake_segments(values: Tensor, indptr: Tensor, little: bool) -> tuple[Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty(total, dtype=torch.uint8), torch.empty_like(indptr)


_pack_operator = define("packbits(Tensor values, bool little) -> Tensor", _call_pack, _fake_pack)
_segments_operator = define(
    "segment_packbits(Tensor values, Tensor indptr, bool little) -> (Tensor, Tensor)",
    _call_segments,
    _fake_segments,
)


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """numpy.packbits of the flattened x: non-zero is 1; uint8 [ceil(x.numel() / 8)], padded with 0.

    x: bool or integers of any shape. bitorder: "big" or "little" (the operators' own). TypeError for floats,
    ValueError for another bitorder.
    """
    direct = is_direct(("x",), (x,), 1)
    little = _is_little(bitorder)
    return (_call_pack if direct else _pack_operator)(_as_bytes(x), little)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """packbits of each segment of x, each to whole bytes.

    x: bool or integers [total]; indptr: int32 [segments + 1], where each segment starts. Returns (uint8
    bytes, int32 [segments + 1] where each segment's bytes start). Errors as packbits', and ValueError where
    indptr does not fit.
    """
    direct = is_direct(("x", "indptr"), (x, indptr), 2)
    little = _is_little(bitorder)
    if indptr.dtype != torch.int32 or indptr.ndim != 1 or indptr.shape[0] < 1:
        raise ValueError(f"indptr: expected int32[segments + 1], got {describe(indptr)}")
    return (_call_segments if direct else _segments_operator)(_as_bytes(x), indptr.contiguous(), little)


def _is_little(bitorder: str) -> bool:
    if bitorder not in ("big", "little"):
        raise ValueError(f'bitorder: expected "big" or "little", got {bitorder!r}')
    return bitorder == "little"


def _as_bytes(x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"x: expected bool or integers, got {describe(x)}")
    return (x.reshape(-1) != 0).view(torch.uint8)
