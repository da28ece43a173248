"""A representative set of small problems, for compute-sanitizer to watch: `python gpu_sanitize.py`. Each is
also solved in float64, so that what the sanitizer saw was right."""

from __future__ import annotations

import torch
from gpu_problems import check, make_problem

from flashomni import sparse_attention

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


if __name__ == "__main__":
    with torch.no_grad():
        print(f"{attention()} problems, all right")
