"""FlashOmni: sparse attention, sparse linear layers and feature caching for Diffusion Transformers.

Names are imported when first used, so that `import flashomni` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SparseSymbols": "flashomni.symbols",
    "Config": "flashomni.config",
    "StepPlan": "flashomni.schedule",
    "sparse_attention": "flashomni.ops",
    "gemm_q": "flashomni.ops",
    "gemm_o_update": "flashomni.ops",
    "gemm_o_dispatch": "flashomni.ops",
    "block_mean": "flashomni.ops",
    "select_flashomni": "flashomni.ops",
    "summarize_symbols": "flashomni.ops",
    "norm_rope": "flashomni.ops",
    "ada_layer_norm": "flashomni.ops",
    "norm_rope_mean": "flashomni.ops",
    "taylor_update": "flashomni.ops",
    "taylor_forecast": "flashomni.ops",
    "quantize_fp8": "flashomni.ops",
    "packbits": "flashomni.ops",
    "segment_packbits": "flashomni.ops",
    "flashomni_gemm": "flashomni.compat",
    "flashomni_gemm_reduction": "flashomni.compat",
    "cmake_prefix_path": "flashomni.cmake",
    "warmup": "flashomni.jit",
    "enable": "flashomni.diffusers",
    "disable": "flashomni.diffusers",
    "disabled": "flashomni.diffusers",
    "stats": "flashomni.diffusers",
    "explain": "flashomni.diffusers",
    "memory": "flashomni.diffusers",
}
_MODULES = ("attention", "compat", "config", "diffusers", "ops", "schedule", "symbols", "tiny_flux")

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"flashomni.{name}")
    else:
        raise AttributeError(f"module 'flashomni' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
