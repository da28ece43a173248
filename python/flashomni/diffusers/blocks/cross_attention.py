"""Cross-attention whose rows follow the self-attention: what all heads reuse there is forecast here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.diffusers.blocks.base import Layer, Processor, given_of, norm_of, part
from flashomni.diffusers.blocks.feed_forward import Following
from flashomni.diffusers.call import Call
from flashomni.engine import apply_linear, follow, linear_tiles, norm_and_rope, why_not_plain
from flashomni.symbols import SparseSymbols

_TEXT = 512  # tokens of text where a picture's come before them, as Wan's own code has it


class FollowingCrossAttention(Processor):
    """Processor of a cross-attention of the class of the attention before it (spec.streams()): without RoPE,
    to text and, in Wan's, perhaps a picture.

    A Dispatch forecasts the output and computes the active rows anew: GEMM-Q by row blocks, attention over
    their rows alone, GEMM-Q again. Other steps do the same with all rows.
    """

    def __init__(self, call: Call, layer: Layer, attention: nn.Module):
        super().__init__(call, layer, attention.processor)
        self.attention = attention
        (self.names,) = layer.spec.streams()
        self.following = Following(call, layer.index, alone=False)

    def run(self, arguments: dict[str, Any]) -> Any:
        return self(self.attention, **arguments)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        sparse_params: Any = None,
    ) -> Tensor:
        others = given_of(attention_mask=attention_mask, rotary_emb=rotary_emb, sparse_params=sparse_params)
        own = partial(self.original, attn, hidden_states, encoder_hidden_states, **others)
        if not self.engine.enabled or encoder_hidden_states is None or others:
            return own()
        if torch.compiler.is_compiling():
            traced = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
            (out,) = self.trace(traced, ["hidden_states"])
            return out
        start = self.following.start_of(hidden_states.shape[1])
        if start is None:
            return own()
        compute = partial(self._attend, attn, hidden_states, encoder_hidden_states)
        return follow(self.engine, self.following.layer, "cross_attention", compute, start=start)

    def _attend(
        self, attn: nn.Module, x: Tensor, text: Tensor, rows: SparseSymbols | None, out: Tensor | None
    ) -> Tensor:
        engine, names = self.engine, self.names
        to_q, to_out = part(attn, names.q), part(attn, names.out)
        heads, width = getattr(attn, self.spec.heads), to_q.out_features
        with engine.ledger("cross_attention"):
            q = engine.buffers.take("q", (*x.shape[:2], heads, width // heads), x)
            o = engine.buffers.take("o", (*x.shape[:2], width), x)
            apply_linear(to_q, x, q.flatten(2), rows)
            active = None
            if rows is not None:
                active = engine.contexts.get(engine.context, self.following.layer).spread_rows
            norm = norm_of(attn, names, names.norm_q)
            norm_and_rope(norm, q, None, active, across_heads=names.across_heads)
            self._look(q, self._keys(attn, text, heads), active, o.unflatten(2, (heads, -1)))
            return linear_tiles(o, to_out.weight, to_out.bias, rows, out=out)

    def _look(
        self, q: Tensor, keys: list[tuple[Tensor, Tensor]], symbols: SparseSymbols | None, out: Tensor
    ) -> None:
        """The sum of the attentions to each of `keys`, on the active rows (None: on all)."""
        for i, (k, v) in enumerate(keys):
            to = out if i == 0 else self.engine.buffers.take("k", tuple(out.shape), out)
            seen = replace(symbols, kv_tokens=k.shape[1]) if symbols is not None else None
            ops.sparse_attention(q, k, v, seen, out=to)
            if i > 0:
                out.add_(to)

    def _keys(self, attn: nn.Module, text: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values: of the text, then of the picture whose tokens stand before it (image to video)."""
        names = self.names

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (heads, -1))

        def normed(norm: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
            return split(norm(key)) if names.across_heads else norm(split(key))

        picture = None
        if getattr(attn, "add_k_proj", None) is not None:
            picture, text = text[:, :-_TEXT], text[:, -_TEXT:]
        key = normed(norm_of(attn, names, names.norm_k), part(attn, names.k)(text))
        found = [(key, split(part(attn, names.v)(text)))]
        if picture is not None:
            key = normed(attn.norm_added_k, attn.add_k_proj(picture))
            found.append((key, split(attn.add_v_proj(picture))))
        return found


def why_no_cross_attention(layer: Layer, module: nn.Module) -> str | None:
    """None if the rows of the layer's cross-attention `module` can be computed apart; else why not."""
    if type(module) is not type(layer.attention):
        return f"is {type(module).__name__}, not {type(layer.attention).__name__}"
    if module.fused_projections:
        return "has fused projections"
    if type(module.processor).__name__ not in (layer.spec.processor, FollowingCrossAttention.__name__):
        return f"has a processor of class {type(module.processor).__name__}"
    dtype = next(layer.attention.parameters()).dtype
    (names,) = layer.spec.streams()
    reasons = ((name, why_not_plain(part(module, name), dtype)) for name in (names.q, names.out))
    return next((f"{name} {reason}" for name, reason in reasons if reason is not None), None)
