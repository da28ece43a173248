"""AuraFlow: blocks that keep text and image apart, then blocks over both; head_dim 256, no RoPE."""

from __future__ import annotations

from dataclasses import replace

from flashomni.diffusers.blocks import JointBlocks, PlainBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT

_IMAGE = replace(IMAGE, other_norms=True)


def _prepare(inputs: Inputs, call: Call) -> None:
    inputs.refuse_options("attention_kwargs")
    # Before the text the model puts tokens of its own.
    call.text_tokens = inputs.model.register_tokens.shape[1] + inputs["encoder_hidden_states"].shape[1]


AURA_FLOW = Family(
    models=("AuraFlowTransformer2DModel",),
    blocks=(
        JointBlocks(
            path="joint_transformer_blocks",
            block="AuraFlowJointTransformerBlock",
            attention="attn",
            image=_IMAGE,
            text=replace(TEXT, other_norms=True),
            processor="AuraFlowAttnProcessor2_0",
        ),
        PlainBlocks(
            path="single_transformer_blocks",
            block="AuraFlowSingleTransformerBlock",
            attention="attn",
            stream=_IMAGE,
            processor="AuraFlowAttnProcessor2_0",
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Query and key norms are LayerNorms in float32: called as modules on all tiles, cached ones too.",
        "Feed-forwards are SwiGLU and the model's own.",
    ),
)
FAMILIES = (AURA_FLOW,)
