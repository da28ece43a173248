"""Patch embeddings by convolution, whose results the blocks read token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flashomni.engine import Engine

_CHANNELS_LAST = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def lay_out_tokens(engine: Engine, transformer: nn.Module) -> Callable[[], None]:
    """Makes the convolutions before the blocks give contiguous tokens; returns what takes that off again.

    Models make [B, tokens, C] of [B, C, ..] by a transposed view. Sums keep the order of what they add to, so
    that the residual would stay transposed through all blocks: every norm copies it first, every sum is slow.
    """

    def after(convolution: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not engine.enabled:
            return output
        return output.contiguous(memory_format=_CHANNELS_LAST[type(convolution)])

    patches = [
        module
        for child in transformer.children()
        if not isinstance(child, nn.ModuleList)
        for module in child.modules()
        if type(module) in _CHANNELS_LAST and module.kernel_size == module.stride
    ]
    handles = [module.register_forward_hook(after) for module in patches]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore
