"""HunyuanVideo 1.5: text, glyphs and a picture in one condition stream, valid tokens first."""

from __future__ import annotations

from torch import Tensor

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks
from flashomni.diffusers.call import Call, Inputs, valid_lengths
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT


def _is_empty(image_embeds: Tensor) -> bool:
    return bool((image_embeds == 0).all())


def _prepare(inputs: Inputs, call: Call) -> None:
    """The model moves what is valid of the three to the front, so that its padding is a length."""
    picture, empty = inputs["image_embeds"], call.read(inputs["image_embeds"], _is_empty)
    if empty:
        picture = inputs["image_embeds"] = picture[:, :1]
    valid = [0 if empty else picture.shape[1]] * picture.shape[0]
    tokens = picture.shape[1]
    for suffix in ("", "_2"):
        mask = inputs[f"encoder_attention_mask{suffix}"]
        lengths = call.read(mask, valid_lengths)
        longest = max(1, *lengths)
        for name in (f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"):
            inputs[name] = inputs[name][:, :longest]
        valid = [a + b for a, b in zip(valid, lengths, strict=True)]
        tokens += longest
    if any(length != tokens for length in valid):
        call.text_lengths = tuple(valid)


HUNYUAN_VIDEO15 = Family(
    models=("HunyuanVideo15Transformer3DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="HunyuanVideo15TransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor="HunyuanVideo15AttnProcessor2_0",
            feed_forward=("ff", "ff_context"),
            rope=rope.image_tables,
            mask="attention_mask",
        ),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_VIDEO, CARRIED_OVER),
    notes=(
        "Padding of text, glyphs and an absent picture is cut off before the model runs; keys end at each "
        "element's own length.",
        "Outside of FlashOmni: the token refiner of the text.",
    ),
)
FAMILIES = (HUNYUAN_VIDEO15,)
