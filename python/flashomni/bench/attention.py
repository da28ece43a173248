"""Block-sparse attention beside torch's SDPA on the CPU: same tensors, dtype and threads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import harness
from flashomni.bench.select import make_symbols
from flashomni.symbols import SparseSymbols

DENSITIES = (1.0, 0.5, 0.3, 0.1)
PATTERNS = ("random", "clustered")


@torch.inference_mode()
def run(
    *, tokens: int, heads: int, head_dim: int, block: int, dtype: torch.dtype, rounds: int, seed: int = 0
) -> list[dict]:
    """Rows of suite "attention". density = selected share of block pairs; pattern "tiles": whole tiles
    cached.

    symbols_ms: what choosing symbols of this geometry costs (block means of q and k, then selection), timed
    in
    the same run; ratio_with_symbols counts it in.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, heads, head_dim, generator=generator).to(dtype) for _ in range(3))
    # SDPA's layout, contiguous, as good as it can get; what diffusers passes is the transposed view.
    bq, bk, bv = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out = torch.zeros_like(q)
    geometry = {"q_tokens": tokens, "kv_tokens": tokens, "block_q": block, "block_kv": block}
    blocks = -(-tokens // block)
    cases: dict[str, tuple[str, SparseSymbols]] = {}
    for density in DENSITIES:
        for pattern in PATTERNS if density < 1 else PATTERNS[:1]:
            skip = harness.skip_mask(pattern, density, heads, blocks, blocks, seed)
            cases[f"{pattern} {density}"] = (pattern, SparseSymbols.from_masks(None, skip, **geometry))
        if density < 1:
            cache = harness.cache_mask("random", density, heads, blocks, seed)
            cases[f"tiles {density}"] = ("tiles", SparseSymbols.from_masks(cache, None, **geometry))
    arms = {
        name: lambda symbols=symbols: ops.sparse_attention(q, k, v, symbols, out=out)
        for name, (_, symbols) in cases.items()
    }
    arms["sdpa"] = lambda: F.scaled_dot_product_attention(bq, bk, bv)
    arms["select"] = make_symbols(q, k, block)
    ms = harness.interleave(arms, rounds)
    dense = 4.0 * heads * head_dim * tokens * tokens
    rows = []
    for name, (pattern, symbols) in cases.items():
        case = {
            "seqlen": tokens,
            "heads": heads,
            "head_dim": head_dim,
            "density": symbols.density(),
            "pattern": pattern,
            "block": [block, block],
            "dtype": str(dtype).removeprefix("torch."),
        }
        flops = harness.attention_flops(symbols, head_dim)
        found = harness.row("attention", case, ms[name], flops, ("torch_sdpa", ms["sdpa"], dense))
        found["symbols_ms"] = ms["select"]
        found["ratio_with_symbols"] = ms["sdpa"] / (ms[name] + ms["select"])
        rows.append(found)
    return rows
