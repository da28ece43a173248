"""A feed-forward with a GELU as two dense products, the activation in the first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.base import Layer
from flashomni.diffusers.blocks.compiled import InGraph
from flashomni.diffusers.blocks.makes import feed_forward_layers
from flashomni.diffusers.call import Call
from flashomni.engine import Engine, apply_linear, follow, linear_tiles, untouched, why_not_plain
from flashomni.policies import Segment
from flashomni.symbols import SparseSymbols


@dataclass(frozen=True)
class Following:
    """The attention whose rows a feed-forward follows (Config.mlp). alone: it has the image's rows only; else
    all of the sequence's."""

    call: Call
    layer: int
    alone: bool

    def start_of(self, rows: int) -> int | None:
        """Where `rows` begin in the joint sequence; None if they are other rows than the attention's."""
        state = self.call.engine.contexts.get(self.call.engine.context, self.layer)
        if state is None:
            return None
        segment = self.call.image if self.alone else Segment("all", 0, state.shape[1])
        return segment.start if segment.length == rows else None


def following_of(call: Call, layer: Layer, *, alone: bool) -> Following | None:
    """As the engine's config has it."""
    return Following(call, layer.index, alone) if call.engine.config.mlp == "follow" else None


class FusedFeedForward(InGraph):
    """forward() of a feed-forward of a known make (feed_forward_layers)."""

    flashomni = True

    def __init__(self, engine: Engine, module: nn.Module, following: Following | None):
        self.engine, self.module, self.own = engine, module, type(module).forward
        self.following = following
        self.enroll(module)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            if not self.engine.enabled:
                return self.own(self.module, hidden_states, *args, **kwargs)
            (out,) = self.trace({"hidden_states": hidden_states}, ["hidden_states"])
            return out
        module, engine = self.module, self.engine
        ours = engine.enabled and hidden_states.ndim == 3 and not why_not_fused(module, hidden_states.dtype)
        if not ours:
            return self.own(module, hidden_states, *args, **kwargs)
        following = self.following
        start = following.start_of(hidden_states.shape[1]) if following is not None else None
        if start is None:
            return self._products(hidden_states, None, None)
        compute = partial(self._products, hidden_states, start=start)
        return follow(engine, following.layer, "feed_forward", compute, start=start)

    def _products(
        self, x: Tensor, rows: SparseSymbols | None, out: Tensor | None, *, start: int = 0
    ) -> Tensor:
        """On the active row blocks; x begins at row `start` of the joint sequence."""
        layers = feed_forward_layers(self.module)
        first, last = layers.first, layers.last
        inner = self.engine.buffers.take("feed_forward", (*x.shape[:2], first.out_features), x)
        with self.engine.ledger("mlp"):
            apply_linear(first, x, inner, rows, row_offset=start, activation=_gelu(layers.activation))
            return linear_tiles(inner, last.weight, last.bias, rows, row_offset=start, out=out)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """One function for all modules: torch.compile makes a graph a function, not a module."""
    return module._flashomni_forward(*args, **kwargs)


def intercept_feed_forward(engine: Engine, module: nn.Module, following: Following | None = None):
    """Puts FusedFeedForward in place; returns a function that takes it out again."""
    fused, forward = FusedFeedForward(engine, module, following), MethodType(_forward, module)
    if "forward" not in module.__dict__:
        module._flashomni_forward = fused
        module.forward = forward

    def restore() -> None:
        engine.enabled = False
        if module.__dict__.get("forward") is forward:
            del module.forward, module._flashomni_forward

    return restore


def fused_activation(module: nn.Module) -> str | None:
    """The name under which gemm_q knows an activation module; None if it does not."""
    return _gelu(module) if type(module) is nn.GELU else None


def _gelu(module: nn.Module) -> str:
    """Of torch's make or diffusers': the name under which gemm_q knows it."""
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


def why_not_fused(module: nn.Module, dtype: torch.dtype) -> str | None:
    """None if a feed-forward is Linear, GELU, Linear and nothing else that has an effect; else what it is."""
    layers = feed_forward_layers(module)
    if layers is None:
        return f"is {type(module).__name__} of another make than Linear, GELU, Linear"
    if any(dropout.training and dropout.p > 0 for dropout in layers.dropouts):
        return "has dropout in effect"
    if not untouched(layers.activation):
        return "has hooks on its activation"
    return why_not_plain(layers.first, dtype) or why_not_plain(layers.last, dtype)
