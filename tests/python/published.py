"""Inputs in the published interface's form, and what it must answer: float64, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from inputs import poison, random, random_mask
from torch import Tensor

import flashomni
from flashomni.attention import BatchFlashOmniFAWithRaggedKVWrapper


def indptr(sizes: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)


def wrapper(device: str = "cpu", *args: object, **options: object) -> BatchFlashOmniFAWithRaggedKVWrapper:
    return BatchFlashOmniFAWithRaggedKVWrapper(torch.empty(1, device=device), *args, **options)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Problem:
    """A ragged batch; a sequence's bits: bool cache [q_blocks, H], skip [q_blocks, H, kv_blocks]."""

    lengths: list[tuple[int, int]]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    block: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    cache_density: float = 0.6
    skip_density: float = 0.5
    causal: bool = False
    masks: list[Tensor] | None = None  # bool [Nq, Nkv] a sequence
    cache: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        q_tokens, kv_tokens = (sum(part) for part in zip(*self.lengths, strict=True))
        self.q = self._tensor(q_tokens, self.heads)
        self.k, self.v = (self._tensor(kv_tokens, self.kv_heads) for _ in range(2))
        self.draw()

    def _tensor(self, tokens: int, heads: int) -> Tensor:
        return random(self.generator, tokens, heads, self.head_dim, dtype=self.dtype).to(self.device)

    def draw(self) -> None:
        """New bits."""
        rows = [-(-q // self.block[0]) for q, _ in self.lengths]
        columns = [-(-kv // self.block[1]) for _, kv in self.lengths]
        self.cache = [random_mask(self.generator, self.cache_density, n, self.heads) for n in rows]
        self.skip = [
            random_mask(self.generator, self.skip_density, n, self.heads, m)
            for n, m in zip(rows, columns, strict=True)
        ]

    def plan(self, wrapper: BatchFlashOmniFAWithRaggedKVWrapper, **options: object) -> None:
        if self.masks is not None:
            options.setdefault("custom_mask", torch.cat([mask.flatten() for mask in self.masks]))
        wrapper.plan(
            indptr([q for q, _ in self.lengths], self.device),
            indptr([kv for _, kv in self.lengths], self.device),
            *(self.heads, self.kv_heads, self.head_dim, *self.block),
            causal=self.causal,
            q_data_type=options.pop("q_data_type", name_of(self.dtype)),
            **options,
        )

    def bits(self, wrapper: BatchFlashOmniFAWithRaggedKVWrapper) -> tuple[Tensor, ...]:
        """Packed as scripts pack them: by segment_packbits, with what plan() left in the wrapper."""
        flat = [torch.cat([part.flatten() for part in parts]) for parts in (self.cache, self.skip)]
        cache, cache_indptr = flashomni.segment_packbits(
            flat[0].to(self.device), wrapper._sparse_info_indptr_base, bitorder="little"
        )
        skip, skip_indptr = flashomni.segment_packbits(
            flat[1].to(self.device), wrapper._sparse_kv_info_indptr_base, bitorder="little"
        )
        return cache, skip, cache_indptr, skip_indptr

    def poisoned(self) -> tuple[Tensor, Tensor]:
        """NaN outputs."""
        out, lse = poison(*self.q.shape, dtype=self.dtype), poison(*self.q.shape[:-1], dtype=torch.float32)
        return out.to(self.device), lse.to(self.device)

    def expected(self, is_full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, active bool [tokens, H]) in float64 on the CPU; NaN in cached tiles."""
        results, q_first, kv_first = [], 0, 0
        for b, (q_tokens, kv_tokens) in enumerate(self.lengths):
            q, k, v = (
                x.cpu().double()[first : first + n]
                for x, first, n in (
                    (self.q, q_first, q_tokens),
                    (self.k, kv_first, kv_tokens),
                    (self.v, kv_first, kv_tokens),
                )
            )
            results.append(self._expected(b, q, k, v, is_full))
            q_first, kv_first = q_first + q_tokens, kv_first + kv_tokens
        return tuple(torch.cat(part) for part in zip(*results, strict=True))

    def _expected(self, b: int, q: Tensor, k: Tensor, v: Tensor, is_full: bool) -> tuple[Tensor, ...]:
        rows, columns = torch.arange(len(q)), torch.arange(len(k))
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if self.masks is not None:
            seen &= self.masks[b].cpu()
        if self.causal:
            seen &= columns <= (rows + len(k) - len(q))[:, None]
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float64)
        active = torch.ones(q.shape[:2], dtype=torch.bool)
        for h in range(self.heads):
            g = h * self.kv_heads // self.heads
            here = seen
            if not is_full:
                active[:, h] = self.cache[b][rows // self.block[0], h]
                blocks = self.skip[b][:, h][rows // self.block[0]]
                here = seen & blocks[:, columns // self.block[1]]
            score = (q[:, h] @ k[:, g].T * self.head_dim**-0.5).masked_fill(~here, -math.inf)
            mass = torch.logsumexp(score, 1)
            weight = torch.exp(score - torch.where(mass.isinf(), 0.0, mass)[:, None])
            out[:, h], lse[:, h] = weight @ v[:, g], mass / math.log(2)
        out[~active], lse[~active] = math.nan, math.nan
        return out, lse, active
