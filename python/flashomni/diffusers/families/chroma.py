"""Chroma: FLUX.1's attention, a pruned modulation, padded text."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flashomni.diffusers.call import Call, Inputs, valid_lengths
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import flux_blocks

_FLOAT_MASK = (
    "attention_mask: expected bool, got a float mask. diffusers' Chroma adds that to the scores, so that "
    "padding is seen; FlashOmni leaves padding out, as its bool mask does (prompt_attention_mask=mask.bool())"
)


def _text_length(mask: Tensor, text: int) -> int:
    """Valid text tokens of all elements, of a mask [B, text + image]."""
    lengths = set(valid_lengths(mask[:, :text]))
    if len(lengths) > 1:
        raise NotImplementedError(
            "attention_mask: expected as many valid text tokens in every element of the batch, got "
            f"{sorted(lengths)}; draw them one by one, or inside `with flashomni.disabled(...)`"
        )
    if not bool(mask[:, text:].all()):
        raise NotImplementedError("attention_mask: expected image tokens that are all valid")
    return lengths.pop()


def _prepare(inputs: Inputs, call: Call) -> None:
    mask, text = inputs["attention_mask"], inputs["encoder_hidden_states"].shape[1]
    if mask is not None:
        length = max(1, call.read(mask, _text_length, text))
        if length < text and mask.dtype != torch.bool:
            if call.engine.config.strict:
                raise NotImplementedError(_FLOAT_MASK)
            warnings.warn(_FLOAT_MASK, stacklevel=2)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :length]
        inputs["txt_ids"] = inputs["txt_ids"][..., :length, :]
        inputs["attention_mask"] = None
        text = length
    call.text_tokens = text


CHROMA = Family(
    models=("ChromaTransformer2DModel",),
    blocks=flux_blocks("Chroma", "FluxAttnProcessor"),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Padding of the text is cut off before the model runs: as many valid tokens in every element of a "
        "batch.",
    ),
)
FAMILIES = (CHROMA,)
