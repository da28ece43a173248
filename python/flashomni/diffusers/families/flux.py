"""FLUX.1: dev, schnell, Fill, Control, Kontext; and models built like it: LongCat-Image, Ovis-Image,
Bria 3.2."""

from __future__ import annotations

from torch import Tensor

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import JointBlocks, ParallelBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around

IMAGE = Projections("to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1")
TEXT = Projections("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", out="to_add_out")
BOTH = Projections("to_q", "to_k", "to_v", "norm_q", "norm_k")


def reference_tokens(image_ids: Tensor) -> int:
    """Pictures to edit come last; the first coordinate of their tokens is another than that of the first."""
    ids = image_ids[0] if image_ids.ndim == 3 else image_ids
    return int((ids[:, 0] != ids[0, 0]).sum())


def prepare(inputs: Inputs, call: Call) -> None:
    """Text first, pictures to edit last."""
    call.text_tokens = inputs["encoder_hidden_states"].shape[1]
    call.condition = call.read(inputs["img_ids"], reference_tokens)


def flux_blocks(
    name: str, processor: str, feed_forward: tuple[str, ...] = ("ff", "ff_context"), gated: bool = False
) -> tuple[JointBlocks, ParallelBlocks]:
    """FLUX.1's two shapes of block; `name` is what their classes begin with."""
    return (
        JointBlocks(
            path="transformer_blocks",
            block=f"{name}TransformerBlock",
            attention="attn",
            image=IMAGE,
            text=TEXT,
            processor=processor,
            feed_forward=feed_forward,
            rope=rope.joint_tables,
        ),
        ParallelBlocks(
            path="single_transformer_blocks",
            block=f"{name}SingleTransformerBlock",
            attention="attn",
            stream=BOTH,
            processor=processor,
            norm="norm",
            mlp="proj_mlp",
            activation="act_mlp",
            out="proj_out",
            gated=gated,
            rope=rope.joint_tables,
        ),
    )


FLUX = Family(
    models=("FluxTransformer2DModel",),
    blocks=flux_blocks("Flux", "FluxAttnProcessor"),
    prepare=prepare,
    presets=presets_around(PAPER_IMAGE, "arXiv 2509.25401, its configuration for FLUX.1"),
)
LONGCAT = Family(
    models=("LongCatImageTransformer2DModel",),
    blocks=flux_blocks("LongCatImage", "LongCatImageAttnProcessor"),
    prepare=prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
)
OVIS = Family(
    models=("OvisImageTransformer2DModel",),
    blocks=flux_blocks("OvisImage", "OvisImageAttnProcessor", feed_forward=(), gated=True),
    prepare=prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=("Feed-forwards are SwiGLU and the model's own.",),
)
BRIA = Family(
    models=("BriaTransformer2DModel",),
    blocks=flux_blocks("Bria", "BriaAttnProcessor"),
    prepare=prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
)
FAMILIES = (FLUX, LONGCAT, OVIS, BRIA)
