"""Symbols of a given density, at the cost of really choosing them; and which steps stand for a whole run."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni.policies import Choice, FlashOmniPolicy, Layout, Stats, Step
from flashomni.schedule import StepPlan


class LevelPolicy(FlashOmniPolicy):
    """Chooses as the paper's policy does, then writes random symbols of a given density over the choice.

    density: computed share of all (query block, KV block) pairs in a Dispatch step; tiles: share of active
    tiles, None for as sparse along rows as along columns. rows: cached tiles are whole rows, the same in all
    heads; else each head has its own. Text and given pictures are always computed. The symbols are drawn once
    a (context, layer), so that an Update costs what it does with the paper's policy.
    """

    caches_by_text = False  # what it caches is no choice

    def __init__(self, density: float, tiles: float | None = None, *, rows: bool = False, seed: int = 0):
        super().__init__(0.5, 0.15)
        for name, share in (("density", density), ("tiles", 1.0 if tiles is None else tiles)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: expected more than 0 and at most 1, got {share}")
        self.density, self.tiles, self.rows, self.seed = density, tiles, rows, seed
        self._bits: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        super().select(step, layout, stats, state, choice)
        key = step.context, step.layer, layout
        if key not in self._bits:
            choice.write(*self.masks(layout, choice, self.seed + step.layer))
            self._bits[key] = choice.symbols.cache.clone(), choice.symbols.skip.clone()
        cache, skip = self._bits[key]
        choice.symbols.cache.copy_(cache)
        choice.symbols.skip.copy_(skip)

    def masks(self, layout: Layout, choice: Choice, seed: int) -> tuple[Tensor, Tensor]:
        """bool [B, H, q_blocks], [B, H, q_blocks, kv_blocks], on the device; True in what is kept."""
        s = choice.symbols
        device = s.cache.device
        rows, columns = (kept_blocks(layout, block).to(device) for block in (s.block_q, s.block_kv))
        counts = s.q_blocks, s.kv_blocks, int(rows.sum()), int(columns.sum())
        tiles, blocks = image_shares(self.density, *counts, tiles=self.tiles)
        generator = torch.Generator(device).manual_seed(seed)

        def chosen(shape: tuple[int, ...], kept: Tensor, share: float) -> Tensor:
            """Of the last axis what is kept, and as many of the others as `share` says."""
            rank = torch.rand(shape, generator=generator, device=device) - kept.float()
            count = int(kept.sum())
            return rank.argsort(-1).argsort(-1) < count + round(share * (shape[-1] - count))

        heads = 1 if self.rows else layout.heads
        cache = chosen((layout.batch, heads, s.q_blocks), rows, tiles).expand(-1, layout.heads, -1)
        skip = chosen((layout.batch, layout.heads, s.q_blocks, s.kv_blocks), columns, blocks)
        skip[:, :, rows] = True
        skip[..., 0] |= ~skip.any(-1)
        return cache, skip


def kept_blocks(layout: Layout, block: int) -> Tensor:
    """bool [blocks]: those with any token that no policy may leave out, of text or of a given picture."""
    kept = torch.zeros(-(-layout.tokens // block), dtype=torch.bool)
    for segment in layout.segments:
        if segment.kind != "image" and segment.length:
            kept[segment.start // block : -(-(segment.start + segment.length) // block)] = True
    return kept


def image_shares(
    density: float,
    q_blocks: int,
    kv_blocks: int,
    q_kept: int,
    kv_kept: int,
    *,
    tiles: float | None = None,
) -> tuple[float, float]:
    """(active share of the image's tiles, share of the image's blocks such a tile looks at) for a density.

    ValueError where what is always computed (kept) takes more, or the tiles are too few.
    """
    image_rows, image_columns = q_blocks - q_kept, kv_blocks - kv_kept
    wanted = density * q_blocks * kv_blocks - q_kept * kv_blocks  # pairs of the image's rows
    if wanted < 0:
        raise ValueError(
            f"density: expected at least {q_kept / q_blocks:.3f}, which is always computed, got {density}"
        )
    if tiles is None:
        # image_rows * x * (kv_kept + image_columns * x) = wanted
        a, b = image_rows * image_columns, image_rows * kv_kept
        share = (math.sqrt(b * b + 4 * a * wanted) - b) / (2 * a) if a else 1.0
        return share, share
    share = (tiles * q_blocks - q_kept) / image_rows if image_rows else 1.0
    blocks = (wanted / (image_rows * share) - kv_kept) / image_columns if share > 0 else -1.0
    if not (share <= 1 and 0 <= blocks <= 1 + 1e-9):
        raise ValueError(
            f"tiles: expected a share of active tiles that a density of {density} can have, got {tiles}"
        )
    return share, min(blocks, 1.0)


def dispatch_density(sparsity: float, plans: Sequence[StepPlan]) -> float:
    """The density in Dispatch steps that makes `sparsity` the mean uncomputed share over all steps."""
    dispatches = sum(plan.kind == "dispatch" for plan in plans)
    density = 1 - sparsity * len(plans) / dispatches if dispatches else 0.0
    if not 0 < density <= 1:
        most = dispatches / len(plans)
        raise ValueError(
            f"sparsity: expected from 0 to less than {most:.2f} with this schedule, got {sparsity}"
        )
    return density


@dataclass
class Sample:
    """Which steps of a run are measured, and which of them each step takes its time from.

    A run is composed: the first warm-up step stands for all, each distance k of one window's Dispatch steps
    for that distance in all windows, the first windows (whose histories differ) apart. With `each_window`,
    for symbols that differ between Updates, every window has its own Update and its Dispatch at k = 1. With
    `whole` every step is itself.
    """

    plans: Sequence[StepPlan]
    order: int
    each_window: bool = False
    whole: bool = False
    keys: list[Hashable] = field(init=False)

    def __post_init__(self) -> None:
        windows = sum(plan.kind == "update" for plan in self.plans)
        last, window = min(max(self.order, 1), max(windows - 1, 0)), -1
        self.keys = []
        for i, plan in enumerate(self.plans):
            window += plan.kind == "update"
            w = window if self.each_window else min(window, last)
            if self.whole:
                key: Hashable = i
            elif plan.kind == "full":
                key = ("full", plan.record)
            elif plan.kind == "update":
                key = ("update", w)
            else:
                key = ("dispatch", w, plan.since_update if w == last and not self.each_window else 1)
            self.keys.append(key)

    def measured(self) -> list[int]:
        """The first step of each key, and every one that feeds the history."""
        first = {key: i for i, key in reversed(list(enumerate(self.keys)))}
        recorded = [i for i, plan in enumerate(self.plans) if plan.kind == "full" and plan.record]
        return sorted({*first.values(), *recorded})

    def shortest(self) -> list[int]:
        """One step of each kind, Updates and Dispatch steps as often as their histories differ: a warm-up."""
        whole = Sample(self.plans, self.order)
        return [i for i in whole.measured() if self.plans[i].since_update <= 1]
