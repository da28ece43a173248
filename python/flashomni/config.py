"""Settings of the engine, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

MAX_ORDER = 3
BLOCKS = (64, 128)
CACHE_DTYPES = ("model", "float8_e4m3")
FOLLOWERS, FOLLOW = ("mlp", "cross_attention"), ("dense", "follow")
PLACES = ("device", "host")


@dataclass(frozen=True)
class Config:
    """How a pipeline is made sparse. Names follow diffusers' cache configurations where they mean the same.

    cache_interval: N, an Update every N steps.
    max_order: D, order of the forecast between Updates; 0 reuses as is. At most 3.
    tau_q: share of vision query blocks' importance that may be cached (arXiv 2509.25401, section 3), 0 to 1.
    tau_kv: softmax mass of a row's key blocks that may be skipped, 0 to 1.
    self_similarity: blocks of keys whose tokens have a mean cosine of at most this are never skipped, 0 to 1
        (SpargeAttn, arXiv 2502.18137; the paper's HunyuanVideo has 0.1); 0 switches that off.
    s_q: where a layer's share of active tiles falls to s_q, the whole layer is reused; 0 switches that off.
    disable_cache_before_step: warm-up steps that stay dense.
    cooldown_steps: last steps that stay dense.
    ramp_power: tau_q and tau_kv are scaled by (step / steps)^ramp_power; 0 leaves them as they are.
    block_q, block_kv: tokens a block, 64 or 128.
    cache_dtype: what is kept between Updates is of the model's dtype ("model"), or "float8_e4m3" with a scale
        for every 128 columns: about half the memory, rounded to three bits of mantissa.
    history: where what only Updates read is kept, "device" or "host": pinned memory, copied beside attention.
    mlp: "dense", or "follow" (not in the paper): in a Dispatch step, rows that are cached in all heads of an
        attention have the feed-forward after it forecast too, or in parallel blocks the sum of attention and
        MLP. max_order + 1 more tensors are kept a layer.
    cross_attention: "dense", or "follow": the same for a cross-attention after it (Wan, Kandinsky 5).
    policy: name of the policy that chooses the symbols.
    dense_layers: indices of transformer layers that stay dense.
    protect_conditions: tokens of pictures that are given (to edit) are never cached nor skipped, as text is.
    cuda_graphs: on a GPU each kind of step is captured as a CUDA graph once and replayed for all others.
    strict: raise where something would run dense unasked, instead of saying so in `flashomni.explain`.

    Raises ValueError or TypeError that names the field.
    """

    cache_interval: int = 5
    max_order: int = 1
    tau_q: float = 0.5
    tau_kv: float = 0.05
    self_similarity: float = 0.0
    s_q: float = 0.0
    disable_cache_before_step: int = 8
    cooldown_steps: int = 1
    ramp_power: float = 2.0
    block_q: int = 128
    block_kv: int = 128
    cache_dtype: str = "model"
    history: str = "device"
    mlp: str = "dense"
    cross_attention: str = "dense"
    policy: str = "flashomni"
    dense_layers: tuple[int, ...] = ()
    protect_conditions: bool = True
    cuda_graphs: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        _check_integer("cache_interval", self.cache_interval, "an integer >= 1", lambda n: n >= 1)
        _check_integer(
            "max_order", self.max_order, f"an integer from 0 to {MAX_ORDER}", lambda n: 0 <= n <= MAX_ORDER
        )
        for name in ("disable_cache_before_step", "cooldown_steps"):
            _check_integer(name, getattr(self, name), "an integer >= 0", lambda n: n >= 0)
        for name in ("block_q", "block_kv"):
            _check_integer(name, getattr(self, name), f"one of {BLOCKS}", lambda n: n in BLOCKS)
        for name in ("tau_q", "tau_kv", "self_similarity", "s_q"):
            _check_number(name, getattr(self, name), "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _check_number("ramp_power", self.ramp_power, "a finite number >= 0", lambda x: x >= 0)
        if not isinstance(self.policy, str) or not self.policy:
            raise TypeError(f"policy: expected a policy's name, got {self.policy!r}")
        choices = {"cache_dtype": CACHE_DTYPES, "history": PLACES} | dict.fromkeys(FOLLOWERS, FOLLOW)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("protect_conditions", "cuda_graphs", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        try:
            layers = tuple(self.dense_layers)
        except TypeError:
            raise TypeError(f"dense_layers: expected layer indices, got {self.dense_layers!r}") from None
        for layer in layers:
            _check_integer("dense_layers", layer, "integers >= 0", lambda n: n >= 0)
        object.__setattr__(self, "dense_layers", layers)

    @property
    def caches_without_text(self) -> bool:
        """Whether the policy may cache anything of a sequence without text."""
        return self.policy != "flashomni"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """A named configuration, with fields changed where `changes` says so. ValueError lists the names."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(sorted(PRESETS))}, got {name!r}")
        unknown = sorted(set(changes) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"preset: no such field: {', '.join(unknown)}")
        return cls(**{**PRESETS[name], **changes})


# The paper's settings (arXiv 2509.25401) for its two models, and one that is exact up to rounding.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "flux": {
        "tau_q": 0.5,
        "tau_kv": 0.15,
        "cache_interval": 5,
        "max_order": 1,
        "s_q": 0.3,
        "ramp_power": 2.0,
    },
    "hunyuan_video": {
        "tau_q": 0.5,
        "tau_kv": 0.05,
        "cache_interval": 6,
        "max_order": 1,
        "s_q": 0.3,
        "ramp_power": 1.7,
    },
    "exact": {"tau_q": 0.0, "tau_kv": 0.0, "s_q": 0.0},
}


def _check_integer(name: str, value: Any, expected: str, valid: Callable[[int], bool]) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_number(name: str, value: Any, expected: str, valid: Callable[[float], bool]) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value) or not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
