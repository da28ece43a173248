"""FLUX.3: blocks a mode, then joint blocks over [text, image, reference pictures]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import Layer, PlainBlocks
from flashomni.diffusers.blocks.base import Restore, put_processor
from flashomni.diffusers.blocks.plain import PlainProcessor
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import CARRIED_OVER, PAPER_IMAGE, Family, presets_around
from flashomni.diffusers.families.flux import IMAGE


class Flux3Processor(PlainProcessor):
    """FLUX.3's attention gives mask and RoPE by position."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if not self.engine.enabled:
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        return super().__call__(
            attn, hidden_states, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
        )


@dataclass(frozen=True, kw_only=True)
class Flux3Blocks(PlainBlocks):
    """The joint blocks: plain attention over all, the feed-forward beside it is the model's own.

    Norms of queries and keys stay in float32 in a model of another type: they are called as modules.
    """

    def find_fallbacks(self, layer: Layer) -> None:
        layer.look_at(replace(self.stream, norm_q=None, norm_k=None))

    def intercept(self, call: Call, layer: Layer) -> Restore:
        return put_processor(layer.attention, Flux3Processor(call, layer, layer.attention.processor))


def _prepare(inputs: Inputs, call: Call) -> None:
    call.text_tokens = inputs["encoder_hidden_states"].shape[1]
    references = inputs["image_cond_hidden_states"]
    call.condition = references.shape[1] if references is not None else 0


FLUX3 = Family(
    models=("Flux3Transformer2DModel",),
    blocks=(
        Flux3Blocks(
            path="single_transformer_blocks",
            block="Flux3SingleTransformerBlock",
            attention="attn",
            stream=IMAGE,
            processor="Flux3AttnProcessor",
            rope=rope.joint_tables,
        ),
    ),
    prepare=_prepare,
    presets=presets_around(PAPER_IMAGE, CARRIED_OVER),
    notes=(
        "Outside of FlashOmni: the blocks of a single mode, before the joint ones; feed-forwards.",
        "Norms of queries and keys are the model's own modules, in float32.",
    ),
)
FAMILIES = (FLUX3,)
