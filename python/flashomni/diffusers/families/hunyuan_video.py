"""HunyuanVideo: text to video, image to video (token replacement too)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks, ParallelBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import PAPER_VIDEO, Family, presets_around
from flashomni.diffusers.families.flux import BOTH, IMAGE, TEXT


def _prepare(inputs: Inputs, call: Call) -> None:
    call.trim_text(inputs, "encoder_attention_mask", ("encoder_hidden_states",))


def _double(block: str) -> JointBlocks:
    return JointBlocks(
        path="transformer_blocks",
        block=block,
        attention="attn",
        image=IMAGE,
        text=TEXT,
        processor="HunyuanVideoAttnProcessor2_0",
        feed_forward=("ff", "ff_context"),
        rope=rope.image_tables,
        mask="attention_mask",
    )


def _single(block: str, **changes: Any) -> ParallelBlocks:
    return ParallelBlocks(
        path="single_transformer_blocks",
        block=block,
        attention="attn",
        stream=BOTH,
        processor="HunyuanVideoAttnProcessor2_0",
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


HUNYUAN_VIDEO = Family(
    models=("HunyuanVideoTransformer3DModel",),
    blocks=(
        _double("HunyuanVideoTransformerBlock"),
        _double("HunyuanVideoTokenReplaceTransformerBlock"),
        _single("HunyuanVideoSingleTransformerBlock"),
        _single("HunyuanVideoTokenReplaceSingleTransformerBlock", modulate=_modulate),
    ),
    text_first=False,
    prepare=_prepare,
    presets=presets_around(PAPER_VIDEO, "arXiv 2509.25401, its configuration for HunyuanVideo"),
    notes=(
        "Padding of the text is cut off before the model runs; where lengths differ in a batch, keys end at "
        "each element's own.",
        "Outside of FlashOmni: the token refiner of the text.",
    ),
)
FAMILIES = (HUNYUAN_VIDEO,)
