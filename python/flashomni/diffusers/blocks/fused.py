"""Parallel blocks whose attention holds one product before and one after: [q, k, v, mlp] = before(x)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.base import (
    Blocks,
    Layer,
    Processor,
    Projections,
    Restore,
    keeps_o,
    output_follower,
    part,
    put_processor,
    refuse_masks,
    rope_of,
)
from flashomni.diffusers.call import Call
from flashomni.engine import Attention, LinearRows, Output, Stream, apply_linear, why_no_norm, why_not_plain
from flashomni.engine.memory import LayerShape
from flashomni.symbols import SparseSymbols


@dataclass(frozen=True, kw_only=True)
class FusedBlocks(Blocks):
    """after([attention, activation(mlp)]) with [q, k, v, mlp] = before(x), all of it in the processor, which
    is called as (attention, hidden_states, attention_mask, image_rotary_emb). The sequence holds text and
    image; the first Call.text_tokens are text."""

    before: str
    norm_q: str
    norm_k: str
    activation: str
    after: str

    def streams(self) -> tuple[Projections, ...]:
        return (Projections(self.before, self.before, self.before, self.norm_q, self.norm_k, self.after),)

    def find_fallbacks(self, layer: Layer) -> None:
        layer.look(layer.attention, self.before, why_not_plain)
        for name in (self.norm_q, self.norm_k):
            layer.look(layer.attention, name, why_no_norm)
        layer.gemm_o &= layer.look(layer.attention, self.after, why_not_plain)

    def mlp_can_follow(self, layer: Layer) -> bool:
        return layer.gemm_o  # with the attention, in the projection of both

    def intercept(self, call: Call, layer: Layer) -> Restore:
        return put_processor(layer.attention, FusedProcessor(call, layer, layer.attention.processor))

    def shape_of(self, layer: Layer, image: int, text: int) -> LayerShape:
        tokens, after = image + text, part(layer.attention, self.after)
        hidden = part(layer.attention, self.before).out_features - 3 * layer.width
        return LayerShape(
            name=layer.name,
            heads=layer.heads,
            head_dim=layer.head_dim,
            tokens=tokens,
            outputs=((tokens, after.out_features),),
            keeps_o=keeps_o([after]),
            followers=output_follower(after, tokens),
            scratch=(("o", tokens * layer.width), ("mlp", tokens * hidden)),
        )


def _columns(y: Tensor, start: int, stop: int, x: Tensor) -> Tensor:
    """What a slice of a layer gives for x, of which the whole layer's result y is known already."""
    return y[..., start:stop]


class FusedProcessor(Processor):
    """Attention processor of such a block: [B, tokens, C]."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if not self.engine.enabled:
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        if torch.compiler.is_compiling():
            masks = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
            (out,) = self.trace({"hidden_states": hidden_states} | masks, ["hidden_states"])
            return out
        layer, spec, engine, x = self.layer, self.spec, self.engine, hidden_states
        refuse_masks(spec, layer.name, {"attention_mask": attention_mask})
        joint = self.call.lay_out_whole(x.shape[1])
        after = part(attn, spec.after)
        q, k, v, mlp, hidden = self._projections(part(attn, spec.before), x)
        norms = part(attn, spec.norm_q), part(attn, spec.norm_k)
        attention = Attention(
            layer=layer.index,
            heads=layer.heads,
            head_dim=layer.head_dim,
            text=joint.text,
            condition=joint.condition,
            valid=joint.valid,
            streams=[Stream(x, 0, q, k, v, *norms)],
            outputs=[Output(after, 0, joint.tokens)],
            o=engine.buffers.take("o", (*x.shape[:2], layer.width), x),
            past=partial(self._mlp, mlp, hidden, x),
            rope=rope_of(self.call, spec, image_rotary_emb, joint, x.dtype),
        )
        (out,) = engine.attend(attention)
        return out

    def _mlp(self, mlp: Any, hidden: int, x: Tensor, rows: SparseSymbols | None) -> Tensor:
        """activation(mlp(x)), of which only active row blocks hold for x."""
        with self.engine.ledger("mlp"):
            inner = self.engine.buffers.take("mlp", (*x.shape[:2], hidden), x)
            apply_linear(mlp, x, inner, rows)
            return part(self.layer.attention, self.spec.activation)(inner)

    def _projections(self, before: nn.Module, x: Tensor) -> tuple:
        """q, k, v and mlp as layers of their own, and how many features mlp has."""
        width = self.layer.width
        if why_not_plain(before, x.dtype) is None:
            make, features = partial(LinearRows, before), before.out_features
        else:
            y = before(x)
            make, features = partial(partial, _columns, y), y.shape[-1]
        ends = (0, width, 2 * width, 3 * width, features)
        return (*(make(a, b) for a, b in zip(ends, ends[1:], strict=False)), features - 3 * width)
