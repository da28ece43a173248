"""Blocks with one stream and an MLP beside the attention: our forward stands in for the block's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.base import (
    Blocks,
    Layer,
    Projections,
    Restore,
    keeps_o,
    part,
    refuse_masks,
    rope_of,
    stream_of,
)
from flashomni.diffusers.blocks.compiled import InGraph
from flashomni.diffusers.blocks.feed_forward import fused_activation
from flashomni.diffusers.call import Call
from flashomni.engine import Attention, Output, apply_linear, why_not_plain
from flashomni.engine.memory import LayerShape


def modulate(norm: nn.Module, x: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(what attention and MLP see, gate [B, C] or [B, tokens, C]) of the usual adaptive norm."""
    return norm(x, emb=arguments["temb"])


@dataclass(frozen=True, kw_only=True)
class ParallelBlocks(Blocks):
    """Blocks with text and image in one sequence, and an MLP beside the attention.

    out([attention, activation(mlp)]), gated and added to the input. The block takes hidden_states and
    encoder_hidden_states and returns both, in the order `returns`; or it takes and returns hidden_states
    alone, which then hold both. What else it takes by name goes to `modulate`.

    gated: mlp makes [value, gate] and the hidden columns are value * activation(gate).
    """

    stream: Projections
    norm: str
    mlp: str
    activation: str  # module; GELU is fused into the product before it
    out: str
    gated: bool = False
    returns: tuple[str, str] = ("encoder_hidden_states", "hidden_states")
    modulate: Callable[[nn.Module, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]] = modulate

    def streams(self) -> tuple[Projections, ...]:
        return (self.stream,)

    def refusal(self, layer: Layer) -> str | None:
        forward = layer.block.__dict__.get("forward")
        if forward is not None and not hasattr(forward, "flashomni"):
            return "has another hook on its forward (set that up after flashomni.enable)"
        return None

    def find_fallbacks(self, layer: Layer) -> None:
        layer.look_at(self.stream)
        layer.look(layer.block, self.mlp, why_not_plain)
        layer.gemm_o &= layer.look(layer.block, self.out, why_not_plain)
        activation = part(layer.block, self.activation)
        if not self.gated and fused_activation(activation) is None:
            layer.fallbacks.append(f"{self.activation} is {type(activation).__name__}, not GELU")

    def intercept(self, call: Call, layer: Layer) -> Restore:
        forward = ParallelForward(call, layer)
        layer.block.forward = forward

        def restore() -> None:
            # A hook that came later holds our forward: it then passes everything on to the block's own.
            call.engine.enabled = False
            if layer.block.__dict__.get("forward") is forward:
                del layer.block.forward

        return restore

    def shape_of(self, layer: Layer, image: int, text: int) -> LayerShape:
        tokens, out = image + text, part(layer.block, self.out)
        return LayerShape(
            name=layer.name,
            heads=layer.heads,
            head_dim=layer.head_dim,
            tokens=tokens,
            outputs=((tokens, out.out_features),),
            keeps_o=keeps_o([out]),
            scratch=(
                ("o", tokens * out.in_features),
                *([("mlp", tokens * part(layer.block, self.mlp).out_features)] if self.gated else []),
            ),
        )


class ParallelForward(InGraph):
    """forward() of such a block: image and text, each [B, tokens, C].

    Attention and MLP write side by side into one buffer, so that one projection takes both without a copy.
    """

    flashomni = True

    def __init__(self, call: Call, layer: Layer):
        self.call, self.engine, self.layer, self.spec = call, call.engine, layer, layer.spec
        self.block, self.own = layer.block, type(layer.block).forward
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = _signature(type(layer.block)).parameters
        self.names = tuple(name for name, p in parameters.items() if p.kind is named)[1:]
        self.enroll()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            if not self.engine.enabled:
                return self.own(self.block, *args, **kwargs)
            return self._traced({**dict(zip(self.names, args, strict=False)), **kwargs})
        block, spec, engine, layer = self.block, self.spec, self.engine, self.layer
        attn = layer.attention
        if not (engine.enabled and type(attn.processor).__name__ == spec.processor):
            return self.own(block, *args, **kwargs)
        given = _signature(type(block)).bind(block, *args, **kwargs).arguments
        options = given.get("joint_attention_kwargs") or {}
        masks = {"attention_mask": given.get("attention_mask", options.get("attention_mask"))}
        refuse_masks(spec, layer.name, masks)
        of_image, of_text = given["hidden_states"], given.get("encoder_hidden_states")
        if of_text is None:
            joint, residual = self.call.lay_out_whole(of_image.shape[1]), of_image
        else:
            joint = self.call.lay_out(of_text.shape[1], of_image.shape[1])
            residual = join(of_text, of_image) if joint.text.start == 0 else join(of_image, of_text)
        x, gate = spec.modulate(part(block, spec.norm), residual, given)
        mlp = part(block, spec.mlp)
        both = engine.buffers.take("o", (*x.shape[:2], part(block, spec.out).in_features), x)
        self._mlp(mlp, x, both[..., layer.width :])
        attention = Attention(
            layer=layer.index,
            heads=layer.heads,
            head_dim=layer.head_dim,
            text=joint.text,
            condition=joint.condition,
            valid=joint.valid,
            streams=[stream_of(attn, spec.stream, x, 0)],
            outputs=[Output(part(block, spec.out), 0, joint.tokens)],
            o=both,
            rope=rope_of(self.call, spec, given.get("image_rotary_emb"), joint),
        )
        (out,) = engine.attend(attention)
        out = torch.addcmul(residual, gate.unsqueeze(1) if gate.ndim == 2 else gate, out)
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        if of_text is None:
            return out
        parts = {"hidden_states": joint.image, "encoder_hidden_states": joint.text}
        return tuple(out[:, s.start : s.start + s.length] for s in (parts[name] for name in spec.returns))

    def _traced(self, given: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        if given.get("encoder_hidden_states") is None:
            (out,) = self.trace(given, [given["hidden_states"]])
            return out
        return tuple(self.trace(given, [given[name] for name in self.spec.returns]))

    def _mlp(self, mlp: nn.Module, x: Tensor, out: Tensor) -> None:
        module = part(self.block, self.spec.activation)
        activation = fused_activation(module)
        with self.engine.ledger("mlp"):
            if self.spec.gated:
                inner = self.engine.buffers.take("mlp", (*x.shape[:2], mlp.out_features), x)
                apply_linear(mlp, x, inner)
                value, gate = inner.chunk(2, dim=-1)
                torch.mul(module(gate), value, out=out)
                return
            apply_linear(mlp, x, out, activation=activation)
            if activation is None:
                out.copy_(module(out))


@functools.cache
def _signature(block: type) -> inspect.Signature:
    return inspect.signature(block.forward)


def join(first: Tensor, second: Tensor) -> Tensor:
    """[first, second] along the tokens; without a copy where they are neighbouring slices of one tensor, as
    the outputs of the block before are."""
    batch, tokens, width = first.shape
    adjacent = (
        first.stride() == second.stride()
        and first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + tokens * first.stride(1)
        and (batch == 1 or first.stride(0) == (tokens + second.shape[1]) * first.stride(1))
    )
    if not adjacent:
        return torch.cat([first, second], dim=1)
    return first.as_strided((batch, tokens + second.shape[1], width), first.stride())
