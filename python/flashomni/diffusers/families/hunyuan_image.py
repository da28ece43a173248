"""HunyuanImage: HunyuanVideo's blocks over pictures, text and glyphs in one condition stream."""

from __future__ import annotations

from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.hunyuan_video import double_blocks, single_blocks, trim_conditions


def _prepare(inputs: Inputs, call: Call) -> None:
    trim_conditions(inputs, call, ("", "_2"))


_PROCESSOR = "HunyuanImageAttnProcessor"

HUNYUAN_IMAGE = Family(
    models=("HunyuanImageTransformer2DModel",),
    blocks=(
        double_blocks("HunyuanImageTransformerBlock", _PROCESSOR),
        single_blocks("HunyuanImageSingleTransformerBlock", _PROCESSOR),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Padding of text and glyphs is cut off before the model runs; keys end at each element's own length.",
        "Outside of FlashOmni: the token refiner of the text.",
    ),
)
FAMILIES = (HUNYUAN_IMAGE,)
