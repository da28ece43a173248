"""LTX-Video and LTX-2: text to video, image to video, conditions."""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import Layer, PlainBlocks
from flashomni.diffusers.families.base import ACROSS_HEADS, CROSS_DENSE, TEXTLESS, Family, textless_presets
from flashomni.diffusers.families.wan import WIDE_NORMS


@dataclass(frozen=True, kw_only=True)
class _Ungated(PlainBlocks):
    """LTX-2.3 may multiply each head's output by a gate that is new in each step, before the projection."""

    def refusal(self, layer: Layer) -> str | None:
        return "gates its heads" if layer.attention.to_gate_logits is not None else None


_OWN_ROTATIONS = "Every head has a rotation of its own: RoPE runs in torch, on all tiles."
_PRESETS = textless_presets(tau_kv=0.05)

LTX = Family(
    models=("LTXVideoTransformer3DModel",),
    blocks=(
        PlainBlocks(
            path="transformer_blocks",
            block="LTXVideoTransformerBlock",
            attention="attn1",
            stream=WIDE_NORMS,
            processor="LTXVideoAttnProcessor",
            feed_forward=("ff",),
            has_text=False,
            rope=rope.channel_tables,
        ),
    ),
    presets=_PRESETS,
    notes=(
        TEXTLESS,
        ACROSS_HEADS,
        _OWN_ROTATIONS,
        CROSS_DENSE,
    ),
)
LTX2 = Family(
    models=("LTX2VideoTransformer3DModel",),
    blocks=(
        _Ungated(
            path="transformer_blocks",
            block="LTX2VideoTransformerBlock",
            attention="attn1",
            stream=WIDE_NORMS,
            processor="LTX2AudioVideoAttnProcessor",
            feed_forward=("ff",),
            has_text=False,
            rope=rope.head_tables,
        ),
    ),
    presets=_PRESETS,
    notes=(
        TEXTLESS,
        ACROSS_HEADS,
        _OWN_ROTATIONS,
        "Outside of FlashOmni: the sound's attention and feed-forward, and all cross-attention.",
    ),
)
FAMILIES = (LTX, LTX2)
