"""What a policy is told of an Update's queries and keys, measured while norm and RoPE go over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.engine.linear import Norm, Rope, norm_and_rope, norm_weight
from flashomni.policies import Stats
from flashomni.symbols import SparseSymbols


class BlockMeasure:
    """Means, and if asked for self-similarities, over the blocks of q or k, x [B, S, H, D].

    Rows come in streams of the joint sequence. Those that are whole blocks are measured in the same read as
    their norm and RoPE, unless a norm is over all heads or a function rotates; else finish() reads all of x
    once more.
    """

    def __init__(self, x: Tensor, block: int, similar: bool):
        batch, tokens, heads, dim = x.shape
        shape = (batch, -(-tokens // block), heads)
        self.x, self.block = x, block
        self.mean = torch.empty((*shape, dim), dtype=torch.float32, device=x.device)
        self.similarity = torch.empty(shape, dtype=torch.float32, device=x.device) if similar else None
        self._complete = True

    def norm_and_rope(
        self, norm: Norm | None, start: int, rows: int, rope: Rope, *, across_heads: bool
    ) -> None:
        """As engine.linear's, on rows start .. start + rows."""
        x, end, block = self.x[:, start : start + rows], start + rows, self.block
        whole = start % block == 0 and (end % block == 0 or end == self.x.shape[1])
        if not whole or across_heads or callable(rope):
            self._complete = False
            norm_and_rope(norm, x, rope, row_offset=start, across_heads=across_heads)
            return
        blocks = slice(start // block, -(-end // block))
        weight, eps = norm_weight(norm, x)
        cos, sin = rope if rope is not None else (None, None)
        similarity = None if self.similarity is None else self.similarity[:, blocks]
        ops.norm_rope_mean(
            *(x, weight, cos, sin, self.mean[:, blocks], similarity), block=block, eps=eps, row_offset=start
        )

    def finish(self) -> None:
        if not self._complete:
            self.mean = ops.block_mean(self.x, self.block, self.similarity)


def tile_norms(x: Tensor, heads: int, block: int) -> Tensor:
    """The 2-norm of every tile of x [B, S, H * D]: float32 [B, ceil(S / block), H]."""
    of_tokens = torch.linalg.vector_norm(x.unflatten(-1, (heads, -1)), dim=-1, dtype=torch.float32)
    padded = nn.functional.pad(of_tokens, (0, 0, 0, -x.shape[1] % block))
    return torch.linalg.vector_norm(padded.unflatten(1, (-1, block)), dim=2)


class Measures:
    """Norm and RoPE of q and k at an Update, and what `needs` (Policy.needs) names of the result."""

    def __init__(self, needs: frozenset[str], q: Tensor, k: Tensor, symbols: SparseSymbols):
        self.needs, self.x = needs, (q, k)
        self.q = BlockMeasure(q, symbols.block_q, False) if "q_mean" in needs else None
        similar = "k_similarity" in needs
        self.k = BlockMeasure(k, symbols.block_kv, similar) if similar or "k_mean" in needs else None

    def norm_and_rope(self, norms: tuple, start: int, rows: int, rope: Rope, *, across_heads: bool) -> None:
        """norms: those of q and of k, each may be None."""
        for x, measure, norm in zip(self.x, (self.q, self.k), norms, strict=True):
            if measure is not None:
                measure.norm_and_rope(norm, start, rows, rope, across_heads=across_heads)
                continue
            x = x[:, start : start + rows]
            norm_and_rope(norm, x, rope, row_offset=start, across_heads=across_heads)

    def stats(self) -> Stats:
        """Once every stream has been through."""
        stats = Stats()
        for measure in (self.q, self.k):
            if measure is not None:
                measure.finish()
        if self.q is not None:
            stats.q_mean = self.q.mean
        if self.k is not None:
            stats.k_mean = self.k.mean if "k_mean" in self.needs else None
            stats.k_similarity = self.k.similarity
        return stats
