"""Allegro: self-attention over the video, with a head_dim of 96."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.families.base import CROSS_DENSE, TEXTLESS, Family, textless_presets

ALLEGRO = Family(
    models=("AllegroTransformer3DModel",),
    blocks=(
        PlainBlocks(
            path="transformer_blocks",
            block="AllegroTransformerBlock",
            attention="attn1",
            stream=Projections("to_q", "to_k", "to_v", out="to_out.0", after_out="to_out.1"),
            processor="AllegroAttnProcessor2_0",
            feed_forward=("ff",),
            has_text=False,
            rope=rope.axis_halves,
        ),
    ),
    presets=textless_presets(tau_kv=0.05),
    notes=(
        TEXTLESS,
        "RoPE (pairs of the halves of a third of a head) is torch's: on all tiles, cached ones too.",
        CROSS_DENSE,
    ),
)
FAMILIES = (ALLEGRO,)
