"""What FlashOmni will hold on a diffusers model, before a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashomni.config import Config
from flashomni.diffusers.families import JointBlocks, ParallelBlocks, family_of, part
from flashomni.diffusers.layers import Layer, find_layers
from flashomni.engine.memory import LayerShape, Memory, predict


def memory(
    config: Config | str | None,
    model: Any,
    *,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    contexts: int = 1,
    dtype: torch.dtype | None = None,
) -> Memory:
    """The bytes that a run of `model` (a pipeline or a transformer) under `config` will hold, by layer.

    image_tokens, text_tokens: of the joint sequence. batch: elements a pass. contexts: passes a step.
    dtype: the model's own unless given. The model may be on the meta device.

    CUDA graphs, workspaces and the model itself are not counted. Raises ValueError or TypeError that names
    the argument, NotImplementedError for an unknown model.
    """
    from flashomni.diffusers.api import _config, _transformer_of

    sizes = {"image_tokens": image_tokens, "text_tokens": text_tokens, "batch": batch, "contexts": contexts}
    for name, value in sizes.items():
        least = 0 if name == "text_tokens" else 1
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    transformer, _ = _transformer_of(model)
    if dtype is None:
        dtype = next(transformer.parameters()).dtype
    shapes = [
        _shape_of(layer, image_tokens, text_tokens, dtype)
        for layer in find_layers(transformer, family_of(transformer))
        if layer.refusal is None
    ]
    return predict(_config(config), shapes, batch=batch, contexts=contexts, itemsize=dtype.itemsize)


def _shape_of(layer: Layer, image: int, text: int, dtype: torch.dtype) -> LayerShape:
    attention, spec, tokens = layer.attention, layer.spec, image + text
    width = attention.heads * attention.head_dim
    if isinstance(spec, ParallelBlocks):
        linears = [(tokens, part(layer.block, spec.out))]
        scratch = [("o", tokens * (width + part(layer.block, spec.mlp).out_features))]
    else:
        linears = [(image, part(attention, spec.image.out)), (text, part(attention, spec.text.out))]
        scratch = [("o", tokens * width), *_feed_forward(layer, spec, image, text)]
    return LayerShape(
        name=layer.name,
        heads=attention.heads,
        head_dim=attention.head_dim,
        tokens=tokens,
        outputs=tuple((rows, linear.out_features) for rows, linear in linears),
        keeps_o=any(type(linear) is not nn.Linear for _, linear in linears),
        scratch=tuple(scratch),
    )


def _feed_forward(layer: Layer, spec: JointBlocks, image: int, text: int) -> list[tuple[str, int]]:
    """The inner activations of feed-forwards that run as two products, by their rows."""
    found = []
    for name, rows in zip(spec.feed_forward, (image, text), strict=True):
        if any(note.split()[0] == name and "weight that is no plain" not in note for note in layer.fallbacks):
            continue
        found.append((f"feed_forward {rows}", rows * part(layer.block, name).net[0].proj.out_features))
    return found
