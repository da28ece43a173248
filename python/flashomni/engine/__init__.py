"""The Update-Dispatch engine: steps, state and layers, without any model."""

from flashomni.engine.engine import Engine
from flashomni.engine.follow import follow
from flashomni.engine.layer import Attention, Output, Stream
from flashomni.engine.linear import (
    FloatNorm,
    LinearRows,
    apply_linear,
    linear_tiles,
    norm_and_rope,
    untouched,
    why_no_norm,
    why_not_plain,
)
from flashomni.engine.stats import RunStats

__all__ = [
    "Attention",
    "Engine",
    "FloatNorm",
    "LinearRows",
    "Output",
    "RunStats",
    "Stream",
    "apply_linear",
    "follow",
    "linear_tiles",
    "norm_and_rope",
    "untouched",
    "why_no_norm",
    "why_not_plain",
]
