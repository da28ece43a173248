"""Sparse symbols: the bits that say what is computed, reused or skipped. Pure torch, on any device.

1 = compute, 0 = reuse (cache bits) or skip (skip bits); packed little-endian, 8 to a byte; each batch element
starts on a byte (arXiv 2509.25401). Bit index in a batch element:

    cache: q_block * heads + head
    skip: (q_block * heads + head) * kv_blocks + kv_block
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def pack(bits: Tensor) -> Tensor:
    """Packs the last axis: bool [..., n] -> uint8 [..., ceil(n / 8)], little-endian, padding bits 0."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    octets = padded.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return octets.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., bytes] -> bool [..., count]."""
    octets = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (octets & 1).flatten(-2)[..., :count].bool()


@dataclass(eq=False)
class SparseSymbols:
    """Packed symbols with the geometry that they describe.

    cache: uint8 [batch, cache_bytes], or [bytes] with cache_indptr; None: every tile computes.
    skip: uint8 [batch, skip_bytes], or [bytes] with skip_indptr; None: no block is skipped.
    q_tokens, kv_tokens: lengths of the sequences; block_q, block_kv: tokens a block.
    cache_indptr, skip_indptr: int32 [batch + 1], the byte where each element starts. Where elements differ in
    length, q_tokens and kv_tokens are the longest's; operators read such bits, masks() and its users cannot.

    Raises ValueError or TypeError that names the field when the parts do not fit together.
    """

    cache: Tensor | None
    skip: Tensor | None
    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    block_q: int = 128
    block_kv: int = 128
    cache_indptr: Tensor | None = None
    skip_indptr: Tensor | None = None

    def __post_init__(self) -> None:
        self.check()

    @property
    def q_blocks(self) -> int:
        return -(-self.q_tokens // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_tokens // self.block_kv)

    @property
    def cache_bytes(self) -> int:
        """Bytes of cache bits a batch element."""
        return -(-self.q_blocks * self.heads // 8)

    @property
    def skip_bytes(self) -> int:
        """Bytes of skip bits a batch element."""
        return -(-self.q_blocks * self.heads * self.kv_blocks // 8)

    @classmethod
    def ones(
        cls,
        batch: int,
        heads: int,
        q_tokens: int,
        kv_tokens: int,
        block_q: int = 128,
        block_kv: int = 128,
        device: torch.device | str = "cpu",
    ) -> SparseSymbols:
        """Everything computes. The bits are there to be written."""
        return cls._filled(True, batch, heads, q_tokens, kv_tokens, block_q, block_kv, device)

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        q_tokens: int,
        kv_tokens: int,
        block_q: int = 128,
        block_kv: int = 128,
        device: torch.device | str = "cpu",
    ) -> SparseSymbols:
        """Everything is reused."""
        return cls._filled(False, batch, heads, q_tokens, kv_tokens, block_q, block_kv, device)

    @classmethod
    def _filled(
        cls,
        value: bool,
        batch: int,
        heads: int,
        q_tokens: int,
        kv_tokens: int,
        block_q: int,
        block_kv: int,
        device: torch.device | str,
    ) -> SparseSymbols:
        symbols = cls(None, None, batch, heads, q_tokens, kv_tokens, block_q, block_kv)
        rows = symbols.q_blocks * heads
        symbols.cache = pack(torch.full((batch, rows), value, device=device))
        symbols.skip = pack(torch.full((batch, rows * symbols.kv_blocks), value, device=device))
        return symbols

    @classmethod
    def from_masks(
        cls,
        cache_mask: Tensor | None,
        skip_mask: Tensor | None,
        *,
        q_tokens: int,
        kv_tokens: int,
        block_q: int = 128,
        block_kv: int = 128,
    ) -> SparseSymbols:
        """From bool masks, True = compute: cache [B, H, q_blocks], skip [B, H, q_blocks, kv_blocks].

        Either may be None (all True), not both: the batch and the heads come from them.
        """
        mask = cache_mask if cache_mask is not None else skip_mask
        if mask is None:
            raise ValueError("cache_mask: expected a mask here or in skip_mask, got None in both")
        for name, part, dims in (("cache_mask", cache_mask, 3), ("skip_mask", skip_mask, 4)):
            if part is not None and part.dtype != torch.bool:
                raise TypeError(f"{name}: expected bool, got {_describe(part)}")
            if part is not None and part.ndim != dims:
                raise ValueError(f"{name}: expected {dims} dimensions, got {_describe(part)}")
        symbols = cls(None, None, mask.shape[0], mask.shape[1], q_tokens, kv_tokens, block_q, block_kv)
        rows = (symbols.batch, symbols.heads, symbols.q_blocks)
        if cache_mask is not None:
            _expect_shape("cache_mask", cache_mask, rows)
            symbols.cache = pack(cache_mask.transpose(1, 2).flatten(1))
        if skip_mask is not None:
            _expect_shape("skip_mask", skip_mask, (*rows, symbols.kv_blocks))
            symbols.skip = pack(skip_mask.transpose(1, 2).flatten(1))
        return symbols

    @classmethod
    def from_block_lists(
        cls,
        indices: Tensor,
        counts: Tensor,
        *,
        q_tokens: int,
        kv_tokens: int,
        block_q: int = 128,
        block_kv: int = 128,
        empty_is_cached: bool = True,
    ) -> SparseSymbols:
        """From block lists, the layout of cuDNN's and FlashAttention-4's block sparsity.

        indices: int [B, H, q_blocks, capacity], the selected KV blocks in any order, valid up to counts: int
        [B, H, q_blocks]. A row with count 0 is cached, or with empty_is_cached=False computes over nothing.
        """
        for name, part, dims in (("indices", indices, 4), ("counts", counts, 3)):
            if part.ndim != dims or part.is_floating_point() or part.dtype == torch.bool:
                raise ValueError(f"{name}: expected integers of {dims} dimensions, got {_describe(part)}")
        _expect_shape("counts", counts, tuple(indices.shape[:3]))
        kv_blocks = -(-kv_tokens // block_kv)
        capacity = indices.shape[-1]
        if bool(((counts < 0) | (counts > capacity)).any()):
            raise ValueError(
                f"counts: expected 0 to {capacity}, got {int(counts.min())} to {int(counts.max())}"
            )
        used = torch.arange(capacity, device=indices.device) < counts.unsqueeze(-1)
        blocks = torch.where(used, indices, 0).long()
        if bool(((blocks < 0) | (blocks >= kv_blocks)).any()):
            raise ValueError(
                f"indices: expected 0 to {kv_blocks - 1}, got {int(blocks.min())} to {int(blocks.max())}"
            )
        # Unused slots go to a column past the last block, so that they cannot clear what another slot sets.
        mask = torch.zeros(*counts.shape, kv_blocks + 1, dtype=torch.bool, device=indices.device)
        mask.scatter_(-1, torch.where(used, blocks, kv_blocks), True)
        return cls.from_masks(
            counts > 0 if empty_is_cached else None,
            mask[..., :kv_blocks],
            q_tokens=q_tokens,
            kv_tokens=kv_tokens,
            block_q=block_q,
            block_kv=block_kv,
        )

    def masks(self) -> tuple[Tensor, Tensor]:
        """(cache bool [B, H, q_blocks], skip bool [B, H, q_blocks, kv_blocks]); True = compute."""
        rows = self.q_blocks * self.heads
        shape = (self.batch, self.q_blocks, self.heads)
        cache = self._bits("cache", self.cache, self.cache_indptr, rows, self.cache_bytes)
        skip = self._bits("skip", self.skip, self.skip_indptr, rows * self.kv_blocks, self.skip_bytes)
        return cache.view(shape).transpose(1, 2), skip.view(*shape, self.kv_blocks).transpose(1, 2)

    def _bits(self, name: str, packed: Tensor | None, indptr: Tensor | None, count: int, size: int) -> Tensor:
        if packed is None:
            return torch.ones(self.batch, count, dtype=torch.bool, device=self.device)
        if indptr is not None:
            if indptr.tolist() != [b * size for b in range(self.batch + 1)]:
                raise ValueError(
                    f"{name}_indptr: expected elements of {size} bytes, got {indptr.tolist()}: "
                    "elements of different lengths have no common mask"
                )
            packed = packed[: self.batch * size].view(self.batch, size)
        return unpack(packed, count)

    def block_lists(self, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """(indices int32 [B, H, q_blocks, capacity] ascending, counts int32 [B, H, q_blocks]).

        Cached rows have count 0; slots past the count hold 0. capacity: kv_blocks unless given; ValueError
        where a row needs more.
        """
        cache, skip = self.masks()
        selected = cache.unsqueeze(-1) & skip
        counts = selected.sum(-1, dtype=torch.int32)
        capacity = self.kv_blocks if capacity is None else capacity
        if counts.numel() and int(counts.max()) > capacity:
            raise ValueError(f"capacity: expected at least {int(counts.max())}, got {capacity}")
        order = torch.sort((~selected).to(torch.uint8), dim=-1, stable=True).indices.to(torch.int32)
        order = torch.nn.functional.pad(order, (0, max(0, capacity - self.kv_blocks)))[..., :capacity]
        used = torch.arange(capacity, device=order.device) < counts.unsqueeze(-1)
        return torch.where(used, order, 0), counts

    def density(self) -> float:
        """Selected share of all (query block, KV block) pairs; cached rows count 0."""
        cache, skip = self.masks()
        return _share(cache.unsqueeze(-1) & skip)

    def cache_density(self) -> float:
        """Share of the (query block, head) tiles that are active."""
        return _share(self.masks()[0])

    @property
    def device(self) -> torch.device:
        for part in (self.cache, self.skip):
            if part is not None:
                return part.device
        return torch.device("cpu")

    def element(self, index: int) -> SparseSymbols:
        """The symbols of one batch element, as views. ValueError where elements start by an indptr."""
        if self.cache_indptr is not None or self.skip_indptr is not None:
            raise ValueError("symbols: expected [batch, bytes] without indptr, got ragged bits")
        parts = {
            name: part[index : index + 1]
            for name in ("cache", "skip")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, batch=1, **parts)

    def to(self, device: torch.device | str) -> SparseSymbols:
        """The same symbols with their tensors on `device`."""
        parts = ("cache", "skip", "cache_indptr", "skip_indptr")
        moved = {name: part.to(device) for name in parts if (part := getattr(self, name)) is not None}
        return replace(self, **moved)

    def check(
        self,
        *,
        batch: int | None = None,
        heads: int | None = None,
        q_tokens: int | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        """Raises ValueError or TypeError unless tensors, geometry and the numbers given fit together.

        Reads shapes only, never the bits.
        """
        expected = {"batch": batch, "heads": heads, "q_tokens": q_tokens, "kv_tokens": kv_tokens}
        for name, value in expected.items():
            if value is not None and value != getattr(self, name):
                raise ValueError(f"symbols.{name}: expected {value}, got {getattr(self, name)}")
        for name in ("batch", "heads", "block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"symbols.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("q_tokens", "kv_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"symbols.{name}: expected at least 0, got {getattr(self, name)}")
        _check_part("symbols.cache", self.cache, self.cache_indptr, self.batch, self.cache_bytes)
        _check_part("symbols.skip", self.skip, self.skip_indptr, self.batch, self.skip_bytes)

    def plot(self, batch: int = 0, heads: list[int] | None = None, figure: Any = None) -> Any:
        """Draws one image a head: selected blocks bright, skipped blocks dark, cached rows grey.

        batch: which element; heads: which heads (all); figure: a matplotlib figure to draw into (a new one).
        Returns the figure. Needs matplotlib.
        """
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure

        cache, skip = (mask[batch].cpu() for mask in self.masks())
        heads = list(range(self.heads)) if heads is None else heads
        columns = min(len(heads), 8)
        rows = -(-len(heads) // columns)
        figure = figure if figure is not None else Figure(figsize=(1.6 * columns, 1.8 * rows))
        colours = ListedColormap(["#16213e", "#9aa0a6", "#ffb703"])
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(heads) :]:
            axis.set_axis_off()
        for axis, head in zip(axes, heads, strict=False):
            image = torch.where(cache[head].unsqueeze(-1), skip[head] * 2, 1)
            axis.imshow(image.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
            axis.set_title(f"head {head}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        return figure


def _share(bits: Tensor) -> float:
    return float(bits.float().mean()) if bits.numel() else 0.0


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {_describe(tensor)}")


def _check_part(name: str, bits: Tensor | None, indptr: Tensor | None, batch: int, size: int) -> None:
    if bits is None:
        if indptr is not None:
            raise ValueError(f"{name}_indptr: expected None, as {name} is None, got {_describe(indptr)}")
        return
    if bits.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8, got {_describe(bits)}")
    if indptr is None:
        if tuple(bits.shape) != (batch, size):
            raise ValueError(f"{name}: expected uint8[{batch}, {size}], got {_describe(bits)}")
        return
    if bits.ndim != 1:
        raise ValueError(f"{name}: expected uint8[bytes], as {name}_indptr is given, got {_describe(bits)}")
    if indptr.dtype != torch.int32:
        raise TypeError(f"{name}_indptr: expected int32, got {_describe(indptr)}")
    if tuple(indptr.shape) != (batch + 1,):
        raise ValueError(f"{name}_indptr: expected int32[{batch + 1}], got {_describe(indptr)}")
