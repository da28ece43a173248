"""LTX-Video: text to video, image to video, conditions."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks
from flashomni.diffusers.families.base import ACROSS_HEADS, CROSS_DENSE, TEXTLESS, Family, textless_presets
from flashomni.diffusers.families.wan import WIDE_NORMS

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
    presets=textless_presets(tau_kv=0.05),
    notes=(
        TEXTLESS,
        ACROSS_HEADS,
        "Every head has a rotation of its own: RoPE runs in torch, on all tiles.",
        CROSS_DENSE,
    ),
)
FAMILIES = (LTX,)
