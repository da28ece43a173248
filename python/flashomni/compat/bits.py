"""Published bits as SparseSymbols, and errors under the published names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from flashomni.ops._dispatch import describe
from flashomni.symbols import SparseSymbols, unpack

_SYMBOLS = {
    "symbols.cache_indptr": "sparse_info_indptr",
    "symbols.skip_indptr": "sparse_kv_info_indptr",
    "symbols.cache": "sparse_info",
    "symbols.skip": "sparse_kv_info",
}


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """`error`, from one of our operators, with the argument at its head under its published name."""
    message = str(error)
    for ours, published in _SYMBOLS.items():
        message = message.replace(ours, published)
    head = re.match(r"[\w\[\]]+", message)
    if head and head[0] in names and message[head.end() :].startswith(":"):
        message = names[head[0]] + message[head.end() :]
    return type(error)(message)


def expect_bits(name: str, bits: Tensor, indptr: Tensor | None, batch: int) -> None:
    """TypeError or ValueError unless bits are uint8 [bytes] with indptr int32 [batch + 1], or [batch, bytes].

    Of one element, [bytes] needs no indptr.
    """
    for part, tensor, dtype in ((name, bits, torch.uint8), (f"{name}_indptr", indptr, torch.int32)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{part}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{part}: expected {str(dtype).removeprefix('torch.')}, got {describe(tensor)}")
    if indptr is not None:
        if bits.ndim != 1:
            raise ValueError(
                f"{name}: expected uint8[bytes], as {name}_indptr is given, got {describe(bits)}"
            )
        if tuple(indptr.shape) != (batch + 1,):
            raise ValueError(f"{name}_indptr: expected int32[{batch + 1}], got {describe(indptr)}")
    elif bits.ndim == 1 and batch > 1:
        raise ValueError(f"{name}_indptr: expected int32[{batch + 1}] for a batch of {batch}, got None")
    elif bits.ndim not in (1, 2) or (bits.ndim == 2 and bits.shape[0] != batch):
        raise ValueError(f"{name}: expected uint8[bytes] or uint8[{batch}, bytes], got {describe(bits)}")


def expect_no_indptr(name: str, bits: Tensor | None, indptr: Tensor | None) -> None:
    if bits is None and indptr is not None:
        raise ValueError(f"{name}_indptr: expected None, as {name} is None, got {describe(indptr)}")


def element_bits(name: str, bits: Tensor, indptr: Tensor | None, index: int, count: int) -> Tensor:
    """The `count` bits of one batch element as bool [count]. On a GPU without waiting for it."""
    size = -(-count // 8)
    if indptr is None:
        packed = bits if bits.ndim == 1 else bits[index]
        _expect_size(name, index, size, packed.shape[0])
    else:
        if indptr.is_cpu:
            begin, end = indptr[index : index + 2].tolist()
            _expect_size(name, index, size, min(end, bits.shape[0]) - begin)
        packed = bits[indptr[index] + torch.arange(size, device=bits.device)]
    return unpack(packed, count)


def row_symbols(
    bits: Tensor, indptr: Tensor | None, batch: int, heads: int, tokens: int, block: int
) -> SparseSymbols:
    """Cache bits of sequences of at least `tokens` tokens as symbols of exactly as many.

    The index of a bit does not depend on the length, so what describes later tokens is left out.
    """
    expect_bits("sparse_info", bits, indptr, batch)
    size = -(-(-(-tokens // block) * heads) // 8)
    if indptr is not None and indptr.is_cpu and bits.is_cpu:
        starts = indptr.tolist()
        for b in range(batch):
            _expect_size("sparse_info", b, size, min(starts[b + 1], bits.shape[0]) - starts[b], "at least ")
        bits, indptr = torch.stack([bits[start : start + size] for start in starts[:-1]]), None
    elif indptr is None:
        bits = bits if bits.ndim == 2 else bits[None]
        _expect_size("sparse_info", 0, size, bits.shape[1], "at least ")
        bits = bits[:, :size]
    return SparseSymbols(bits, None, batch, heads, tokens, tokens, block, block, cache_indptr=indptr)


def _expect_size(name: str, element: int, size: int, got: int, relation: str = "") -> None:
    if got < size or (not relation and got != size):
        raise ValueError(f"{name}: expected {relation}{size} bytes for batch element {element}, got {got}")
