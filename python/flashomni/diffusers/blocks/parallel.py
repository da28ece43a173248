"""Blocks with one stream and an MLP beside the attention: our forward stands in for the block's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.diffusers.blocks.adaptive_norm import Modulation, modulation_of
from flashomni.diffusers.blocks.base import (
    Blocks,
    Layer,
    Projections,
    Restore,
    keeps_o,
    output_follower,
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
from flashomni.symbols import SparseSymbols

_TEXT, _IMAGE = "encoder_hidden_states", "hidden_states"


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
    returns: tuple[str, str] = (_TEXT, _IMAGE)
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

    def mlp_can_follow(self, layer: Layer) -> bool:
        return layer.gemm_o  # with the attention, in the projection of both

    def modulation(self, layer: Layer) -> Modulation | None:
        """What the norm makes of temb for ada_layer_norm to do the rest; None where the norm is called."""
        return modulation_of(part(layer.block, self.norm)) if self.modulate is modulate else None

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
            followers=output_follower(out, tokens),
            scratch=(
                ("o", tokens * layer.width),
                ("past", tokens * (out.in_features - layer.width)),
                *([("normed", tokens * out.out_features)] if self.modulation(layer) else []),
                *([("mlp", tokens * part(layer.block, self.mlp).out_features)] if self.gated else []),
            ),
        )


class ParallelForward(InGraph):
    """forward() of such a block: image and text, each [B, tokens, C].

    In a compiled block attention, MLP and the projection of both are one operator; torch compiles what
    is around them.
    """

    flashomni = True

    def __init__(self, call: Call, layer: Layer):
        self.call, self.engine, self.layer, self.spec = call, call.engine, layer, layer.spec
        self.block, self.own = layer.block, type(layer.block).forward
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(self.own).parameters
        self.names = tuple(name for name, p in parameters.items() if p.kind is named)[1:]
        self.norm = part(self.block, self.spec.norm)
        self.modulation = self.spec.modulation(layer)
        self.enroll(self.block)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        block, spec = self.block, self.spec
        if not (self.engine.enabled and type(self.layer.attention.processor).__name__ == spec.processor):
            return self.own(block, *args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        order = self._order(given)
        parts = [given[name] for name in order]
        residual = join(*parts) if len(parts) > 1 else parts[0]
        if self.modulation is not None:
            shift, scale, gate = self.modulation(self.norm, given["temb"]).to(residual.dtype).chunk(3, dim=1)
            out = self._branches({"shift": shift, "scale": scale}, given)
        else:
            x, gate = spec.modulate(self.norm, residual, given)
            out = self._branches({"x": x}, given)
        out = torch.addcmul(residual, gate.unsqueeze(1) if gate.ndim == 2 else gate, out)
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        if len(parts) == 1:
            return out
        results = dict(zip(order, out.split([each.shape[1] for each in parts], dim=1), strict=True))
        if torch.compiler.is_compiling():
            # With the strides of the first block's inputs the next one takes the same graph; torch writes the
            # sum to where it ends up at once.
            return tuple(results[name].clone(memory_format=torch.contiguous_format) for name in spec.returns)
        return tuple(results[name] for name in spec.returns)

    def _order(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the arguments whose rows the block joins, in attention's order."""
        if given.get(_TEXT) is None:
            return (_IMAGE,)
        return (_TEXT, _IMAGE) if self.call.text_first else (_IMAGE, _TEXT)

    def _branches(self, normed: dict[str, Tensor], given: Mapping[str, Any]) -> Tensor:
        """out([attention, activation(mlp)]), [B, tokens, C], of the normed input x, or of the shift and scale
        that make it. Where x is there, only the text's length matters."""
        options = given.get("joint_attention_kwargs") or {}
        arguments = {
            **normed,
            _TEXT: given.get(_TEXT),
            _IMAGE: given[_IMAGE] if "x" not in normed else None,
            "attention_mask": given.get("attention_mask", options.get("attention_mask")),
            "rope": given.get("image_rotary_emb"),
        }
        if not torch.compiler.is_compiling():
            return self.run(arguments)
        return self.trace(arguments, ["x" if "x" in normed else "+".join(self._order(given))])[0]

    def _normed(self, arguments: dict[str, Any]) -> Tensor:
        """The norm of text and image, in scratch and in the order of attention."""
        parts = [arguments[name] for name in self._order(arguments)]
        counts = [each.shape[1] for each in parts]
        x = self.engine.buffers.take("normed", (len(parts[0]), sum(counts), parts[0].shape[2]), parts[0])
        options = {"scale": arguments["scale"], "shift": arguments["shift"], "eps": self.norm.norm.eps}
        for each, out in zip(parts, x.split(counts, dim=1), strict=True):
            ops.ada_layer_norm(each, out=out, **options)
        return x

    def run(self, arguments: dict[str, Any]) -> Tensor:
        block, spec, engine, layer = self.block, self.spec, self.engine, self.layer
        refuse_masks(spec, layer.name, {"attention_mask": arguments.get("attention_mask")})
        x = arguments["x"] if "x" in arguments else self._normed(arguments)
        tokens, text = x.shape[1], arguments.get(_TEXT)
        if text is None:
            joint = self.call.lay_out_whole(tokens)
        else:
            joint = self.call.lay_out(text.shape[1], tokens - text.shape[1])
        attention = Attention(
            layer=layer.index,
            heads=layer.heads,
            head_dim=layer.head_dim,
            text=joint.text,
            condition=joint.condition,
            valid=joint.valid,
            streams=[stream_of(layer.attention, spec.stream, x, 0)],
            outputs=[Output(part(block, spec.out), 0, joint.tokens)],
            o=engine.buffers.take("o", (*x.shape[:2], layer.width), x),
            past=partial(self._mlp, x),
            rope=rope_of(self.call, spec, arguments.get("rope"), joint, x.dtype),
        )
        return engine.attend(attention)[0]

    def _mlp(self, x: Tensor, rows: SparseSymbols | None) -> Tensor:
        """activation(mlp(x)) on active row blocks; the others hold what was there."""
        block, spec, engine = self.block, self.spec, self.engine
        mlp, module = part(block, spec.mlp), part(block, spec.activation)
        columns = part(block, spec.out).in_features - self.layer.width
        out = engine.buffers.take("past", (*x.shape[:2], columns), x)
        activation = fused_activation(module)
        with engine.ledger("mlp"):
            if spec.gated:
                inner = engine.buffers.take("mlp", (*x.shape[:2], mlp.out_features), x)
                apply_linear(mlp, x, inner, rows)
                value, gate = inner.chunk(2, dim=-1)
                return torch.mul(module(gate), value, out=out)
            apply_linear(mlp, x, out, rows, activation=activation)
            return out if activation is not None else out.copy_(module(out))


def join(first: Tensor, second: Tensor) -> Tensor:
    """[first, second] along the tokens; without a copy where they are neighbouring slices of one tensor, as
    the outputs of the block before are. A graph that is traced knows no addresses: there it is a copy."""
    if torch.compiler.is_compiling():
        return torch.cat([first, second], dim=1)
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
