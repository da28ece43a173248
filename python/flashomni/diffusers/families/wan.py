"""Wan 2.1 and 2.2: text to video, image to video, VACE, Animate, with one expert or two; its kin."""

from __future__ import annotations

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import ACROSS_HEADS, TEXTLESS, Family, textless_presets

WIDE_NORMS = Projections(
    "to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1", across_heads=True
)


def _blocks(path: str, block: str, processor: str = "WanAttnProcessor") -> PlainBlocks:
    return PlainBlocks(
        path=path,
        block=block,
        attention="attn1",
        stream=WIDE_NORMS,
        processor=processor,
        feed_forward=("ffn",),
        cross_attention="attn2",
        has_text=False,
        rope=rope.batched_tables,
    )


_PRESETS = textless_presets(tau_kv=0.05)
_NOTES = (TEXTLESS, ACROSS_HEADS)

WAN = Family(
    models=("WanTransformer3DModel", "WanAnimateTransformer3DModel", "ChronoEditTransformer3DModel"),
    blocks=(_blocks("blocks", "WanTransformerBlock"),),
    presets=_PRESETS,
    notes=_NOTES,
)
VACE = Family(
    models=("WanVACETransformer3DModel",),
    blocks=(_blocks("vace_blocks", "WanVACETransformerBlock"), _blocks("blocks", "WanTransformerBlock")),
    presets=_PRESETS,
    notes=_NOTES,
)


def _refuse_diffusion_forcing(inputs: Inputs, call: Call) -> None:
    """Each frame then has a scheduler of its own, a copy that our clock does not hear."""
    if inputs["enable_diffusion_forcing"]:
        raise NotImplementedError(
            "enable_diffusion_forcing: expected False, got True, where frames have steps of their own; call "
            "the model inside `with flashomni.disabled(...)`"
        )


SKYREELS_V2 = Family(
    models=("SkyReelsV2Transformer3DModel",),
    blocks=(_blocks("blocks", "SkyReelsV2TransformerBlock", "SkyReelsV2AttnProcessor"),),
    prepare=_refuse_diffusion_forcing,
    presets=_PRESETS,
    notes=_NOTES,
)
FAMILIES = (WAN, VACE, SKYREELS_V2)
