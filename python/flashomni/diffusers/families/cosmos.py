"""Cosmos 1 (text and video to world), Predict2, Predict2.5 and Transfer2.5."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks
from flashomni.diffusers.families.base import CROSS_DENSE, TEXTLESS, Family, textless_presets
from flashomni.diffusers.families.flux import IMAGE

COSMOS = Family(
    models=("CosmosTransformer3DModel",),
    blocks=(
        PlainBlocks(
            path="transformer_blocks",
            block="CosmosTransformerBlock",
            attention="attn1",
            stream=IMAGE,
            processor="CosmosAttnProcessor2_0",
            feed_forward=("ff",),
            has_text=False,
            rope=rope.image_halves,
        ),
    ),
    presets=textless_presets(tau_kv=0.05),
    notes=(
        TEXTLESS,
        "RoPE (pairs of the halves of a head) is torch's: on all tiles, cached ones too.",
        CROSS_DENSE,
    ),
)
FAMILIES = (COSMOS,)
