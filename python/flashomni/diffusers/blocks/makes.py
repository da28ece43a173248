"""Makes of feed-forward that are two linear layers with a GELU between them, and where these lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class FeedForwardLayers:
    """The modules that a feed-forward is made of."""

    first: nn.Module
    activation: nn.Module
    last: nn.Module
    dropouts: tuple[nn.Module, ...] = ()


def _of_diffusers(module: nn.Module) -> FeedForwardLayers | None:
    net = getattr(module, "net", ())
    if len(net) not in (3, 4):
        return None
    return FeedForwardLayers(net[0].proj, net[0], net[2], tuple(net[1::2]))


_MAKES: dict[str, Callable[[nn.Module], FeedForwardLayers | None]] = {  # by the module's class
    "FeedForward": _of_diffusers,
    "Kandinsky5FeedForward": lambda module: FeedForwardLayers(
        module.in_layer, module.activation, module.out_layer
    ),
}


def feed_forward_layers(module: nn.Module) -> FeedForwardLayers | None:
    """Those of a module of a known make with a GELU; else None."""
    make = _MAKES.get(type(module).__name__)
    layers = make(module) if make is not None else None
    return layers if layers is not None and type(layers.activation).__name__ == "GELU" else None
