"""Where a picture's seconds go, in the same categories whether torch or this library does the work."""

from __future__ import annotations

import re
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# The engine's ledger entries, and the modules of diffusers' own path that do the same work.
LEDGER = {
    "attention": "attention",
    "gemm_q": "projections",
    "gemm_kv": "projections",
    "gemm_o": "projections",
    "mlp": "MLP",
    "select": "selection and forecast",
    "forecast": "selection and forecast",
}
PROJECTION = re.compile(
    r"\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)$|^single_transformer_blocks\.\d+\.proj_out$"
)
MLP = re.compile(r"^transformer_blocks\.\d+\.ff(_context)?$|^single_transformer_blocks\.\d+\.(proj|act)_mlp$")


class _AttentionTimer(TorchFunctionMode):
    """Adds up the time in torch's SDPA."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        start = perf_counter()
        result = func(*args, **(kwargs or {}))
        self.add("attention", perf_counter() - start)
        return result


class ModelClock:
    """Times one run of a FLUX transformer on the CPU, by what its seconds go into.

    With an `engine` (what flashomni.enable gives) the engine's own ledger times what it runs; without one,
    hooks on
    the modules and a watch on torch's SDPA do. In a single block the output projection also holds the second
    half of
    the MLP: one matrix in FLUX, so it counts as projection in every arm.

        with ModelClock(pipe.transformer, engine) as clock: ...
        clock.breakdown(total_seconds)
    """

    def __init__(self, transformer: torch.nn.Module, engine: Any | None = None):
        self.transformer, self.engine = transformer, engine
        self.seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __enter__(self) -> ModelClock:
        self._stack = ExitStack()
        if self.engine is not None:
            self._before = self.engine.ledger.enabled
            self.engine.ledger.enabled = True
            return self
        self._stack.enter_context(_AttentionTimer(self.add))
        for path, module in self.transformer.named_modules():
            for pattern, name in ((MLP, "MLP"), (PROJECTION, "projections")):
                if pattern.search(path):
                    self._watch(module, name)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        if self.engine is not None:
            for entry, name in LEDGER.items():
                self.add(name, self.engine.ledger.seconds.get(entry, 0.0))
            self.engine.ledger.enabled = self._before

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        started = []

        def before(*_):
            started.append(perf_counter())

        def after(*_):
            self.add(name, perf_counter() - started.pop())

        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
            self._stack.callback(handle.remove)

    def breakdown(self, total: float) -> dict[str, float]:
        """Seconds by category; what is left of `total` is "other"."""
        parts = {name: value for name, value in self.seconds.items() if value > 0}
        return {**parts, "other": max(total - sum(parts.values()), 0.0)}
