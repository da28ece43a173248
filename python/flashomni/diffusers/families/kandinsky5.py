"""Kandinsky 5: text to video, image to video, text to image, image editing."""

from __future__ import annotations

import torch

from flashomni.diffusers import rope
from flashomni.diffusers.blocks import PlainBlocks, Projections
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families.base import TEXTLESS, Family, textless_presets


def _prepare(inputs: Inputs, call: Call) -> None:
    if inputs["sparse_params"] is not None:
        raise NotImplementedError(
            "sparse_params: expected None, got NABLA's, which choose the blocks of keys themselves; load the "
            "model with attention_type='regular', or call it inside `with flashomni.disabled(...)`"
        )
    # A plain attribute, which stays on the host: the model would copy it in every step, and wait for that.
    times = inputs.model.time_embeddings
    times.freqs = times.freqs.to(inputs["hidden_states"].device)


KANDINSKY5 = Family(
    models=("Kandinsky5Transformer3DModel",),
    blocks=(
        PlainBlocks(
            path="visual_transformer_blocks",
            block="Kandinsky5TransformerDecoderBlock",
            attention="self_attention",
            heads="num_heads",
            stream=Projections(
                *("to_query", "to_key", "to_value", "query_norm", "key_norm"),
                out="out_layer",
                float_norms=True,
            ),
            processor="Kandinsky5AttnProcessor",
            feed_forward=("feed_forward",),
            cross_attention="cross_attention",
            has_text=False,
            rope=rope.pair_matrices,
            rotated=torch.bfloat16,
        ),
    ),
    prepare=_prepare,
    presets=textless_presets(tau_kv=0.05),
    notes=(
        TEXTLESS,
        "Outside of FlashOmni: the blocks of the text alone. NABLA (sparse_params) is refused.",
    ),
)
FAMILIES = (KANDINSKY5,)
