"""What the examples share: the command line, symbols of a given sparsity, and timing."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import flashomni


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=int, default=512, help="text tokens, which are never cached")
    parser.add_argument("--image", type=int, default=None, help="image tokens (16384 on a GPU, 2048 else)")
    parser.add_argument("--heads", type=int, default=None, help="24 on a GPU, 4 else")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=None, help="20 on a GPU, 5 else")
    found = parser.parse_args()
    on_gpu = found.device.startswith("cuda")
    for name, gpu, cpu in (("image", 16384, 2048), ("heads", 24, 4), ("repeats", 20, 5)):
        if getattr(found, name) is None:
            setattr(found, name, gpu if on_gpu else cpu)
    found.tokens = found.text + found.image
    found.dtype = torch.bfloat16
    heads = f"{found.heads} heads of {found.head_dim}"
    print(f"{found.device}, {found.text} + {found.image} tokens, {heads}, bfloat16")
    return found


def cache_bits(options: argparse.Namespace, sparsity: float) -> torch.Tensor:
    """bool [q_blocks, heads]: False for about `sparsity` of the tiles, never for one with text."""
    blocks = -(-options.tokens // 128)
    keep = torch.rand(blocks, options.heads) >= sparsity
    keep[: -(-options.text // 128)] = True
    return keep.to(options.device)


def pack(bits: torch.Tensor, indptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return flashomni.segment_packbits(bits.flatten(), indptr, bitorder="little")


def milliseconds(options: argparse.Namespace, *functions: Callable[[], object]) -> list[float]:
    """The median of each; they take turns, as machines drift."""
    synchronize = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    seconds = [[] for _ in functions]
    for turn in range(options.repeats + 1):
        for function, taken in zip(functions, seconds, strict=True):
            synchronize()
            begun = time.perf_counter()
            function()
            synchronize()
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - begun)
    return [1e3 * statistics.median(taken) for taken in seconds]


def check(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """bfloat16's rounding, relative to the largest value; else the example fails."""
    error = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error < 2**-6:
        raise SystemExit(f"{name}: relative error {error:.4f}, expected less than {2**-6:.4f}")


def row(name: str, sparsity: float, sparse: float, dense: float) -> None:
    print(
        f"{name:<8} sparsity {sparsity:4.2f}  {sparse:9.3f} ms  dense {dense:9.3f} ms  {dense / sparse:5.2f}x"
    )
