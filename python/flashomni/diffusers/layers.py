"""The attentions of a model, each with what of it can be sparse and why the rest cannot."""

from __future__ import annotations

from torch import nn

from flashomni.diffusers.blocks import Blocks, Layer, part
from flashomni.diffusers.families import Family

HEAD_DIMS = (64, 72, 80, 96, 128, 256)


def find_layers(model: nn.Module, family: Family, prefix: str = "") -> list[Layer]:
    """Every attention that the family describes, in the model's order, looked at as the model is now.

    prefix: what the names of the layers begin with, in a pipeline with several models.
    """
    layers: list[Layer] = []
    for path in dict.fromkeys(spec.path for spec in family.blocks):
        specs = [spec for spec in family.blocks if spec.path == path]
        attentions = tuple(dict.fromkeys(spec.attention for spec in specs))
        for i, block in enumerate(part(model, path)):
            for attention in attentions:
                if getattr(block, attention, None) is None and attention != attentions[0]:
                    continue  # not every block has a second one
                which = attention if len(attentions) > 1 else ""
                name = ".".join(filter(None, (prefix, path, str(i), which)))
                fitting = [spec for spec in specs if spec.attention == attention]
                layers.append(_layer(len(layers), name, block, fitting))
    return layers


def _layer(index: int, name: str, block: nn.Module, specs: list[Blocks]) -> Layer:
    spec = next((spec for spec in specs if _is(block, spec.block)), None)
    layer = Layer(index, name, block, spec or specs[0])
    if spec is None:
        known = " or ".join(spec.block for spec in specs)
        layer.refusal = f"is a {type(block).__name__}, not a {known}"
    else:
        layer.refusal = _refusal(layer)
    if layer.refusal is None:
        layer.spec.find_fallbacks(layer)
    return layer


def _is(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _refusal(layer: Layer) -> str | None:
    if layer.head_dim not in HEAD_DIMS:
        return f"head_dim {layer.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    processor = layer.attention.processor
    name = type(processor).__name__
    if name != layer.spec.processor and not getattr(processor, "flashomni", False):
        return f"has the processor {name}, not {layer.spec.processor}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "is set up for context parallelism"
    return layer.spec.refusal(layer)
