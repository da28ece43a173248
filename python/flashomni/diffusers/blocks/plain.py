"""Self-attention over one sequence: a processor stands in for the model's own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.base import (
    Blocks,
    Layer,
    Processor,
    Projections,
    Restore,
    feed_forward_scratch,
    followers,
    given_of,
    keeps_o,
    part,
    put_processor,
    refuse_masks,
    rope_of,
    stream_of,
)
from flashomni.diffusers.blocks.cross_attention import FollowingCrossAttention, why_no_cross_attention
from flashomni.diffusers.blocks.feed_forward import following_of, intercept_feed_forward, why_not_fused
from flashomni.diffusers.call import Call
from flashomni.engine import Attention, Output
from flashomni.engine.memory import LayerShape


@dataclass(frozen=True, kw_only=True)
class PlainBlocks(Blocks):
    """The processor does everything around the attention: it is called as (attention, hidden_states, .. masks
    and RoPE by name) and returns [B, tokens, C]. Call.text_tokens of the tokens are text.

    feed_forward: name of the feed-forward in a block, if it is of a known make (makes.py).
    """

    stream: Projections

    def streams(self) -> tuple[Projections, ...]:
        return (self.stream,)

    def find_fallbacks(self, layer: Layer) -> None:
        layer.look_at(self.stream)
        for name in self.feed_forward:
            layer.look(layer.block, name, why_not_fused)
        if self.cross_attention is not None:
            layer.cross_refusal = why_no_cross_attention(layer, part(layer.block, self.cross_attention))

    def intercept(self, call: Call, layer: Layer) -> Restore:
        restores = [
            intercept_feed_forward(
                call.engine, part(layer.block, name), following_of(call, layer, alone=False)
            )
            for name in self.feed_forward
        ]
        attention = layer.attention
        restores.append(put_processor(attention, PlainProcessor(call, layer, attention.processor)))
        if call.engine.config.cross_attention == "follow" and layer.cross_can_follow:
            cross = part(layer.block, self.cross_attention)
            restores.append(put_processor(cross, FollowingCrossAttention(call, layer, cross)))

        def restore() -> None:
            for each in restores:
                each()

        return restore

    def shape_of(self, layer: Layer, image: int, text: int) -> LayerShape:
        tokens, out = image + text * self.has_text, part(layer.attention, self.stream.out)
        return LayerShape(
            name=layer.name,
            heads=layer.heads,
            head_dim=layer.head_dim,
            tokens=tokens,
            outputs=((tokens, out.out_features),),
            keeps_o=keeps_o([out]),
            scratch=(
                ("o", tokens * layer.width),
                *feed_forward_scratch(layer, self.feed_forward, (tokens,)),
            ),
            followers=followers(layer, tokens),
            has_text=self.has_text,
        )


class PlainProcessor(Processor):
    """Attention processor of such a block. What it is given under a name of RoPE's, spec.rope understands.

    sparse_params: Kandinsky 5's own block mask; refused as all masks are.
    """

    def __init__(self, call: Call, layer: Layer, original: Any):
        super().__init__(call, layer, original)
        # LTX-2 has another name for it, and Allegro another place.
        self.rope_by_name = "image_rotary_emb" in inspect.signature(original.__call__).parameters

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        freqs_cis: Any = None,
        sparse_params: Any = None,
    ) -> Tensor:
        ropes = given_of(image_rotary_emb=image_rotary_emb, rotary_emb=rotary_emb, freqs_cis=freqs_cis)
        masks = given_of(attention_mask=attention_mask, sparse_params=sparse_params)
        others = given_of(encoder_hidden_states=encoder_hidden_states) | masks | ropes
        if not self.engine.enabled:
            if image_rotary_emb is None or self.rope_by_name:
                return self.original(attn, hidden_states, **others)
            by_position = (encoder_hidden_states, attention_mask, *ropes.values())
            return self.original(attn, hidden_states, *by_position)
        if encoder_hidden_states is hidden_states:  # as Lumina names what is attended to
            encoder_hidden_states = None
            del others["encoder_hidden_states"]
        if torch.compiler.is_compiling():
            (out,) = self.trace({"hidden_states": hidden_states} | others, ["hidden_states"])
            return out
        layer, spec = self.layer, self.spec
        if encoder_hidden_states is not None:
            raise NotImplementedError(f"encoder_hidden_states: expected None in {layer.name}, got a tensor")
        refuse_masks(spec, layer.name, masks)
        batch, tokens, _ = hidden_states.shape
        joint = self.call.lay_out_whole(tokens)
        attention = Attention(
            layer=layer.index,
            heads=layer.heads,
            head_dim=layer.head_dim,
            text=joint.text,
            condition=joint.condition,
            valid=joint.valid,
            streams=[stream_of(attn, spec.stream, hidden_states, 0)],
            outputs=[Output(part(attn, spec.stream.out), 0, tokens)],
            o=self.engine.buffers.take("o", (batch, tokens, layer.width), hidden_states),
            rope=rope_of(self.call, spec, next(iter(ropes.values()), None), joint, hidden_states.dtype),
        )
        (out,) = self.engine.attend(attention)
        return part(attn, spec.stream.after_out)(out) if spec.stream.after_out is not None else out
