"""What FlashOmni will hold on a diffusers model, before a run."""

from __future__ import annotations

from typing import Any

import torch

from flashomni.config import Config
from flashomni.diffusers.families import family_of
from flashomni.diffusers.layers import find_layers
from flashomni.engine.memory import Memory, predict


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
    from flashomni.diffusers.api import config_of, transformers_of

    sizes = {"image_tokens": image_tokens, "text_tokens": text_tokens, "batch": batch, "contexts": contexts}
    for name, value in sizes.items():
        least = 0 if name == "text_tokens" else 1
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    parts = []
    for name, transformer in transformers_of(model):
        family = family_of(transformer)
        layers = [layer for layer in find_layers(transformer, family, name) if layer.refusal is None]
        shapes = [layer.spec.shape_of(layer, image_tokens, text_tokens) for layer in layers]
        # An attention's: models keep some small tensors in float32.
        model_dtype = next((layers[0].attention if layers else transformer).parameters()).dtype
        itemsize = (dtype or model_dtype).itemsize
        options = {"batch": batch, "contexts": contexts, "itemsize": itemsize}
        parts.append(predict(config_of(config, family), shapes, **options))
    return Memory(sum((part.layers for part in parts), ()), sum(part.buffers for part in parts))
