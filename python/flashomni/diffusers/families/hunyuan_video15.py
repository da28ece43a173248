"""HunyuanVideo 1.5: text, glyphs and a picture in one condition stream, valid tokens first."""

from __future__ import annotations

from torch import Tensor

from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.hunyuan_video import double_blocks, trim_conditions


def _is_empty(image_embeds: Tensor) -> bool:
    return bool((image_embeds == 0).all())


def _prepare(inputs: Inputs, call: Call) -> None:
    picture, empty = inputs["image_embeds"], call.read(inputs["image_embeds"], _is_empty)
    if empty:
        picture = inputs["image_embeds"] = picture[:, :1]
    trim_conditions(inputs, call, ("", "_2"), more=(picture.shape[1], 0 if empty else picture.shape[1]))


HUNYUAN_VIDEO15 = Family(
    models=("HunyuanVideo15Transformer3DModel",),
    blocks=(double_blocks("HunyuanVideo15TransformerBlock", "HunyuanVideo15AttnProcessor2_0"),),
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
