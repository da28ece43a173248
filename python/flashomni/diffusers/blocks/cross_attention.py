"""Cross-attention whose rows follow the self-attention: what all heads reuse there is forecast here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.diffusers.blocks.base import Layer, Processor, part
from flashomni.diffusers.blocks.feed_forward import Following
from flashomni.diffusers.call import Call
from flashomni.engine import apply_linear, follow, linear_tiles, norm_and_rope, why_not_plain
from flashomni.symbols import SparseSymbols

_ROW_LINEARS = ("to_q", "to_out.0")  # what rows go through on their own
_TEXT = 512  # tokens of text, as the model's own code has it
_PROCESSORS = ("WanAttnProcessor", "SkyReelsV2AttnProcessor", "FollowingCrossAttention")


class FollowingCrossAttention(Processor):
    """Processor of a cross-attention of Wan's make: norms over all heads, no RoPE, text and perhaps a
    picture.

    A Dispatch forecasts the output and computes the active rows anew: GEMM-Q by row blocks, attention over
    their rows alone, GEMM-Q again. Other steps do the same with all rows.
    """

    def __init__(self, call: Call, layer: Layer, attention: nn.Module):
        super().__init__(call, layer, attention.processor)
        self.attention = attention
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
    ) -> Tensor:
        given = (encoder_hidden_states, attention_mask, rotary_emb)
        plain = encoder_hidden_states is not None and attention_mask is None and rotary_emb is None
        if not (self.engine.enabled and plain):
            return self.original(attn, hidden_states, *given)
        if torch.compiler.is_compiling():
            traced = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
            (out,) = self.trace(traced, ["hidden_states"])
            return out
        start = self.following.start_of(hidden_states.shape[1])
        if start is None:
            return self.original(attn, hidden_states, *given)
        compute = partial(self._attend, attn, hidden_states, encoder_hidden_states)
        return follow(self.engine, self.following.layer, "cross_attention", compute, start=start)

    def _attend(
        self, attn: nn.Module, x: Tensor, text: Tensor, rows: SparseSymbols | None, out: Tensor | None
    ) -> Tensor:
        engine = self.engine
        with engine.ledger("cross_attention"):
            heads = (attn.heads, attn.inner_dim // attn.heads)
            q = engine.buffers.take("q", (*x.shape[:2], *heads), x)
            o = engine.buffers.take("o", (*x.shape[:2], attn.inner_dim), x)
            apply_linear(attn.to_q, x, q.flatten(2), rows)
            active = None
            if rows is not None:
                active = engine.contexts.get(engine.context, self.following.layer).spread_rows
            norm_and_rope(attn.norm_q, q, None, active, across_heads=True)
            self._look(q, self._keys(attn, text), active, o.unflatten(2, heads))
            return linear_tiles(o, part(attn, "to_out.0").weight, part(attn, "to_out.0").bias, rows, out=out)

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

    @staticmethod
    def _keys(attn: nn.Module, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values: of the text, then of the picture whose tokens stand before it (image to video)."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        picture = text[:, :-_TEXT] if attn.add_k_proj is not None else None
        text = text[:, -_TEXT:] if attn.add_k_proj is not None else text
        found = [(heads(attn.norm_k(attn.to_k(text))), heads(attn.to_v(text)))]
        if picture is not None:
            key = attn.norm_added_k(attn.add_k_proj(picture))
            found.append((heads(key), heads(attn.add_v_proj(picture))))
        return found


def why_no_cross_attention(module: nn.Module, dtype: torch.dtype) -> str | None:
    """None if its rows can be computed apart; else why not."""
    if module.fused_projections:
        return "has fused projections"
    if type(module.processor).__name__ not in _PROCESSORS:
        return f"has a processor of class {type(module.processor).__name__}"
    reasons = ((name, why_not_plain(part(module, name), dtype)) for name in _ROW_LINEARS)
    return next((f"{name} {reason}" for name, reason in reasons if reason is not None), None)
