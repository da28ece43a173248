"""CogVideoX and CogVideoX 1.5: text to video, image to video, video to video; and ConsisID."""

from __future__ import annotations

from dataclasses import replace

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE


def _prepare(inputs: Inputs, call: Call) -> None:
    inputs.refuse_options("attention_kwargs")


_SHARED = replace(IMAGE, other_norms=True)  # text and video go through the same projections


def _blocks(block: str) -> JointBlocks:
    return JointBlocks(
        path="transformer_blocks",
        block=block,
        attention="attn1",
        image=_SHARED,
        text=_SHARED,
        processor="CogVideoXAttnProcessor2_0",
        feed_forward=("ff",),
        rope=rope.image_tables,
    )


_PRESETS = presets_around(PAPER_VIDEO, CARRIED_OVER)
_LAYER_NORMS = "Query and key norms are LayerNorms: called as modules on all tiles, cached ones too."

COGVIDEOX = Family(
    models=("CogVideoXTransformer3DModel",),
    blocks=(_blocks("CogVideoXBlock"),),
    prepare=_prepare,
    presets=_PRESETS,
    notes=(_LAYER_NORMS,),
)
CONSISID = Family(
    models=("ConsisIDTransformer3DModel",),
    blocks=(_blocks("ConsisIDBlock"),),
    prepare=_prepare,
    presets=_PRESETS,
    notes=(_LAYER_NORMS, "Outside of FlashOmni: the face's extractor and its attentions between the blocks."),
)
FAMILIES = (COGVIDEOX, CONSISID)
