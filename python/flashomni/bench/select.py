"""Choosing symbols (block means, selection) and forecasting, as shares of one dense attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import harness
from flashomni.symbols import SparseSymbols

TEXT = 16  # tokens, as in tiny_flux
TAU_Q, TAU_KV = 0.5, 0.15


def make_symbols(q: torch.Tensor, k: torch.Tensor, block: int) -> Callable[[], object]:
    """All that an Update does to choose its symbols: means of q and k, then the paper's selection."""
    _, tokens, heads, _ = q.shape
    symbols = SparseSymbols.ones(1, heads, tokens, tokens, block, block)
    options = {"text_start": 0, "text_length": min(TEXT, tokens), "tau_q": TAU_Q, "tau_kv": TAU_KV}

    def make() -> SparseSymbols:
        means = ops.block_mean(q, block), ops.block_mean(k, block)
        return ops.select_flashomni(*means, symbols, **options)

    return make


@torch.inference_mode()
def run(
    *, tokens: int, heads: int, head_dim: int, block: int, dtype: torch.dtype, rounds: int, seed: int = 0
) -> list[dict]:
    """Rows of suites "select" and "forecast". Baselines: one dense attention; for the forecast, a copy."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, heads, head_dim, generator=generator).to(dtype) for _ in range(3))
    bq, bk, bv = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    symbols = SparseSymbols.ones(1, heads, tokens, tokens, block, block)
    q_mean, k_mean = ops.block_mean(q, block), ops.block_mean(k, block)
    options = {"text_start": 0, "text_length": min(TEXT, tokens), "tau_q": TAU_Q, "tau_kv": TAU_KV}
    derivatives = [torch.randn_like(q) for _ in range(2)]
    coefficients, out = torch.tensor([1.0, 2.0]), torch.empty_like(q)
    ms = harness.interleave(
        {
            "block means of q and k": lambda: (ops.block_mean(q, block), ops.block_mean(k, block)),
            "selection": lambda: ops.select_flashomni(q_mean, k_mean, symbols, **options),
            "means and selection": make_symbols(q, k, block),
            "taylor_update": lambda: ops.taylor_update(q, derivatives, gap=4, valid=1),
            "taylor_forecast": lambda: ops.taylor_forecast(derivatives, coefficients, out=out),
            "sdpa": lambda: F.scaled_dot_product_attention(bq, bk, bv),
            "copy": lambda: out.copy_(q),
        },
        rounds,
    )
    dense = 4.0 * heads * head_dim * tokens * tokens
    rows = []
    names = ("block means of q and k", "selection", "means and selection", "taylor_update", "taylor_forecast")
    for name in names:
        forecast = name.startswith("taylor")
        case = {
            "what": name,
            "seqlen": tokens,
            "heads": heads,
            "head_dim": head_dim,
            "block": [block, block],
            "dtype": str(dtype).removeprefix("torch."),
        }
        baseline = ("torch_copy", ms["copy"], None) if forecast else ("torch_sdpa", ms["sdpa"], dense)
        rows.append(harness.row("forecast" if forecast else "select", case, ms[name], None, baseline))
    return rows
