"""A representative set of small problems, for compute-sanitizer to watch: `python gpu_sanitize.py`. Each is
also solved in float64, so that what the sanitizer saw was right."""

from __future__ import annotations

from contextlib import nullcontext

import gpu_gemm_problems as gemm_problems
import reference
import torch
from gpu_problems import check, make_problem

from flashomni import (
    SparseSymbols,
    ada_layer_norm,
    block_mean,
    norm_rope,
    norm_rope_mean,
    quantize_fp8,
    select_flashomni,
    sparse_attention,
    summarize_symbols,
    taylor_forecast,
    taylor_update,
)

BLOCKS = [(128, 128), (128, 64), (64, 64)]


def attention() -> int:
    problems = [
        make_problem(dtype, dim, block, 2, 1, [(300, 420)], 0.5, cached=0.8, strided=True)
        for dtype in (torch.bfloat16, torch.float16)
        for dim in (64, 80, 96, 128, 256)
        for block in BLOCKS
    ]
    for block in BLOCKS:
        for options in ({}, {"skewed": True}, {"causal": True}, {"summaries": True}, {"short_blocks": True}):
            problems.append(make_problem(torch.bfloat16, 128, block, 2, 2, [(513, 700)], 0.6, **options))
        lengths = [(129, 300), (1, 77), (640, 1)]
        problems.append(make_problem(torch.bfloat16, 64, block, 2, 1, lengths, 0.7, ragged=True, cached=0.7))
        problems.append(make_problem(torch.bfloat16, 128, block, 1, 1, [(200, 5000)], 0.6))  # split
    for p in problems:
        sparse_attention(p.q, p.k, p.v, p.symbols, out=p.out, lse=p.lse, **p.options)
        check(p)
    return len(problems)


def gemm() -> int:
    q = [
        gemm_problems.make_problem(dtype, 400, 2, dim, 2 * dim, 0.7, for_q=True, width=328, **options)
        for dtype in (torch.bfloat16, torch.float16)
        for dim in (64, 96, 128, 256)
        for options in ({"row_offset": 77, "strided": True}, {"block": 64, "batch": 2})
    ]
    q.append(
        gemm_problems.make_problem(torch.bfloat16, 900, 1, 128, 128, 1.0, for_q=True, width=1600)
    )  # split
    # A plan that shared memory does not hold; clusters that take several tiles each.
    q.append(gemm_problems.make_problem(torch.bfloat16, 300, 50, 8, 400, 0.5, for_q=True, width=64, batch=20))
    q.append(gemm_problems.make_problem(torch.bfloat16, 6000, 1, 6144, 6144, 0.5, for_q=True, width=64))
    o = [
        gemm_problems.make_problem(dtype, 400, 3, dim, 264, 0.5, past=40, order=1, **options)
        for dtype in (torch.bfloat16, torch.float16)
        for dim in (64, 80, 128)
        for options in (
            {"row_offset": 77, "strided": True},
            {"block": 64, "batch": 2},
            {"block": 64, "apart": True, "keep_rows": True},
        )
    ]
    for i, p in enumerate(q):
        out = p.output()
        with gemm_problems.without_counter() if i % 4 == 3 else nullcontext():
            gemm_problems.run_q(p, "gelu", out)
        gemm_problems.check_q(p, "gelu", out)
    for p in o:
        out, cached, factors = p.output(), [p.output(), p.output()], torch.tensor([1.0, 2.0], device="cuda")
        gemm_problems.run_update(p, out, cached)
        gemm_problems.check_update(p, out, cached)
        gemm_problems.hide_cached(p)
        out = p.dispatch_output()
        gemm_problems.run_dispatch(p, cached, factors, out)
        gemm_problems.check_dispatch(p, cached, factors, out)
    return len(q) + len(o)


def symbols() -> int:
    """Means, selection, its summaries, norms and forecasts at odd sizes."""
    problems = 0
    for block in BLOCKS:
        for dim, tokens, text in ((64, 700, 77), (80, 333, 0), (256, 1, 1)):
            q, k = torch.randn(2, 2, tokens, 4, dim, device="cuda", dtype=torch.bfloat16)
            norm_rope(q, torch.ones(dim, device="cuda", dtype=torch.bfloat16), None, None)
            table = torch.ones(tokens, dim, device="cuda")
            active = SparseSymbols.ones(2, 3, tokens, tokens, *block, "cuda")
            wide = torch.ones(3 * dim, device="cuda", dtype=torch.bfloat16)
            norm_rope(q[:, :, :3], wide, table, table, symbols=active, keys=k[:, :, :3], keys_weight=wide)
            rows = q.flatten(2)
            ada_layer_norm(rows[..., : 3 * dim], rows[:, 0, : 3 * dim], rows[:, -1, : 3 * dim])
            chosen = SparseSymbols.zeros(2, 4, tokens, tokens, *block, "cuda")
            similarity = torch.empty(2, -(-tokens // block[1]), 2, device="cuda")
            means = block_mean(q, block[0]), block_mean(k[:, :, :2], block[1], similarity)
            again = torch.empty_like(means[0])
            norm_rope_mean(q, torch.ones(dim, device="cuda").to(q.dtype), None, None, again, block=block[0])
            assert torch.allclose(again, block_mean(q, block[0]), atol=1e-5)
            taus = {"tau_q": 0.5, "tau_kv": 0.2, "s_q": 0.1}
            taus |= {"k_similarity": similarity, "self_similarity": 0.01}
            select_flashomni(*means, chosen, text_start=0, text_length=text, **taus)
            cache, skip = chosen.masks()
            assert skip[cache].any(-1).all()
            wanted = reference.summary(cache.cpu(), skip.cpu())
            summary = [torch.empty_like(part, device="cuda") for part in wanted]
            summarize_symbols(chosen, *summary)
            assert all(torch.equal(got.cpu(), part) for got, part in zip(summary, wanted, strict=True))
            history = [q.clone(), torch.empty_like(q)]
            taylor_update(k, history, gap=2, valid=1)
            rows = k[:, :, :3].flatten(2)  # a row's end cuts its last scale short
            values, scales = quantize_fp8(rows)
            one = torch.ones(1, device="cuda")
            again = taylor_forecast([values], one, torch.empty_like(rows), [scales])
            assert torch.allclose(again.float(), rows.float(), rtol=0.07, atol=0.05)
            kept = {"scales": [scales, scales.clone()], "last": torch.empty_like(rows)}
            taylor_update(rows, [values, values.clone()], gap=1, valid=2, **kept)
            bits = SparseSymbols(summary[0], None, 2, 1, tokens, tokens, *block)
            active = cache.any(1).repeat_interleave(block[0], 1)[:, :tokens, None]
            for kept, scale in ((rows, None), (values, [scales])):
                some = torch.zeros_like(rows)
                taylor_forecast([kept], one, some, scale, bits, rows="active")
                assert torch.equal(some.any(-1, keepdim=True), active)
            forecast = taylor_forecast(history, torch.tensor([1.0, 1.0], device="cuda"))
            assert torch.allclose(forecast.float(), (k + (k - q) / 2).float(), atol=0.1)
            problems += 1
    return problems


if __name__ == "__main__":
    with torch.no_grad():
        print(f"{attention() + gemm() + symbols()} problems, all right")
