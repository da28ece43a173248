"""Patch embeddings by convolution, whose results the blocks read token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flashomni.engine import Engine, untouched

_CHANNELS_LAST = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def lay_out_tokens(engine: Engine, transformer: nn.Module) -> Callable[[], None]:
    """Makes the convolutions before the blocks give contiguous tokens; returns what takes that off again.

    Models make [B, tokens, C] of [B, C, ..] by a transposed view. Sums keep the order of what they add to, so
    that the residual would stay transposed through all blocks: every norm copies it first, every sum is slow.
    """
    patches = [
        module
        for child in transformer.children()
        if not isinstance(child, nn.ModuleList)
        for module in child.modules()
        if _cuts_patches(module)
    ]
    for module in patches:
        module.forward = _Embedding(engine, module)

    def restore() -> None:
        for module in patches:
            if isinstance(module.__dict__.get("forward"), _Embedding):
                del module.forward

    return restore


def _cuts_patches(module: nn.Module) -> bool:
    """Whether it is a convolution over patches that neither overlap nor are padded, and nobody's else."""
    return (
        type(module) in _CHANNELS_LAST
        and module.kernel_size == module.stride
        and module.groups == 1
        and not any(module.padding)
        and set(module.dilation) == {1}
        and type(module.weight) is nn.Parameter
        and untouched(module)
    )


class _Embedding:
    """forward() of such a convolution, with channels last in memory."""

    def __init__(self, engine: Engine, module: nn.Module):
        self.engine, self.module = engine, module

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if not self.engine.enabled:
            return type(module).forward(module, x)
        # cuDNN turns its result round once, and we would once more.
        if x.is_cuda and x.ndim == 2 + len(module.kernel_size):
            return as_product(module, x)
        return type(module).forward(module, x).contiguous(memory_format=_CHANNELS_LAST[type(module)])


def as_product(module: nn.Module, x: Tensor) -> Tensor:
    """The convolution as the product of patches and weight that it is."""
    counts = []
    for dim, size in enumerate(module.kernel_size):  # [B, C, n0, p0, n1, p1, ..], whole patches alone
        counts.append(x.shape[2 + 2 * dim] // size)
        x = x.narrow(2 + 2 * dim, 0, counts[-1] * size).unflatten(2 + 2 * dim, (counts[-1], size))
    places, within = range(2, x.ndim, 2), range(3, x.ndim, 2)
    rows = x.permute(0, *places, 1, *within).flatten(1 + len(counts))
    return nn.functional.linear(rows, module.weight.flatten(1), module.bias).movedim(-1, 1)
