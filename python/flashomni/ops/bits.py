"""Bit packing with numpy's semantics."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashomni._native import library
from flashomni.ops._dispatch import check_tensors, define, describe


def _call_pack(values: Tensor, little: bool) -> Tensor:
    if not values.is_cpu:
        return _pack_rows(values, little)
    out = torch.empty(-(-values.shape[0] // 8), dtype=torch.uint8, device=values.device)
    library.packbits(values, out, little)
    return out


def _fake_pack(values: Tensor, little: bool) -> Tensor:
    return values.new_empty((values.shape[0] + 7) // 8, dtype=torch.uint8)


def _call_segments(values: Tensor, indptr: Tensor, little: bool) -> tuple[Tensor, Tensor]:
    if not values.is_cpu:
        return _pack_segments(values, indptr, little)
    total = int(((indptr.diff() + 7) // 8).clamp(min=0).sum())
    out = torch.empty(total, dtype=torch.uint8, device=values.device)
    out_indptr = torch.empty_like(indptr)
    library.segment_packbits(values, indptr, out, out_indptr, little)
    return out, out_indptr


def _fake_segments(values: Tensor, indptr: Tensor, little: bool) -> tuple[Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty(total, dtype=torch.uint8), torch.empty_like(indptr)


def _pack_rows(values: Tensor, little: bool) -> Tensor:
    """Bytes of 0 or 1 [..., n] -> uint8 [..., ceil(n / 8)], in torch: on whatever device they lie."""
    octets = torch.nn.functional.pad(values, (0, -values.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    return (octets << (places if little else 7 - places)).sum(-1, dtype=torch.uint8)


def _pack_segments(values: Tensor, indptr: Tensor, little: bool) -> tuple[Tensor, Tensor]:
    """segment_packbits in torch. The result's size depends on indptr, so its device is waited for."""
    ends = indptr.tolist()
    if ends[0] < 0 or ends[-1] > values.shape[0] or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"indptr: expected ascending offsets within x's {values.shape[0]}, got {ends}")
    sizes = [-(-(b - a) // 8) for a, b in pairwise(ends)]
    packed = [_pack_rows(values[a:b], little) for a, b in pairwise(ends)]
    out_indptr = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(indptr.device)
    return torch.cat([values.new_empty(0), *packed]), out_indptr


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
    direct = check_tensors(("x",), (x,), (0,))
    little = _is_little(bitorder)
    return (_call_pack if direct else _pack_operator)(_as_bytes(x), little)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """packbits of each segment of x, each to whole bytes.

    x: bool or integers [total]; indptr: int32 [segments + 1] on x's device, where each segment starts.
    Returns (uint8 bytes, int32 [segments + 1] where each segment's bytes start). On a GPU it waits for
    indptr. Errors as packbits', and ValueError where indptr does not fit.
    """
    direct = check_tensors(("x", "indptr"), (x, indptr), (0, 1))
    little = _is_little(bitorder)
    if indptr.device != x.device:
        raise ValueError(f"indptr: expected a tensor on {x.device}, as x is, got one on {indptr.device}")
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
