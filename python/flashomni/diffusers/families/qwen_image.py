"""Qwen-Image, Qwen-Image-Edit, Qwen-Image-Layered."""

from __future__ import annotations

from math import prod

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT


def _prepare(inputs: Inputs, call: Call) -> None:
    call.trim_text(inputs, "encoder_hidden_states_mask", ("encoder_hidden_states",), drop_mask=True)
    shapes = inputs["img_shapes"]
    if shapes and isinstance(shapes[0], (list, tuple)) and isinstance(shapes[0][0], (list, tuple)):
        # Edit draws the first picture, Layered all but the last.
        given = shapes[0][-1:] if inputs.model.config.use_layer3d_rope else shapes[0][1:]
        call.condition = sum(prod(shape) for shape in given) if len(shapes[0]) > 1 else 0


QWEN_IMAGE = Family(
    models=("QwenImageTransformer2DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="QwenImageTransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor="QwenDoubleStreamAttnProcessor2_0",
            feed_forward=("img_mlp", "txt_mlp"),
            rope=rope.complex_streams,
            mask="encoder_hidden_states_mask",
        ),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=("Padding of the text is cut off before the model runs; valid tokens have to come first.",),
)
FAMILIES = (QWEN_IMAGE,)
