"""What the operators must compute, in float64 with plain loops over blocks. Shares no code with the package.

Bits are read one by one from the bytes, as the definition says: little-endian; cache bit q_block * heads +
head, skip bit (q_block * heads + head) * kv_blocks + kv_block. Every function takes and returns one batch
element unless its docstring says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Absolute and relative tolerance by dtype, for values of order 1. Half types: four unit roundoffs (2^-8 and
# 2^-11), for the rounding of the result, of probabilities or of a cached tensor on its way, and of products.
# float32: 256 unit roundoffs (2^-24), for sums of up to a few thousand terms.
TOLERANCE = {torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected, atol=tolerance, rtol=tolerance, msg=lambda message: f"{what}: {message}"
    )


def blocks(tokens: int, block: int) -> int:
    return math.ceil(tokens / block)


def bit(row: Tensor | None, index: int) -> bool:
    """Bit `index` of one element's bytes; an absent symbol reads as ones."""
    return True if row is None else bool((int(row[index >> 3]) >> (index & 7)) & 1)


def is_active(cache: Tensor | None, row_block: int, heads: int, head: int) -> bool:
    return bit(cache, row_block * heads + head)


@dataclass
class Blocks:
    q: int = 128
    kv: int = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor | None,
    skip: Tensor | None,
    block: Blocks,
    *,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
    causal: bool = False,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    kv_block_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [N, H, D], k and v [Nkv, Hkv, D]; out [N, H, D], lse [N, H]: what cached tiles keep."""
    q, k, v, out, lse = q.double(), k.double(), v.double(), out.double().clone(), lse.double().clone()
    tokens, heads, head_dim = q.shape
    kv_tokens, kv_heads = k.shape[:2]
    scale = head_dim**-0.5 if scale is None else scale
    kv_blocks = blocks(kv_tokens, block.kv)
    for i in range(blocks(tokens, block.q)):
        rows = slice(i * block.q, min(tokens, (i + 1) * block.q))
        for h in range(heads):
            if not is_active(cache, i, heads, h):
                continue
            g = h * kv_heads // heads
            scores, values = [], []
            for j in range(kv_blocks):
                first, last = j * block.kv, min(kv_tokens, (j + 1) * block.kv)
                if kv_block_len is not None:
                    last = min(last, first + int(kv_block_len[j]))
                if bit(skip, (i * heads + h) * kv_blocks + j):
                    part = scale * q[rows, h] @ k[first:last, g].T
                    if causal:
                        query = torch.arange(rows.start, rows.stop)[:, None]
                        key = torch.arange(first, last)[None, :]
                        part = part.masked_fill(key > query + kv_tokens - tokens, -math.inf)
                    scores.append(part)
                    values.append(v[first:last, g])
                elif k_mean is not None and last > first:
                    mean = k_mean[j, g].double()
                    scores.append((scale * q[rows, h] @ mean + math.log(last - first))[:, None])
                    values.append(v_mean[j, g].double()[None])
            if not scores:
                out[rows, h], lse[rows, h] = 0.0, -math.inf
                continue
            score, value = torch.cat(scores, 1), torch.cat(values, 0)
            mass = torch.logsumexp(score, 1) if score.shape[1] else torch.full((score.shape[0],), -math.inf)
            weight = torch.where(torch.isinf(mass)[:, None], 0.0, torch.exp(score - mass[:, None]))
            out[rows, h] = weight @ value
            lse[rows, h] = mass / math.log(2)
    return out, lse


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gemm_q(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    heads: int,
    block_q: int,
    row_offset: int,
    activation: str | None,
    out: Tensor,
) -> Tensor:
    """x [M, K] -> [M, N]; `out`: what cached tiles keep."""
    x, weight, out = x.double(), weight.double(), out.double().clone()
    columns = weight.shape[0] // heads
    for r in range(x.shape[0]):
        for h in range(heads):
            if not is_active(cache, (row_offset + r) // block_q, heads, h):
                continue
            part = slice(h * columns, (h + 1) * columns)
            value = weight[part] @ x[r]
            if bias is not None:
                value = value + bias[part].double()
            out[r, part] = activate(value, activation)
    return out


def head_shares(
    o: Tensor, weight: Tensor, cache: Tensor | None, heads: int, head_dim: int, block_q: int, row_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """o weight^T in three parts of [M, N]: cached heads, active heads, columns past the heads."""
    o, weight = o.double(), weight.double()
    cached = torch.zeros(o.shape[0], weight.shape[0], dtype=torch.float64)
    active = torch.zeros_like(cached)
    for r in range(o.shape[0]):
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            share = active if is_active(cache, (row_offset + r) // block_q, heads, h) else cached
            share[r] += weight[:, part] @ o[r, part]
    past = heads * head_dim
    if o.shape[1] < weight.shape[1]:  # a derivative has the heads' columns only
        return cached, active, torch.zeros_like(cached)
    return cached, active, o[:, past:] @ weight[:, past:].T


def gemm_o_update(
    o: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    heads: int,
    head_dim: int,
    block_q: int,
    row_offset: int,
) -> tuple[Tensor, list[Tensor]]:
    """o: the feature [M, K] and its derivatives. Returns (out [M, N], D + 1 cached [M, N])."""
    shares = [head_shares(part, weight, cache, heads, head_dim, block_q, row_offset) for part in o]
    cached = [share[0] for share in shares]
    if bias is not None:
        cached[0] = cached[0] + bias.double()
    return cached[0] + shares[0][1] + shares[0][2], cached


def gemm_o_dispatch(
    o: Tensor,
    weight: Tensor,
    cached: list[Tensor],
    coefficients: Tensor,
    cache: Tensor | None,
    heads: int,
    head_dim: int,
    block_q: int,
    row_offset: int,
    keep: Tensor | None = None,
) -> Tensor:
    """keep [M, N]: what rows of row blocks without an active head hold, and go on holding."""
    # Only active tiles of o may be read: the others are replaced before any arithmetic.
    o = o.clone()
    for r in range(o.shape[0]):
        for h in range(heads):
            if not is_active(cache, (row_offset + r) // block_q, heads, h):
                o[r, h * head_dim : (h + 1) * head_dim] = 0
    _, active, past = head_shares(o, weight, cache, heads, head_dim, block_q, row_offset)
    forecast = sum(float(c) * part.double() for c, part in zip(coefficients, cached, strict=True))
    result = forecast + active + past
    for r in range(o.shape[0] if keep is not None else 0):
        if not any(is_active(cache, (row_offset + r) // block_q, heads, h) for h in range(heads)):
            result[r] = keep[r].double()
    return result


def block_mean(x: Tensor, block: int) -> Tensor:
    """x [N, H, D] -> [blocks, H, D]."""
    return torch.stack([part.double().mean(0) for part in x.split(block, 0)])


def self_similarity(x: Tensor, block: int) -> Tensor:
    """x [N, H, D] -> [blocks, H]: mean cosine over all pairs of a block's tokens, each with itself too."""

    def of(part: Tensor) -> Tensor:  # [n, D]
        length = part.norm(dim=-1, keepdim=True)
        unit = torch.where(length > 0, part / length, 0.0)
        return (unit @ unit.T).mean()

    parts = [part.double() for part in x.split(block, 0)]
    return torch.stack([torch.stack([of(part[:, h]) for h in range(x.shape[1])]) for part in parts])


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: Tensor | None,
    eps: float,
    block_q: int,
    row_offset: int,
) -> Tensor:
    """x [N, H, D] -> the same shape; cached tiles as they were. weight [D], or [H * D]: over all heads."""
    out = x.double().clone()
    tokens, heads, head_dim = x.shape
    for t in range(tokens):
        of_all = x[t].double().square().mean()
        for h in range(heads):
            if not is_active(cache, (row_offset + t) // block_q, heads, h):
                continue
            row = out[t, h].clone()
            if weight is not None:
                wide = weight.numel() != head_dim
                own = weight[h * head_dim : (h + 1) * head_dim] if wide else weight
                row = row / torch.sqrt((of_all if wide else row.square().mean()) + eps) * own.double()
            if cos is not None:
                c, s = cos[row_offset + t].double(), sin[row_offset + t].double()
                even, odd = row[0::2].clone(), row[1::2].clone()
                row[0::2] = even * c[0::2] - odd * s[0::2]
                row[1::2] = odd * c[1::2] + even * s[1::2]
            out[t, h] = row
    return out


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x [B, M, C]; scale, shift [B, C]."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * (1 + scale.double().unsqueeze(1)) + shift.double().unsqueeze(1)


def taylor_update(feature: Tensor, old: list[Tensor], gap: float, valid: int) -> list[Tensor]:
    new = [feature.double()]
    for i in range(len(old) - 1):
        difference = (new[i] - old[i].double()) / gap
        new.append(difference if i < valid else torch.zeros_like(difference))
    return new


@dataclass
class Choice:
    """One head's selection, with what rounding may turn.

    A bit is sure where no change of the shares by `slack` and no order of equal shares can move it.
    """

    chosen: Tensor
    sure: Tensor


def smallest_prefix(share: Tensor, candidates: Tensor, limit: float, slack: float) -> Choice:
    """Of the candidates, those with the smallest shares while their cumulative share is <= limit."""
    chosen = torch.zeros(len(share), dtype=torch.bool)
    sure = torch.ones(len(share), dtype=torch.bool)
    total = 0.0
    for i in sorted(torch.nonzero(candidates).flatten().tolist(), key=lambda i: (float(share[i]), i)):
        total += float(share[i])
        if total > limit:
            break
        chosen[i] = True
    for i in torch.nonzero(candidates).flatten().tolist():
        others = share[candidates]
        at_most = float(others[others <= share[i] + slack].sum())
        at_least = float(others[others < share[i] - slack].sum() + share[i])
        sure[i] = at_most <= limit - slack or at_least > limit + slack
    return Choice(chosen, sure)


def text_blocks(tokens: int, block: int, start: int, length: int) -> Tensor:
    """Which blocks hold any of the tokens start..start + length."""
    holds = [
        any(start <= t < start + length for t in range(i * block, min(tokens, (i + 1) * block)))
        for i in range(blocks(tokens, block))
    ]
    return torch.tensor(holds)


def summary(cache: Tensor, skip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What summarize_symbols writes into rows, shares (rounded once, from float64) and awake, of a batch.

    cache: bool [B, H, q_blocks]; skip: bool [B, H, q_blocks, kv_blocks].
    """
    batch, _, q_blocks, kv_blocks = skip.shape
    selected = (cache.unsqueeze(-1) & skip).sum((0, 2, 3)).double() / (batch * q_blocks * kv_blocks)
    active = cache.sum((0, 2)).double() / (batch * q_blocks)
    octets = torch.zeros(batch, blocks(q_blocks, 8) * 8, dtype=torch.uint8)
    octets[:, :q_blocks] = cache.any(1)
    rows = (octets.unflatten(1, (-1, 8)) * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    return rows, torch.stack([selected, active]).float(), cache.any(2).any(1).to(torch.uint8)


def select_flashomni(
    q_mean: Tensor,
    k_mean: Tensor,
    tokens: int,
    text_start: int,
    text_length: int,
    tau_q: float,
    tau_kv: float,
    block: Blocks,
    scale: float | None = None,
    slack: float = 1e-5,
    guarded: Tensor | None = None,
) -> tuple[Choice, Choice]:
    """Without s_q. q_mean [nq, D], k_mean [nkv, D] of one head. guarded: bool [nkv], blocks never skipped.

    Returns (cached [nq], skipped [nq, nkv]); rows that are cached have their skipped entries as if they were
    not.
    """
    scale = q_mean.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q_mean.double() @ k_mean.double().T
    text_q = text_blocks(tokens, block.q, text_start, text_length)
    text_kv = text_blocks(tokens, block.kv, text_start, text_length)
    rows = torch.softmax(scores, 1)
    if text_length == 0 or tau_q == 0 or bool(text_q.all()):
        cached = Choice(torch.zeros(len(text_q), dtype=torch.bool), torch.ones(len(text_q), dtype=torch.bool))
    else:
        gives = torch.zeros(len(text_q), dtype=torch.float64)
        takes = torch.zeros_like(gives)
        for j in torch.nonzero(text_q).flatten().tolist():
            for i in range(len(text_kv)):
                owner = i * block.kv // block.q
                if not text_q[owner]:
                    gives[owner] += rows[j, i]
        for j in torch.nonzero(text_kv).flatten().tolist():
            takes[~text_q] += torch.softmax(scores[~text_q, j], 0)
        share = (gives / gives.sum() + takes / takes.sum()) / 2
        cached = smallest_prefix(share, ~text_q, tau_q, slack)
    skipped = torch.zeros(scores.shape, dtype=torch.bool)
    sure = torch.ones_like(skipped)
    for i in torch.nonzero(~text_q).flatten().tolist():
        candidates = ~text_kv if guarded is None else ~text_kv & ~guarded
        if not text_kv.any():
            # A row keeps at least one block: its heaviest.
            heaviest = int(rows[i].argmax())
            candidates = candidates.clone()
            candidates[heaviest] = False
            sure[i] = bool((rows[i] >= rows[i, heaviest] - slack).sum() == 1)
        if tau_kv > 0:
            choice = smallest_prefix(rows[i], candidates, tau_kv, slack)
            skipped[i] = choice.chosen
            sure[i] &= choice.sure
    return cached, Choice(skipped, sure)
