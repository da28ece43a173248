"""HunyuanVideo: text to video, image to video (token replacement too), FramePack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks, ParallelBlocks
from flashomni.diffusers.call import Call, Inputs, valid_lengths
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.flux import BOTH, IMAGE, TEXT


def _prepare(inputs: Inputs, call: Call) -> None:
    call.trim_text(inputs, "encoder_attention_mask", ("encoder_hidden_states",))


def _prepare_framepack(inputs: Inputs, call: Call) -> None:
    """Text follows the tokens of a picture; the frames that are drawn follow those that are given."""
    picture = inputs["image_embeds"].shape[1]
    trim_conditions(inputs, call, ("",), more=(picture, picture))
    _, _, frames, height, width = inputs["hidden_states"].shape
    config = inputs.model.config
    call.drawn = frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)


def trim_conditions(
    inputs: Inputs, call: Call, suffixes: tuple[str, ...], more: tuple[int, int] = (0, 0)
) -> None:
    """Cuts the padding off conditions that the model joins to one stream, valid tokens first.

    suffixes: of encoder_hidden_states and encoder_attention_mask. more: tokens besides these, and how many of
    them are valid.
    """
    tokens, valid = more[0], [more[1]] * inputs["hidden_states"].shape[0]
    for suffix in suffixes:
        states, mask = f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"
        if inputs[states] is None:
            continue
        lengths = call.read(inputs[mask], valid_lengths)
        longest = max(1, *lengths)
        inputs[states], inputs[mask] = inputs[states][:, :longest], inputs[mask][:, :longest]
        valid = [a + b for a, b in zip(valid, lengths, strict=True)]
        tokens += longest
    if any(length != tokens for length in valid):
        call.text_lengths = tuple(valid)


def double_blocks(block: str, processor: str) -> JointBlocks:
    """Blocks of HunyuanVideo's kind that keep text and image apart."""
    return JointBlocks(
        path="transformer_blocks",
        block=block,
        attention="attn",
        image=IMAGE,
        text=TEXT,
        processor=processor,
        feed_forward=("ff", "ff_context"),
        rope=rope.image_tables,
        mask="attention_mask",
    )


def single_blocks(block: str, processor: str, **changes: Any) -> ParallelBlocks:
    """Those that do not."""
    return ParallelBlocks(
        path="single_transformer_blocks",
        block=block,
        attention="attn",
        stream=BOTH,
        processor=processor,
        norm="norm",
        mlp="proj_mlp",
        activation="act_mlp",
        out="proj_out",
        rope=rope.image_tables,
        mask="attention_mask",
        returns=("hidden_states", "encoder_hidden_states"),
        **changes,
    )


def _modulate(norm: nn.Module, x: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The first frame's tokens have a gate of their own: [B, tokens, C]."""
    first, tokens = arguments["num_tokens"], x.shape[1]
    x, gate, first_gate = norm(x, arguments["temb"], arguments["token_replace_emb"], first)
    gates = (first_gate.unsqueeze(1).expand(-1, first, -1), gate.unsqueeze(1).expand(-1, tokens - first, -1))
    return x, torch.cat(gates, dim=1)


_PROCESSOR = "HunyuanVideoAttnProcessor2_0"
_PADDING = (
    "Padding of the text is cut off before the model runs; where lengths differ in a batch, keys end at each "
    "element's own."
)
_REFINER = "Outside of FlashOmni: the token refiner of the text."

HUNYUAN_VIDEO = Family(
    models=("HunyuanVideoTransformer3DModel",),
    blocks=(
        double_blocks("HunyuanVideoTransformerBlock", _PROCESSOR),
        double_blocks("HunyuanVideoTokenReplaceTransformerBlock", _PROCESSOR),
        single_blocks("HunyuanVideoSingleTransformerBlock", _PROCESSOR),
        single_blocks("HunyuanVideoTokenReplaceSingleTransformerBlock", _PROCESSOR, modulate=_modulate),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_VIDEO, "arXiv 2509.25401, its configuration for HunyuanVideo"),
    notes=(_PADDING, _REFINER),
)
FRAMEPACK = Family(
    models=("HunyuanVideoFramepackTransformer3DModel",),
    blocks=(
        double_blocks("HunyuanVideoTransformerBlock", _PROCESSOR),
        single_blocks("HunyuanVideoSingleTransformerBlock", _PROCESSOR),
    ),
    text_first=False,
    prepare=_prepare_framepack,
    presets=presets_around(PAPER_VIDEO, CARRIED_OVER),
    notes=(_PADDING, _REFINER, "Earlier frames are protected as text is; every section is a run of its own."),
)
FAMILIES = (HUNYUAN_VIDEO, FRAMEPACK)
