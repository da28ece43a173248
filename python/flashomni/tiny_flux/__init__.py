"""tiny_flux: a small text-to-image Flux, really trained, that ships with the package.

It draws coloured shapes and handwritten digits ("a red star above a blue circle on a striped background") in
256 x 256 pixels, 4,096 image tokens, through diffusers' own FluxPipeline; `score` tells from the pixels
whether
a picture shows what its prompt says. So what sparse attention does to quality can be measured without a
network
connection and without a large model.

    from flashomni import tiny_flux
    pipe = tiny_flux.load()
    image, = tiny_flux.generate(pipe, ["a red star above a blue circle"], seeds=[0])
    print(tiny_flux.score(image, "a red star above a blue circle"))
"""

from __future__ import annotations

import importlib
import importlib.resources

_EXPORTS = {
    "encode": "vocabulary",
    "load": "pipeline",
    "generate": "pipeline",
    "score": "check",
    "Score": "check",
}
__all__ = [*_EXPORTS, "HELD_OUT_PROMPTS"]


def _held_out_prompts() -> list[str]:
    return importlib.resources.files(__package__).joinpath("held_out.txt").read_text().splitlines()


def __getattr__(name: str):
    """Loads each export when it is first asked for: torch and diffusers are slow to import."""
    if name == "HELD_OUT_PROMPTS":
        value = _held_out_prompts()
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
