"""PixArt-Alpha and -Sigma, DiT, Latte: self-attention over an image or a frame, with a head_dim of 72."""

from __future__ import annotations

from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CROSS_DENSE, TEXTLESS, Family, textless_presets


def _prepare(inputs: Inputs, call: Call) -> None:
    inputs.refuse_options("cross_attention_kwargs")


_BLOCKS = PlainBlocks(
    path="transformer_blocks",
    block="BasicTransformerBlock",
    attention="attn1",
    stream=Projections("to_q", "to_k", "to_v", out="to_out.0", after_out="to_out.1"),
    processor="AttnProcessor2_0",
    feed_forward=("ff",),
    has_text=False,
)
_PRESETS = textless_presets(tau_kv=0.15)

PIXART = Family(
    models=("PixArtTransformer2DModel",),
    blocks=(_BLOCKS,),
    prepare=_prepare,
    presets=_PRESETS,
    notes=(TEXTLESS, CROSS_DENSE),
)
DIT = Family(
    models=("DiTTransformer2DModel",),
    blocks=(_BLOCKS,),
    prepare=_prepare,
    presets=_PRESETS,
    notes=(TEXTLESS,),
)
LATTE = Family(
    models=("LatteTransformer3DModel",),
    blocks=(_BLOCKS,),
    presets=_PRESETS,
    notes=(
        TEXTLESS,
        CROSS_DENSE,
        "Every frame is an element of the batch. Outside of FlashOmni: the blocks over time.",
    ),
)
FAMILIES = (PIXART, DIT, LATTE)
