"""FLUX.1: dev, schnell, Fill, Control, Kontext."""

from __future__ import annotations

from torch import Tensor

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks, ParallelBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import PAPER_IMAGE, Family, presets_around

IMAGE = Projections("to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1")
TEXT = Projections("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", out="to_add_out")
BOTH = Projections("to_q", "to_k", "to_v", "norm_q", "norm_k")


def reference_tokens(image_ids: Tensor) -> int:
    """Pictures to edit are numbered from 1 on in the first coordinate of their tokens, which come last."""
    ids = image_ids[0] if image_ids.ndim == 3 else image_ids
    return int((ids[:, 0] != 0).sum())


def _prepare(inputs: Inputs, call: Call) -> None:
    call.text_tokens = inputs["encoder_hidden_states"].shape[1]
    call.condition = call.read(inputs["img_ids"], reference_tokens)


FLUX = Family(
    models=("FluxTransformer2DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="FluxTransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor="FluxAttnProcessor",
            feed_forward=("ff", "ff_context"),
            rope=rope.joint_tables,
        ),
        ParallelBlocks(
            path="single_transformer_blocks",
            block="FluxSingleTransformerBlock",
            attention="attn",
            stream=BOTH,
            processor="FluxAttnProcessor",
            norm="norm",
            mlp="proj_mlp",
            activation="act_mlp",
            out="proj_out",
            rope=rope.joint_tables,
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, "arXiv 2509.25401, its configuration for FLUX.1"),
)
FAMILIES = (FLUX,)
