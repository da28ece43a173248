"""What stands in for a model's own code: an attention processor, and the forward of a parallel block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.diffusers.families import JointBlocks, ParallelBlocks, Projections, part
from flashomni.diffusers.layers import Layer, fused_activation, why_not_fused
from flashomni.engine import Attention, Engine, Output, Stream, apply_linear
from flashomni.policies import Segment


def _stream(attention: nn.Module, names: Projections, x: Tensor, start: int) -> Stream:
    return Stream(
        x,
        start,
        part(attention, names.q),
        part(attention, names.k),
        part(attention, names.v),
        part(attention, names.norm_q),
        part(attention, names.norm_k),
    )


def _refuse_mask(mask: Tensor | None, layer: str) -> None:
    if mask is not None:
        raise NotImplementedError(
            f"attention_mask: expected None in {layer}, got a mask; sparse attention takes none. Call the "
            "model inside `with flashomni.disabled(...)`"
        )


class JointProcessor:
    """Attention processor of a block that keeps text and image apart: (image, text), each [B, tokens, C]."""

    flashomni = True

    def __init__(self, engine: Engine, layer: Layer, original: Any):
        self.engine, self.index, self.name, self.spec = engine, layer.index, layer.name, layer.spec
        self.original = original
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.engine.enabled:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        _refuse_mask(attention_mask, self.name)
        spec: JointBlocks = self.spec
        text_length, width = encoder_hidden_states.shape[1], attn.heads * attn.head_dim
        tokens = text_length + hidden_states.shape[1]
        attention = Attention(
            layer=self.index,
            heads=attn.heads,
            head_dim=attn.head_dim,
            text=Segment("text", 0, text_length),
            streams=[
                _stream(attn, spec.text, encoder_hidden_states, 0),
                _stream(attn, spec.image, hidden_states, text_length),
            ],
            outputs=[
                Output(part(attn, spec.image.out), text_length, hidden_states.shape[1]),
                Output(part(attn, spec.text.out), 0, text_length),
            ],
            o=self.engine.buffers.take("o", (hidden_states.shape[0], tokens, width), hidden_states),
            rope=image_rotary_emb,
        )
        image, text = self.engine.attend(attention)
        if spec.image.after_out is not None:
            image = part(attn, spec.image.after_out)(image)
        return image, text


class ParallelForward:
    """forward() of a block with an MLP beside its attention: returns (text, image), each [B, tokens, C].

    Attention and MLP write side by side into one buffer, so that one projection takes both without a copy.
    """

    flashomni = True

    def __init__(self, engine: Engine, layer: Layer):
        self.engine, self.index, self.name, self.spec = engine, layer.index, layer.name, layer.spec
        self.block = layer.block

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, spec, engine = self.block, self.spec, self.engine
        attn = getattr(block, spec.attention)
        ours = engine.enabled and type(attn.processor).__name__ == spec.processor
        if not ours:
            return type(block).forward(
                block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        _refuse_mask((joint_attention_kwargs or {}).get("attention_mask"), self.name)
        text_length = encoder_hidden_states.shape[1]
        residual = join(encoder_hidden_states, hidden_states)
        x, gate = part(block, spec.norm)(residual, emb=temb)
        mlp, width = part(block, spec.mlp), attn.heads * attn.head_dim
        both = engine.buffers.take("o", (x.shape[0], x.shape[1], width + mlp.out_features), x)
        self._mlp(mlp, x, both[..., width:])
        attention = Attention(
            layer=self.index,
            heads=attn.heads,
            head_dim=attn.head_dim,
            text=Segment("text", 0, text_length),
            streams=[_stream(attn, spec.stream, x, 0)],
            outputs=[Output(part(block, spec.out), 0, x.shape[1])],
            o=both,
            rope=image_rotary_emb,
        )
        (out,) = engine.attend(attention)
        out = torch.addcmul(residual, gate.unsqueeze(1), out)
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        return out[:, :text_length], out[:, text_length:]

    def _mlp(self, mlp: nn.Module, x: Tensor, out: Tensor) -> None:
        module = part(self.block, self.spec.activation)
        activation = fused_activation(module)
        with self.engine.ledger("mlp"):
            apply_linear(mlp, x, out, activation=activation)
            if activation is None:
                out.copy_(module(out))


class FusedFeedForward:
    """forward() of a diffusers FeedForward with a GELU: two dense GEMMs, the activation in the first."""

    flashomni = True

    def __init__(self, engine: Engine, module: nn.Module):
        self.engine, self.module = engine, module

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, engine = self.module, self.engine
        ours = engine.enabled and hidden_states.ndim == 3 and not why_not_fused(module, hidden_states.dtype)
        if not ours:
            return type(module).forward(module, hidden_states, *args, **kwargs)
        first, last = module.net[0], module.net[2]
        shape = (*hidden_states.shape[:2], first.proj.out_features)
        inner = engine.buffers.take("feed_forward", shape, hidden_states)
        with engine.ledger("mlp"):
            activation = "gelu_tanh" if first.approximate == "tanh" else "gelu"
            apply_linear(first.proj, hidden_states, inner, activation=activation)
            return ops.gemm_q(inner, last.weight, last.bias)


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


def intercept(engine: Engine, layer: Layer) -> Callable[[], None]:
    """Puts our code in place in one layer; returns a function that takes it out again."""
    if isinstance(layer.spec, ParallelBlocks):
        forward = ParallelForward(engine, layer)
        layer.block.forward = forward

        def restore() -> None:
            # A hook that came later holds our forward: it then passes everything on to the block's own.
            engine.enabled = False
            if layer.block.__dict__.get("forward") is forward:
                del layer.block.forward

        return restore

    feed_forwards = [_intercept_feed_forward(engine, part(layer.block, n)) for n in layer.spec.feed_forward]
    attention = layer.attention
    processor = JointProcessor(engine, layer, attention.processor)
    copied = processor._attention_backend
    attention.processor = processor

    def restore() -> None:
        for restore_feed_forward in feed_forwards:
            restore_feed_forward()
        if attention.processor is processor:
            if processor._attention_backend != copied:
                processor.original._attention_backend = processor._attention_backend
            attention.processor = processor.original

    return restore


def _intercept_feed_forward(engine: Engine, module: nn.Module) -> Callable[[], None]:
    forward = FusedFeedForward(engine, module)
    if "forward" not in module.__dict__:
        module.forward = forward

    def restore() -> None:
        engine.enabled = False
        if module.__dict__.get("forward") is forward:
            del module.forward

    return restore
