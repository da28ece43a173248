"""What a policy is told and what it decides. A policy chooses bits and nothing but bits."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from flashomni.symbols import SparseSymbols


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind ("text" or "image") in the joint sequence."""

    kind: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The joint sequence of one attention. Tokens are counted along the sequence, blocks are runs of them."""

    batch: int
    heads: int
    head_dim: int
    tokens: int
    segments: tuple[Segment, ...]
    block_q: int = 128
    block_kv: int = 128

    @property
    def text(self) -> Segment:
        """The text segment; of length 0 where the sequence holds no text."""
        return next((s for s in self.segments if s.kind == "text"), Segment("text", 0, 0))

    def text_blocks(self, block: int) -> slice:
        """The blocks of `block` tokens that hold any text token."""
        text = self.text
        return slice(text.start // block, -(-(text.start + text.length) // block) if text.length else 0)


@dataclass(frozen=True, slots=True)
class Step:
    """Where in the run a choice is made. `context` keeps the passes of classifier-free guidance apart.

    ramp_on_device: on a GPU also the ramp as float32 [1] there, for what is captured once and replayed.
    """

    index: int
    count: int
    ramp: float
    context: Hashable
    layer: int
    layers: int
    ramp_on_device: torch.Tensor | None = None


@dataclass(slots=True)
class Stats:
    """What was measured of this step's queries and keys (after norm and RoPE) and of the attention's output:
    only what the policy needs."""

    q_mean: torch.Tensor | None = None  # float32 [B, q_blocks, H, D]
    k_mean: torch.Tensor | None = None  # float32 [B, kv_blocks, H, D]
    k_similarity: torch.Tensor | None = None  # float32 [B, kv_blocks, H]: mean cosine of a block's tokens
    # float32 [B, q_blocks, H]: 2-norm, over a tile, of ΔO, the attention output's change a step since the
    # step that was recorded before this one. None also where there is no such step, or max_order is 0.
    o_change: torch.Tensor | None = None


@dataclass(slots=True)
class Choice:
    """Where the decision goes: the caller's buffers, written in place."""

    symbols: SparseSymbols

    def write(self, cache_mask: torch.Tensor, skip_mask: torch.Tensor) -> None:
        """Packs bool [B, H, q_blocks] and [B, H, q_blocks, kv_blocks], True = compute, into the symbols."""
        s = self.symbols
        packed = SparseSymbols.from_masks(
            cache_mask,
            skip_mask,
            q_tokens=s.q_tokens,
            kv_tokens=s.kv_tokens,
            block_q=s.block_q,
            block_kv=s.block_kv,
        )
        s.cache.copy_(packed.cache)
        s.skip.copy_(packed.skip)


class Policy:
    """Chooses symbols at every Update of every layer.

    `needs` names the fields of Stats that select() reads; nothing else is computed. select() writes
    `choice.symbols` and returns nothing; it should not read tensors back to the host. `state` is a dict of
    the policy's own, one a (context, layer), emptied when a new run begins.

    `capturable` says that select() only launches work, the same at every step but for what it reads from
    tensors (step.ramp_on_device among them): then an Update can be a CUDA graph.

    `caches_by_text` promises that select() sets all of S_c where a sequence has no text: then the engine
    keeps nothing between steps for such a layer.
    """

    needs: frozenset[str] = frozenset()
    capturable: bool = False
    caches_by_text: bool = False

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        raise NotImplementedError(f"policy {type(self).__name__}: expected a select() method, got none")


def protect(cache_mask: torch.Tensor, skip_mask: torch.Tensor, layout: Layout) -> None:
    """The guards of every policy, in place: text rows and columns are computed, a row keeps a block."""
    rows, columns = layout.text_blocks(layout.block_q), layout.text_blocks(layout.block_kv)
    cache_mask[:, :, rows] = True
    skip_mask[:, :, rows] = True
    skip_mask[:, :, :, columns] = True
    skip_mask[..., 0] |= ~skip_mask.any(-1)
