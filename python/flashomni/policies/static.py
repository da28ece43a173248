"""Policies that look at no data: everything, and a seeded random choice for tests and benchmarks."""

from __future__ import annotations

import zlib

import torch

from flashomni.policies.base import Choice, Layout, Policy, Stats, Step, protect
from flashomni.symbols import SparseSymbols


class DensePolicy(Policy):
    """Every bit set: the engine's whole machinery at work, nothing reused or skipped."""

    capturable = True

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        s = choice.symbols
        ones = SparseSymbols.ones(s.batch, s.heads, s.q_tokens, s.kv_tokens, s.block_q, s.block_kv, s.device)
        s.cache.copy_(ones.cache)
        s.skip.copy_(ones.skip)


class RandomPolicy(Policy):
    """Random tiles and blocks of given densities; the same for the same seed, step, context and layer.

    `cache_density` is the share of image tiles that are computed, `skip_density` that of the image blocks an
    image tile looks at.
    """

    def __init__(self, cache_density: float = 0.5, skip_density: float = 0.5, seed: int = 0):
        for name, value in (("cache_density", cache_density), ("skip_density", skip_density)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        self.cache_density, self.skip_density, self.seed = cache_density, skip_density, seed

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        key = (self.seed, step.index, str(step.context), step.layer)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
        s = choice.symbols
        shape = (layout.batch, layout.heads, s.q_blocks)
        cache_mask = torch.rand(shape, generator=generator) < self.cache_density
        skip_mask = torch.rand((*shape, s.kv_blocks), generator=generator) < self.skip_density
        protect(cache_mask, skip_mask, layout)
        choice.write(cache_mask.to(s.cache.device), skip_mask.to(s.cache.device))
