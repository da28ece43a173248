"""Model families, one file each: what is known of a model, as data. docs/engine.md tells how to add one."""

from __future__ import annotations

from torch import nn

from flashomni.diffusers.families import (
    allegro,
    aura_flow,
    chroma,
    cogvideox,
    cogview4,
    cosmos,
    flux,
    flux2,
    flux3,
    hunyuan_image,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    lumina2,
    mochi,
    pixart,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from flashomni.diffusers.families.base import Family, Preset

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes the family's models known. ValueError if another family has one of them."""
    for name in family.models:
        if FAMILIES.get(name, family) is not family:
            raise ValueError(f"models: expected classes that no family has yet, got {name!r}")
    FAMILIES.update(dict.fromkeys(family.models, family))


for _module in (
    allegro,
    aura_flow,
    chroma,
    cogvideox,
    cogview4,
    cosmos,
    flux,
    flux2,
    flux3,
    hunyuan_image,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    lumina2,
    mochi,
    pixart,
    qwen_image,
    sd3,
    wan,
    z_image,
):
    for _family in _module.FAMILIES:
        register_family(_family)


def family_of(model: nn.Module) -> Family:
    """The family of a model. NotImplementedError lists the known ones and says how to add another."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise NotImplementedError(
        f"transformer: expected one of {', '.join(sorted(FAMILIES))}, got {type(model).__name__}. To add "
        "a model, describe its blocks as a flashomni.diffusers.families.Family and pass that to "
        "flashomni.diffusers.families.register_family(): docs/engine.md"
    )


__all__ = ["FAMILIES", "Family", "Preset", "family_of", "register_family"]
