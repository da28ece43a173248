"""diffusers' FeedForward with a GELU as two dense products, the activation in the first."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.diffusers.blocks.compiled import InGraph
from flashomni.engine import Engine, apply_linear, why_not_plain


class FusedFeedForward(InGraph):
    """forward() of a diffusers FeedForward with a GELU."""

    flashomni = True

    def __init__(self, engine: Engine, module: nn.Module):
        self.engine, self.module, self.own = engine, module, type(module).forward
        self.enroll()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            if not self.engine.enabled:
                return self.own(self.module, hidden_states, *args, **kwargs)
            (out,) = self.trace({"hidden_states": hidden_states}, [hidden_states])
            return out
        module, engine = self.module, self.engine
        ours = engine.enabled and hidden_states.ndim == 3 and not why_not_fused(module, hidden_states.dtype)
        if not ours:
            return self.own(module, hidden_states, *args, **kwargs)
        first, last = module.net[0], module.net[2]
        shape = (*hidden_states.shape[:2], first.proj.out_features)
        inner = engine.buffers.take("feed_forward", shape, hidden_states)
        with engine.ledger("mlp"):
            activation = "gelu_tanh" if first.approximate == "tanh" else "gelu"
            apply_linear(first.proj, hidden_states, inner, activation=activation)
            return ops.gemm_q(inner, last.weight, last.bias)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """One function for all modules: torch.compile makes a graph a function, not a module."""
    return module._flashomni_forward(*args, **kwargs)


def intercept_feed_forward(engine: Engine, module: nn.Module):
    """Puts FusedFeedForward in place; returns a function that takes it out again."""
    fused, forward = FusedFeedForward(engine, module), MethodType(_forward, module)
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
    if type(module) is not nn.GELU:
        return None
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


def why_not_fused(module: nn.Module, dtype: torch.dtype) -> str | None:
    """None if a FeedForward is Linear, GELU, Linear and nothing else that has an effect; else what it is."""
    net = getattr(module, "net", ())
    if type(module).__name__ != "FeedForward" or len(net) not in (3, 4) or type(net[0]).__name__ != "GELU":
        return f"is {type(module).__name__} of another make than Linear, GELU, Linear"
    if any(dropout.training and dropout.p > 0 for dropout in net[1::2]):
        return "has dropout in effect"
    if net[0].__dict__.get("forward") is not None or net[0]._forward_hooks or net[0]._forward_pre_hooks:
        return "has hooks on its activation"
    return why_not_plain(net[0].proj, dtype) or why_not_plain(net[2], dtype)
