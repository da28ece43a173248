"""How long eager calls hold the host: the operators of a Dispatch layer, and torch's own beside them.

python -m flashomni.bench.host
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import cuda
from flashomni.symbols import SparseSymbols

TOKENS, HEADS, HEAD_DIM = 128, 24, 128


def dispatch_calls(device: torch.device | str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """By name, each of a Dispatch layer's calls, on tensors that are there already."""
    shape, width = (1, TOKENS, HEADS, HEAD_DIM), HEADS * HEAD_DIM
    x, out, cached = torch.randn(3, 1, TOKENS, width, device=device, dtype=dtype)
    q, k, v, o = torch.randn(4, *shape, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype) / width**0.5
    bias, norm = (
        torch.zeros(width, device=device, dtype=dtype),
        torch.ones(HEAD_DIM, device=device, dtype=dtype),
    )
    cos, sin = torch.randn(2, TOKENS, HEAD_DIM, device=device)
    coefficients = torch.ones(1, device=device)
    symbols = SparseSymbols.ones(1, HEADS, TOKENS, TOKENS, device=device)
    q_rows, o_rows = q.flatten(2), o.flatten(2)  # which the engine makes once, too

    def torch_keys_and_values() -> None:
        for to in (k, v):
            torch.addmm(bias, x[0], weight.t(), out=to[0].flatten(1))

    return {
        "gemm_q": lambda: ops.gemm_q(x, weight, bias, symbols, out=q_rows),
        "norm_rope": lambda: ops.norm_rope(q, norm, cos, sin, symbols=symbols, keys=k, keys_weight=norm),
        "sparse_attention": lambda: ops.sparse_attention(q, k, v, symbols, out=o),
        "gemm_o_dispatch": lambda: ops.gemm_o_dispatch(
            o_rows, weight, [cached], coefficients, symbols, head_dim=HEAD_DIM, out=out
        ),
        "torch's two linears": torch_keys_and_values,
        "torch's SDPA": lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))),
    }


@torch.inference_mode()
def run() -> dict[str, float]:
    """Microseconds of each call."""
    calls = dispatch_calls("cuda", torch.bfloat16)
    return {name: cuda.host_us(call) for name, call in calls.items()}


if __name__ == "__main__":
    for what, us in run().items():
        print(f"{what:20} {us:6.1f} us")
