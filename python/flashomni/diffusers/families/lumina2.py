"""Lumina-Image 2.0: one stream of [text, image], fewer heads of keys and values than of queries."""

from __future__ import annotations

from dataclasses import replace

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks
from flashomni.diffusers.call import Call, Inputs, valid_lengths
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE


def _prepare(inputs: Inputs, call: Call) -> None:
    """The model leaves padding out of the stream itself; the image begins where the text ends."""
    inputs.refuse_options("attention_kwargs")
    lengths = set(call.read(inputs["encoder_attention_mask"], valid_lengths))
    if len(lengths) > 1:
        raise NotImplementedError(
            "encoder_attention_mask: expected as many valid text tokens in every element of the batch, got "
            f"{sorted(lengths)}; draw them one by one, or inside `with flashomni.disabled(...)`"
        )
    call.text_tokens = lengths.pop()


LUMINA2 = Family(
    models=("Lumina2Transformer2DModel",),
    blocks=(
        PlainBlocks(
            path="layers",
            block="Lumina2TransformerBlock",
            attention="attn",
            stream=replace(IMAGE, grouped=True),
            processor="Lumina2AttnProcessor2_0",
            rope=rope.complex_elements,
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Heads of keys and values are repeated for the queries that share them.",
        "Padding is no part of the stream: as many valid tokens of text in every element of a batch.",
        "Outside of FlashOmni: the refiners of noise and of text. Feed-forwards are the model's own.",
    ),
)
FAMILIES = (LUMINA2,)
