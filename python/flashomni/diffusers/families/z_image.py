"""Z-Image: one stream of [image, text], each filled up to a multiple of 32 with tokens that count."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around

_MULTIPLE = 32


def _filled(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _prepare(inputs: Inputs, call: Call) -> None:
    images, texts = inputs["x"], inputs["cap_feats"]
    if isinstance(images[0], (list, tuple)):
        raise NotImplementedError("x: expected one picture an element, got lists (omni mode)")
    if len({image.shape for image in images}) > 1:
        raise NotImplementedError("x: expected pictures of one size in a batch, got several")
    lengths = tuple(_filled(len(text)) for text in texts)
    call.text_tokens = max(lengths)
    call.text_lengths = lengths if min(lengths) < call.text_tokens else None


Z_IMAGE = Family(
    models=("ZImageTransformer2DModel",),
    blocks=(
        PlainBlocks(
            path="layers",
            block="ZImageTransformerBlock",
            attention="attention",
            stream=Projections(
                "to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1"
            ),
            processor="ZSingleStreamAttnProcessor",
            rope=rope.complex_elements,
            mask="attention_mask",
        ),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=("Outside of FlashOmni: the refiners of noise and of text. Omni mode is refused.",),
)
FAMILIES = (Z_IMAGE,)
