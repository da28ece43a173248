"""CogView4: text first, one set of projections and one feed-forward for both streams."""

from __future__ import annotations

from dataclasses import replace

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE


def _prepare(inputs: Inputs, call: Call) -> None:
    inputs.refuse_options("attention_kwargs")
    text, patch = inputs["encoder_hidden_states"].shape[1], inputs.model.config.patch_size
    height, width = (size // patch for size in inputs["hidden_states"].shape[-2:])
    if call.engine.config.mlp == "follow" and text == height * width:
        # The feed-forward is called for the one, then for the other, and tells them apart by their tokens.
        raise NotImplementedError(
            f"mlp: expected 'dense' where the text has as many tokens as the image, got 'follow' and {text} "
            "tokens each"
        )


_SHARED = replace(IMAGE, other_norms=True)

COGVIEW4 = Family(
    models=("CogView4Transformer2DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="CogView4TransformerBlock",
            attention="attn1",
            image=_SHARED,
            text=_SHARED,
            processor="CogView4AttnProcessor",
            feed_forward=("ff", "ff"),
            rope=rope.image_halves,
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Query and key norms are LayerNorms, called as modules, and RoPE (pairs of the halves of a head) is "
        "torch's: on all tiles, cached ones too.",
    ),
)
FAMILIES = (COGVIEW4,)
