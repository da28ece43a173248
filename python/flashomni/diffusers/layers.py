"""The attentions of a model, each with what of it can be sparse and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from flashomni.diffusers.families import Family, JointBlocks, ParallelBlocks, Projections, part
from flashomni.engine import why_no_norm, why_not_plain

HEAD_DIMS = (64, 72, 80, 96, 128, 256)


@dataclass
class Layer:
    """One attention of a model. `refusal` says why it is left to its own code; `fallbacks`, which parts are
    called as modules instead of being run by our operators."""

    index: int
    name: str
    block: nn.Module
    spec: JointBlocks | ParallelBlocks
    refusal: str | None = None
    fallbacks: list[str] = field(default_factory=list)
    gemm_o: bool = True  # the output projections are ours

    @property
    def attention(self) -> nn.Module:
        return getattr(self.block, self.spec.attention)


def find_layers(model: nn.Module, family: Family) -> list[Layer]:
    """Every attention that the family describes, in the model's order, looked at as the model is now."""
    layers = []
    for spec in family.blocks:
        for i, block in enumerate(part(model, spec.path)):
            layer = Layer(len(layers), f"{spec.path}.{i}", block, spec)
            layer.refusal = _refusal(layer)
            if layer.refusal is None:
                _find_fallbacks(layer)
            layers.append(layer)
    return layers


def _refusal(layer: Layer) -> str | None:
    attention = layer.attention
    if attention.head_dim not in HEAD_DIMS:
        return f"head_dim {attention.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    processor = attention.processor
    name = type(processor).__name__
    if name != layer.spec.processor and not getattr(processor, "flashomni", False):
        return f"has the processor {name}, not {layer.spec.processor}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "is set up for context parallelism"
    if getattr(layer.block, "_compiled_call_impl", None) is not None:
        return "is compiled"
    forward = layer.block.__dict__.get("forward")
    if isinstance(layer.spec, ParallelBlocks) and forward is not None and not hasattr(forward, "flashomni"):
        return "has another hook on its forward (set that up after flashomni.enable)"
    return None


def _find_fallbacks(layer: Layer) -> None:
    spec, attention = layer.spec, layer.attention
    dtype = next(layer.block.parameters()).dtype

    def look(owner: nn.Module, name: str, why) -> bool:
        reason = why(part(owner, name), dtype)
        if reason is not None:
            layer.fallbacks.append(f"{name} {reason}")
        return reason is None

    def look_at_stream(stream: Projections) -> None:
        for name in (stream.q, stream.k, stream.v):
            look(attention, name, why_not_plain)
        for name in (stream.norm_q, stream.norm_k):
            look(attention, name, why_no_norm)
        if stream.out is not None:
            layer.gemm_o &= look(attention, stream.out, why_not_plain)

    if isinstance(spec, JointBlocks):
        look_at_stream(spec.image)
        look_at_stream(spec.text)
        for name in spec.feed_forward:
            look(layer.block, name, why_not_fused)
        return
    look_at_stream(spec.stream)
    look(layer.block, spec.mlp, why_not_plain)
    layer.gemm_o &= look(layer.block, spec.out, why_not_plain)
    activation = part(layer.block, spec.activation)
    if fused_activation(activation) is None:
        layer.fallbacks.append(f"{spec.activation} is {type(activation).__name__}, not GELU")


def fused_activation(module: nn.Module) -> str | None:
    """The name under which gemm_q knows an activation module; None if it does not."""
    if type(module) is not nn.GELU:
        return None
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


def why_not_fused(module: nn.Module, dtype: torch.dtype) -> str | None:
    """None if a FeedForward is Linear, GELU, Linear and nothing else that has an effect; else what it is."""
    net = getattr(module, "net", ())
    if type(module).__name__ != "FeedForward" or len(net) != 3 or type(net[0]).__name__ != "GELU":
        return f"is {type(module).__name__} of another make than Linear, GELU, Linear"
    if net[1].training and net[1].p > 0:
        return "has dropout in effect"
    if net[0].__dict__.get("forward") is not None or net[0]._forward_hooks or net[0]._forward_pre_hooks:
        return "has hooks on its activation"
    return why_not_plain(net[0].proj, dtype) or why_not_plain(net[2], dtype)
