"""Blocks whose attention keeps text and image apart: an attention processor stands in for the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.adaptive_norm import intercept_adaptive_norm
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
    optional_part,
    part,
    put_processor,
    refuse_masks,
    rope_of,
    stream_of,
)
from flashomni.diffusers.blocks.feed_forward import following_of, intercept_feed_forward, why_not_fused
from flashomni.diffusers.call import Call
from flashomni.engine import Attention, Output
from flashomni.engine.memory import LayerShape

_NORMS = ("norm1", "norm1_context")  # before the attention


@dataclass(frozen=True, kw_only=True)
class JointBlocks(Blocks):
    """The processor does everything around the attention: it is called as (attention, hidden_states,
    encoder_hidden_states, .. masks and RoPE by name) and returns (image, text).

    feed_forward: names of the FeedForward modules in a block, of the image and of the text (the same one
    twice, if it takes the image and then the text); or of the one that takes both at once. A block may be
    without the text's out and feed-forward (the last: nobody reads its text).
    """

    image: Projections
    text: Projections

    def streams(self) -> tuple[Projections, ...]:
        return self.image, self.text

    def find_fallbacks(self, layer: Layer) -> None:
        layer.look_at(self.image)
        layer.look_at(self.text)
        for name in dict.fromkeys(self.feed_forward):
            layer.look(layer.block, name, why_not_fused)

    def intercept(self, call: Call, layer: Layer) -> Restore:
        restores = [
            intercept_adaptive_norm(call.engine, part(layer.block, name))
            for name in _NORMS
            if hasattr(layer.block, name)
        ]
        for i, name in enumerate(self.feed_forward):
            module = part(layer.block, name)
            following = following_of(call, layer, alone=len(self.feed_forward) > 1) if i == 0 else None
            if module is not None:
                restores.append(intercept_feed_forward(call.engine, module, following))
        attention = layer.attention
        restores.append(put_processor(attention, JointProcessor(call, layer, attention.processor)))

        def restore() -> None:
            for each in filter(None, restores):
                each()

        return restore

    def shape_of(self, layer: Layer, image: int, text: int) -> LayerShape:
        tokens = image + text
        streams = ((image, self.image), (text, self.text))
        outs = [(rows, optional_part(layer.attention, stream.out)) for rows, stream in streams]
        outs = [(rows, out) for rows, out in outs if out is not None]
        rows = (image, text) if len(self.feed_forward) > 1 else (tokens,)
        return LayerShape(
            name=layer.name,
            heads=layer.heads,
            head_dim=layer.head_dim,
            tokens=tokens,
            outputs=tuple((rows, out.out_features) for rows, out in outs),
            keeps_o=keeps_o([out for _, out in outs]),
            scratch=(
                ("o", tokens * layer.width),
                *feed_forward_scratch(layer, self.feed_forward, rows),
            ),
            followers=followers(layer, rows[0]),
        )


class JointProcessor(Processor):
    """Attention processor of a block that keeps text and image apart: (image, text), each [B, tokens, C];
    text is None where it has no output projection."""

    def run(self, arguments: dict[str, Any]) -> list[Tensor]:
        return [result for result in super().run(arguments) if result is not None]

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        masks = {
            "attention_mask": attention_mask,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
        }
        if not self.engine.enabled:
            given = given_of(**masks)
            return self.original(
                attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb, **given
            )
        if torch.compiler.is_compiling():
            streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
            given = streams | masks | {"image_rotary_emb": image_rotary_emb}
            results = 1 if optional_part(attn, self.spec.text.out) is None else 2
            of_image, *of_text = self.trace(given, list(streams)[:results])
            return of_image, of_text[0] if of_text else None
        layer, spec = self.layer, self.spec
        refuse_masks(spec, layer.name, masks)
        joint = self.call.lay_out(encoder_hidden_states.shape[1], hidden_states.shape[1])
        image, text = joint.image, joint.text
        self.call.image = image
        outputs = [Output(part(attn, spec.image.out), image.start, image.length)]
        text_out = optional_part(attn, spec.text.out)
        if text_out is not None:
            outputs.append(Output(text_out, text.start, text.length))
        attention = Attention(
            layer=layer.index,
            heads=layer.heads,
            head_dim=layer.head_dim,
            text=text,
            condition=joint.condition,
            valid=joint.valid,
            streams=[
                stream_of(attn, spec.text, encoder_hidden_states, text.start),
                stream_of(attn, spec.image, hidden_states, image.start),
            ],
            outputs=outputs,
            o=self.engine.buffers.take(
                "o", (hidden_states.shape[0], joint.tokens, layer.width), hidden_states
            ),
            rope=rope_of(self.call, spec, image_rotary_emb, joint, hidden_states.dtype),
        )
        of_image, *of_text = self.engine.attend(attention)
        if spec.image.after_out is not None:
            of_image = part(attn, spec.image.after_out)(of_image)
        return of_image, of_text[0] if of_text else None
