"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from flashomni.diffusers.blocks import JointBlocks, PlainBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT


def _prepare(inputs: Inputs, call: Call) -> None:
    inputs.refuse_options("joint_attention_kwargs")


SD3 = Family(
    models=("SD3Transformer2DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="JointTransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor="JointAttnProcessor2_0",
            feed_forward=("ff", "ff_context"),
        ),
        PlainBlocks(
            path="transformer_blocks",
            block="JointTransformerBlock",
            attention="attn2",
            stream=IMAGE,
            processor="JointAttnProcessor2_0",
            has_text=False,
        ),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "attn2 (3.5 Medium) is over the image alone: the paper's criterion for S_c is undefined there, so "
        "that policy 'flashomni' only skips key blocks in it.",
    ),
)
FAMILIES = (SD3,)
