"""Custom masks through block structure, exact on every backend.

Rows that see the same keys make a class. Within each block of keys those that a class sees are moved to the
head (softmax does not mind the order) and counted in kv_block_len; blocks without any are skipped. So a class
costs what its blocks cost, in one call of sparse_attention over the query blocks that hold its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.symbols import pack, unpack

_CHUNK = 1 << 26  # mask elements looked at together


@dataclass(frozen=True)
class RowClass:
    """Rows of one sequence that see the same keys.

    q_blocks: the query blocks from the first to the last with such a row; rows: int64, counted from the first
    row of these; whole: all their rows are of this class. q_holds: bool [of q_blocks], whether one is there.
    kv_holds: bool [kv_blocks], whether any key is seen; lengths: int32 [kv_blocks], how many; order: int64
    [Nkv], the keys with the seen ones first in each block, or None where they are.
    """

    q_blocks: range
    rows: Tensor
    whole: bool
    q_holds: Tensor
    kv_holds: Tensor
    lengths: Tensor
    order: Tensor | None


def split(mask: Tensor, lengths: list[tuple[int, int]]) -> Iterator[Tensor]:
    """The mask of each sequence, bool [Nq, Nkv], out of the flat one."""
    begin = 0
    for q_tokens, kv_tokens in lengths:
        yield mask[begin : begin + q_tokens * kv_tokens].view(q_tokens, kv_tokens)
        begin += q_tokens * kv_tokens


def unpacked(packed: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    """The flat mask out of little-endian bits, each sequence from a byte of its own."""
    parts, begin = [packed.new_empty(0, dtype=torch.bool)], 0
    for q_tokens, kv_tokens in lengths:
        count = q_tokens * kv_tokens
        size = -(-count // 8)
        for at in range(0, size, _CHUNK // 8):
            piece = packed[begin + at : begin + min(size, at + _CHUNK // 8)]
            parts.append(unpack(piece, min(_CHUNK, count - 8 * at)))
        begin += size
    return torch.cat(parts)


def is_causal(mask: Tensor) -> bool:
    """True if the mask is token-exact causality, the last row seeing the last key."""
    q_tokens, kv_tokens = mask.shape
    step = max(1, _CHUNK // max(1, kv_tokens))
    keys = torch.arange(kv_tokens, device=mask.device)
    for first in range(0, q_tokens, step):
        rows = torch.arange(first, min(q_tokens, first + step), device=mask.device)
        if not torch.equal(mask[first : first + step], keys <= (rows + kv_tokens - q_tokens)[:, None]):
            return False
    return True


def classes(mask: Tensor, block_q: int, block_kv: int) -> list[RowClass]:
    """The classes of a mask bool [Nq, Nkv]. Waits for the device: the number of classes is its answer."""
    if mask.shape[0] == 0:
        return []
    if mask.shape[1] == 0:
        return [_row_class(torch.arange(mask.shape[0], device=mask.device), mask, block_q, block_kv)]
    inverse, counts = torch.unique(_words(mask), dim=0, return_inverse=True, return_counts=True)[1:]
    rows = torch.argsort(inverse, stable=True).split(counts.tolist())
    return [_row_class(part, mask, block_q, block_kv) for part in rows]


def _words(mask: Tensor) -> Tensor:
    """Each row packed into int64 words: what is quick to compare."""
    wide = -(-mask.shape[1] // 64) * 64
    step = max(1, _CHUNK // wide)
    pad = (0, wide - mask.shape[1])
    return torch.cat([pack(torch.nn.functional.pad(part, pad)) for part in mask.split(step)]).view(
        torch.int64
    )


def _row_class(rows: Tensor, mask: Tensor, block_q: int, block_kv: int) -> RowClass:
    q_tokens, kv_tokens = mask.shape
    first, last = (int(rows[i]) // block_q for i in (0, -1))
    q_blocks = range(first, last + 1)
    q_holds = torch.zeros(len(q_blocks), dtype=torch.bool, device=mask.device)
    q_holds[rows // block_q - first] = True
    whole = len(rows) == min(q_tokens, (last + 1) * block_q) - first * block_q
    seen = torch.nn.functional.pad(mask[int(rows[0])], (0, -kv_tokens % block_kv)).view(-1, block_kv)
    lengths = seen.sum(1, dtype=torch.int32)
    # Padding keys are unseen and last, so a stable sort leaves them at the end.
    inside = torch.argsort((~seen).to(torch.uint8), dim=1, stable=True)
    order = (inside + block_kv * torch.arange(len(seen), device=mask.device)[:, None]).flatten()[:kv_tokens]
    in_place = torch.equal(order, torch.arange(kv_tokens, device=mask.device))
    return RowClass(
        q_blocks=q_blocks,
        rows=rows - first * block_q,
        whole=whole,
        q_holds=q_holds,
        kv_holds=lengths > 0,
        lengths=lengths,
        order=None if in_place else order,
    )
