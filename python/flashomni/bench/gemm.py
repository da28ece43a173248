"""GEMM-Q and GEMM-O beside torch's linear on the CPU: same tensors, dtype and threads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import harness
from flashomni.symbols import SparseSymbols

DENSITIES = (1.0, 0.5, 0.3, 0.1)
PATTERNS = ("random", "clustered")
ORDER = 1  # D of the forecast that GEMM-O carries
WINDOW = 6  # steps from one Update to the next, for the window's row


@torch.inference_mode()
def run(
    *, tokens: int, heads: int, head_dim: int, block: int, dtype: torch.dtype, rounds: int, seed: int = 0
) -> list[dict]:
    """Rows of suites "gemm_q", "gemm_o" (Dispatch), "gemm_o_update" and "gemm_o_window".

    width = heads * head_dim; density = share of active tiles. The window is one Update with D = 0 and five
    Dispatches beside six linears; its ideal ratio is N / (1 + (N - 1) density).
    """
    width = heads * head_dim
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(width, width, generator=generator) / width**0.5).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    derivative = torch.randn(1, tokens, width, generator=generator).to(dtype)
    out = torch.zeros_like(x)
    cached = [torch.zeros_like(x) for _ in range(ORDER + 1)]
    coefficients = torch.tensor([1.0, 2.0])
    lengths = harness.block_lengths(tokens, block)
    arms = {"linear": lambda: F.linear(x, weight, bias)}
    cases = {}
    for density in DENSITIES:
        for pattern in PATTERNS if density < 1 else PATTERNS[:1]:
            mask = harness.cache_mask(pattern, density, heads, len(lengths), seed)
            symbols = SparseSymbols.from_masks(
                mask, None, q_tokens=tokens, kv_tokens=tokens, block_q=block, block_kv=block
            )
            name = f"{pattern} {density}"
            cases[name] = (pattern, symbols, float((mask.double() * lengths).sum()) / (heads * tokens))
            arms[f"q {name}"] = lambda s=symbols: ops.gemm_q(x, weight, bias, s, out=out)
            arms[f"o {name}"] = lambda s=symbols: ops.gemm_o_dispatch(
                x, weight, cached, coefficients, s, head_dim=head_dim, out=out
            )
            arms[f"o0 {name}"] = lambda s=symbols: ops.gemm_o_dispatch(
                x, weight, cached[:1], coefficients[:1], s, head_dim=head_dim, out=out
            )
            arms[f"u0 {name}"] = lambda s=symbols: ops.gemm_o_update(
                x, weight, bias, s, head_dim=head_dim, out=out, cached=cached[:1]
            )
            arms[f"u {name}"] = lambda s=symbols: ops.gemm_o_update(
                x, weight, bias, s, head_dim=head_dim, derivatives=[derivative], out=out, cached=cached
            )
    ms = harness.interleave(arms, rounds)
    dense = 2.0 * tokens * width * width
    rows = []
    for name, (pattern, symbols, share) in cases.items():
        case = {
            "seqlen": tokens,
            "in": width,
            "out": width,
            "heads": heads,
            "density": symbols.cache_density(),
            "pattern": pattern,
            "block": block,
            "dtype": str(dtype).removeprefix("torch."),
        }
        linear = ("torch_linear", ms["linear"], dense)
        rows.append(harness.row("gemm_q", case, ms[f"q {name}"], dense * share, linear))
        ordered = {**case, "order": ORDER}
        rows.append(harness.row("gemm_o", ordered, ms[f"o {name}"], dense * share, linear))
        # An Update multiplies every tile once, and the cached ones once more for each order.
        update = dense * (1 + ORDER * (1 - share))
        rows.append(harness.row("gemm_o_update", ordered, ms[f"u {name}"], update, linear))
        window = ms[f"u0 {name}"] + (WINDOW - 1) * ms[f"o0 {name}"]
        work = dense * (1 + (WINDOW - 1) * share)
        steps = ("torch_linear", WINDOW * ms["linear"], WINDOW * dense)
        case = {**case, "order": 0, "interval": WINDOW}
        rows.append(harness.row("gemm_o_window", case, window, work, steps))
    return rows
