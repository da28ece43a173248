"""Mochi: text last, an angle a head, a last block without the text's output."""

from __future__ import annotations

from dataclasses import replace

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT


def _prepare(inputs: Inputs, call: Call) -> None:
    call.trim_text(inputs, "encoder_attention_mask", ("encoder_hidden_states",))


MOCHI = Family(
    models=("MochiTransformer3DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="MochiTransformerBlock",
            attention="attn1",
            image=replace(IMAGE, other_norms=True),
            text=replace(TEXT, other_norms=True),
            processor="MochiAttnProcessor2_0",
            rope=rope.image_pairs_by_head,
            mask="attention_mask",
        ),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_VIDEO, CARRIED_OVER),
    notes=(
        "Padding of the text is cut off before the model runs; keys end at each element's own length.",
        "Norms of queries and keys and RoPE (an angle a head) are dense; feed-forwards are the model's own.",
    ),
)
FAMILIES = (MOCHI,)
