"""Wan 2.1 and 2.2: text to video, image to video, with one expert or two."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.families.base import ACROSS_HEADS, CROSS_DENSE, TEXTLESS, Family, textless_presets

WIDE_NORMS = Projections(
    "to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1", across_heads=True
)

WAN = Family(
    models=("WanTransformer3DModel",),
    blocks=(
        PlainBlocks(
            path="blocks",
            block="WanTransformerBlock",
            attention="attn1",
            stream=WIDE_NORMS,
            processor="WanAttnProcessor",
            feed_forward=("ffn",),
            has_text=False,
            rope=rope.batched_tables,
        ),
    ),
    presets=textless_presets(tau_kv=0.05),
    notes=(TEXTLESS, ACROSS_HEADS, CROSS_DENSE),
)
FAMILIES = (WAN,)
