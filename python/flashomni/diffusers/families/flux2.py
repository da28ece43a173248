"""FLUX.2: dev, Klein; with reference pictures or without."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import FusedBlocks, JointBlocks
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE, TEXT
from flashomni.diffusers.families.flux import prepare as prepare_flux


def _prepare(inputs: Inputs, call: Call) -> None:
    if inputs["kv_cache"] is not None or inputs["kv_cache_mode"] is not None:
        raise NotImplementedError("kv_cache: expected None, got a cache of reference tokens")
    prepare_flux(inputs, call)


FLUX2 = Family(
    models=("Flux2Transformer2DModel",),
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            block="Flux2TransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor="Flux2AttnProcessor",
            rope=rope.joint_tables,
        ),
        FusedBlocks(
            path="single_transformer_blocks",
            block="Flux2SingleTransformerBlock",
            attention="attn",
            processor="Flux2ParallelSelfAttnProcessor",
            before="to_qkv_mlp_proj",
            norm_q="norm_q",
            norm_k="norm_k",
            activation="mlp_act_fn",
            after="to_out",
            rope=rope.joint_tables,
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=("Klein's cache of reference keys has processors of its own: those layers stay dense.",),
)
FAMILIES = (FLUX2,)
