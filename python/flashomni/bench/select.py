"""Choosing symbols (block means, selection, planning) as shares of one dense attention; norms with RoPE, and
forecasting, as shares of copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import attention_cuda, cuda, harness
from flashomni.symbols import SparseSymbols

TEXT = 16  # tokens, as in tiny_flux
TAU_Q, TAU_KV = 0.5, 0.15
ORDERS = (0, 1, 2)  # of the forecasts
WIDE = (40, 128)  # heads and head_dim of a norm over all heads, as Wan 14B has it


def make_symbols(q: torch.Tensor, k: torch.Tensor, block: int) -> Callable[[], object]:
    """All that an Update does to choose its symbols: means of q and k, then the paper's selection."""
    _, tokens, heads, _ = q.shape
    symbols = SparseSymbols.ones(1, heads, tokens, tokens, block, block, q.device)
    options = {"text_start": 0, "text_length": min(TEXT, tokens), "tau_q": TAU_Q, "tau_kv": TAU_KV}

    def make() -> SparseSymbols:
        means = ops.block_mean(q, block), ops.block_mean(k, block)
        return ops.select_flashomni(*means, symbols, **options)

    return make


def select_arms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> dict[str, Callable]:
    """What choosing symbols is made of. Planning is what attention does where no tile is active."""
    _, tokens, heads, _ = q.shape
    symbols = SparseSymbols.ones(1, heads, tokens, tokens, block, block, q.device)
    q_mean, k_mean = ops.block_mean(q, block), ops.block_mean(k, block)
    options = {"text_start": 0, "text_length": min(TEXT, tokens), "tau_q": TAU_Q, "tau_kv": TAU_KV}
    arms = {
        "block means of q and k": lambda: (ops.block_mean(q, block), ops.block_mean(k, block)),
        "selection": lambda: ops.select_flashomni(q_mean, k_mean, symbols, **options),
        "means and selection": make_symbols(q, k, block),
    }
    rows, weight = (q.clone(), k.clone()), torch.ones_like(q[0, 0, 0])
    cos = sin = torch.ones(tokens, q.shape[-1], device=q.device)
    means = [torch.empty_like(q_mean) for _ in rows]

    def apart() -> None:
        for x in rows:
            ops.norm_rope(x, weight, cos, sin)
            ops.block_mean(x, block)

    def together() -> None:
        for x, mean in zip(rows, means, strict=True):
            ops.norm_rope_mean(x, weight, cos, sin, mean, block=block)

    arms |= {"norm, RoPE, then means of q and k": apart, "norm, RoPE and means in one read": together}
    if q.is_cuda:
        nothing = SparseSymbols.zeros(1, heads, tokens, tokens, block, block, q.device)
        out, make = torch.zeros_like(q), make_symbols(q, k, block)
        arms["planning"] = lambda: ops.sparse_attention(q, k, v, nothing, out=out)
        arms["selection and planning"] = lambda: (arms["selection"](), arms["planning"]())
        arms["means, selection and planning"] = lambda: (make(), arms["planning"]())
    return arms


def norm_arms(q: torch.Tensor, k: torch.Tensor) -> dict[str, tuple[float, Callable]]:
    """By name: how many tensors of q's size are moved, and the arm. Tables of rotations do not count."""

    def tables(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.ones(q.shape[1], head_dim, device=q.device),) * 2

    x, keys, weight, each = q.clone(), k.clone(), torch.ones_like(q[0, 0, 0]), tables(q.shape[-1])
    flat = q.flatten(2)
    flat_out, (scale, shift) = torch.empty_like(flat), flat[:, :2].unbind(1)
    wide = torch.randn(*q.shape[:2], *WIDE, device=q.device).to(q.dtype)
    wide_weight, wide_tables = torch.ones_like(wide[0, 0]).flatten(), tables(WIDE[1])
    return {
        "norm and RoPE of q and k": (
            4,
            lambda: ops.norm_rope(x, weight, *each, keys=keys, keys_weight=weight),
        ),
        f"norm over {WIDE[0]} heads of {WIDE[1]}, and RoPE": (
            2 * wide.numel() / q.numel(),
            lambda: ops.norm_rope(wide, wide_weight, *wide_tables),
        ),
        "adaptive layer norm": (2, lambda: ops.ada_layer_norm(flat, scale, shift, out=flat_out)),
    }


def forecast_arms(like: torch.Tensor) -> dict[str, tuple[float, Callable]]:
    """By name: how many tensors are moved, and the arm."""
    fp8 = (1 + 4 / 128) / like.itemsize  # of a tensor
    feature, half = like.flatten(2), half_of_the_rows(like)
    arms: dict[str, tuple[float, Callable]] = {}
    for order in ORDERS:
        derivatives = [torch.randn_like(like) for _ in range(order + 1)]
        coefficients = torch.tensor([1.0, 2.0, 2.0, 4.0 / 3], device=like.device)[: order + 1].contiguous()
        out = torch.empty_like(like)
        rows = out.flatten(2)  # as caches have them: all heads side by side
        arms[f"taylor_update D={order}"] = (
            2 + 2 * order,
            lambda d=derivatives, n=order: ops.taylor_update(like, d, gap=4, valid=n),
        )
        arms[f"taylor_forecast D={order}"] = (
            2 + order,
            lambda d=derivatives, c=coefficients, o=out: ops.taylor_forecast(d, c, out=o),
        )
        values, scales = zip(*(ops.quantize_fp8(d.flatten(2)) for d in derivatives), strict=True)
        arms[f"taylor_forecast of fp8 D={order}"] = (
            1 + (1 + order) * fp8,
            lambda v=values, s=scales, c=coefficients, o=rows: ops.taylor_forecast(v, c, o, s),
        )
        flat = [d.flatten(2) for d in derivatives]
        arms[f"taylor_forecast of half the rows D={order}"] = (
            (2 + order) / 2,
            lambda d=flat, c=coefficients, o=rows: ops.taylor_forecast(d, c, o, None, half),
        )
        arms[f"taylor_forecast of fp8, half the rows D={order}"] = (
            (1 + (1 + order) * fp8) / 2,
            lambda v=values, s=scales, c=coefficients, o=rows: ops.taylor_forecast(v, c, o, s, half),
        )
        updated = [[tensor.clone() for tensor in tensors] for tensors in (values, scales)]
        arms[f"taylor_update of fp8 D={order}"] = (
            1 + (1 + 2 * order) * fp8,
            lambda v=updated[0], s=updated[1], n=order: ops.taylor_update(
                feature, v, gap=4, valid=n, scales=s
            ),
        )
    values, scales = ops.quantize_fp8(feature)
    with_last = values.clone(), scales.clone(), torch.empty_like(feature)
    arms["taylor_update of fp8 D=0 with the next difference"] = (
        2 + 2 * fp8,
        lambda: ops.taylor_update(
            feature, [with_last[0]], gap=4, valid=1, scales=[with_last[1]], last=with_last[2]
        ),
    )
    arms["quantize_fp8"] = (1 + fp8, lambda: ops.quantize_fp8(feature, values, scales))
    return arms


def half_of_the_rows(like: torch.Tensor) -> SparseSymbols:
    """Every second row block of [B, M, ..] is cached, for all heads."""
    batch, tokens = like.shape[:2]
    cache = torch.arange(-(-tokens // 128), device=like.device) % 2 == 1
    return SparseSymbols.from_masks(cache.expand(batch, 1, -1), None, q_tokens=tokens, kv_tokens=tokens)


@torch.inference_mode()
def run(
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    block: int,
    dtype: torch.dtype,
    rounds: int,
    seed: int = 0,
    device: str = "cpu",
) -> list[dict]:
    """Rows of suites "select", "norm" and "forecast". Baselines: one dense attention; for the others, a copy.

    copy_share: bytes moved a second, as a share of what the copy moves. On a GPU, kernels_us: microseconds of
    each kernel by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    bq, bk, bv = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out = torch.empty_like(q)
    selecting, norming, forecasting = select_arms(q, k, v, block), norm_arms(q, k), forecast_arms(q)
    moving = norming | forecasting
    arms = selecting | {name: arm for name, (_, arm) in moving.items()}
    arms["sdpa"] = lambda: F.scaled_dot_product_attention(bq, bk, bv)
    arms["copy"] = lambda: out.copy_(q)
    if q.is_cuda:
        arms["sdpa"] = attention_cuda.cudnn(q, k, v)
    ms = (cuda if q.is_cuda else harness).interleave(arms, rounds)
    dense = 4.0 * heads * head_dim * tokens * tokens
    kernels = cuda.kernels_us(selecting) if q.is_cuda else {}
    rows = []
    for name in (*selecting, *moving):
        case = {
            "what": name,
            "seqlen": tokens,
            "heads": heads,
            "head_dim": head_dim,
            "block": [block, block],
            "dtype": str(dtype).removeprefix("torch."),
        }
        if name in selecting:
            baseline = ("cudnn" if q.is_cuda else "torch_sdpa", ms["sdpa"], dense)
            rows.append(harness.row("select", case, ms[name], None, baseline))
            if q.is_cuda:
                rows[-1]["kernels_us"] = kernels[name]
            continue
        suite = "norm" if name in norming else "forecast"
        found = harness.row(suite, case, ms[name], None, ("torch_copy", ms["copy"], None))
        found["copy_share"] = moving[name][0] / 2 * ms["copy"] / ms[name]
        rows.append(found)
    return rows
