"""What an engine will hold between steps, in bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashomni.config import Config

KINDS = ("symbols", "cached", "history")


@dataclass(frozen=True)
class LayerShape:
    """One attention over a joint sequence of `tokens`.

    outputs: (rows, features) of each output projection. keeps_o: one of them is no plain linear layer, so
    that O itself is kept. scratch: (name, elements) of what it needs while it runs, which all layers share.
    """

    name: str
    heads: int
    head_dim: int
    tokens: int
    outputs: tuple[tuple[int, int], ...]
    keeps_o: bool = False
    scratch: tuple[tuple[str, int], ...] = ()

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer, in all contexts."""

    name: str
    symbols: int
    cached: int
    history: int

    @property
    def total(self) -> int:
        return self.symbols + self.cached + self.history


@dataclass(frozen=True)
class Memory:
    """memory()'s answer; str() gives a table. Bytes, by layer and by what they are for."""

    layers: tuple[LayerMemory, ...]
    buffers: int  # scratch tensors that all layers share

    @property
    def by_kind(self) -> dict[str, int]:
        """As RunStats.bytes_held says it of a run."""
        sums = {kind: sum(getattr(layer, kind) for layer in self.layers) for kind in KINDS}
        return sums | {"buffers": self.buffers}

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    def __str__(self) -> str:
        def line(name: str, sizes: Sequence[int]) -> str:
            return f"{name:<{width}} " + " ".join(f"{size / 2**20:>10.1f}" for size in sizes)

        width = max((len(layer.name) for layer in self.layers), default=0) + 1
        width = max(width, len("all layers"))
        lines = [f"{'MiB':<{width}} " + " ".join(f"{kind:>10}" for kind in (*KINDS, "total"))]
        for layer in self.layers:
            lines.append(line(layer.name, [*(getattr(layer, kind) for kind in KINDS), layer.total]))
        kept = [self.by_kind[kind] for kind in KINDS]
        lines.append(line("all layers", [*kept, sum(kept)]))
        lines.append(f"{'scratch':<{width}} {'':>32} {self.buffers / 2**20:>10.1f}")
        lines.append(f"{'in all':<{width}} {'':>32} {self.total / 2**20:>10.1f}")
        return "\n".join(lines)


def predict(
    config: Config, layers: Sequence[LayerShape], *, batch: int = 1, contexts: int = 1, itemsize: int = 2
) -> Memory:
    """What a run over `layers` holds once each of its kinds of step has been.

    contexts: passes a step (2 with classifier-free guidance in passes of their own). itemsize: bytes of an
    element of the model's dtype.
    """
    rows = []
    for index, layer in enumerate(layers):
        if index not in config.dense_layers:
            rows.append(_layer(config, layer, batch, contexts, itemsize))
        else:
            rows.append(LayerMemory(layer.name, contexts * _symbol_bytes(config, layer, batch), 0, 0))
    return Memory(tuple(rows), _scratch_bytes(config, layers, batch, itemsize))


def _layer(config: Config, layer: LayerShape, batch: int, contexts: int, itemsize: int) -> LayerMemory:
    order = config.max_order
    o = layer.tokens * layer.width
    products = sum(rows * features for rows, features in layer.outputs)
    cached = 0 if layer.keeps_o else (order + 1) * products
    history = (order + 1 if layer.keeps_o else order) * o
    each = batch * contexts * itemsize
    symbols = contexts * _symbol_bytes(config, layer, batch)
    return LayerMemory(layer.name, symbols, each * cached, each * history)


def _symbol_bytes(config: Config, layer: LayerShape, batch: int) -> int:
    tiles = -(-layer.tokens // config.block_q) * layer.heads
    blocks = -(-layer.tokens // config.block_kv)
    return batch * (-(-tiles // 8) + -(-tiles * blocks // 8))


def _scratch_bytes(config: Config, layers: Sequence[LayerShape], batch: int, itemsize: int) -> int:
    """Tensors of one name and size are one tensor."""
    tensors: set[tuple[str, int]] = set()
    for index, layer in enumerate(layers):
        o = layer.tokens * layer.width
        tensors |= {("q", o), ("k", o), ("v", o), *layer.scratch}
        if config.max_order > 0 and not layer.keeps_o and index not in config.dense_layers:
            tensors.add(("last_difference", o))
    return batch * itemsize * sum(size for _, size in tensors)
