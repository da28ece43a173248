"""What an engine will hold between steps, in bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flashomni.config import Config
from flashomni.ops.forecast import SCALE_COLUMNS

KINDS = ("symbols", "cached", "history")  # on the device


@dataclass(frozen=True)
class LayerShape:
    """One attention over a joint sequence of `tokens`.

    outputs: (rows, features) of each output projection. keeps_o: one of them is no plain linear layer, so
    that O itself is kept. scratch: (name, elements) of what it needs while it runs, which all layers share.
    followers: by the Config's field, (name, rows, features) of what can follow the attention. has_text: some
    of the tokens are text.
    """

    name: str
    heads: int
    head_dim: int
    tokens: int
    outputs: tuple[tuple[int, int], ...]
    keeps_o: bool = False
    scratch: tuple[tuple[str, int], ...] = ()
    followers: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    has_text: bool = True

    def following(self, config: Config) -> list[tuple[str, int, int]]:
        """Those that do under `config`."""
        return [one for name, one in self.followers.items() if getattr(config, name) == "follow"]

    def keeps_nothing(self, config: Config) -> bool:
        """Between steps, as nothing can be cached."""
        return not (self.has_text or config.caches_without_text)

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
    host_history: int = 0  # in the host's memory

    @property
    def total(self) -> int:
        """On the device."""
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
        return sums | {"buffers": self.buffers, "host_history": self.host}

    @property
    def total(self) -> int:
        """On the device."""
        return sum(layer.total for layer in self.layers) + self.buffers

    @property
    def host(self) -> int:
        """In the host's memory."""
        return sum(layer.host_history for layer in self.layers)

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
        if self.host:
            lines.append(f"{'on the host':<{width}} {'':>32} {self.host / 2**20:>10.1f}")
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
        if index not in config.dense_layers and not layer.keeps_nothing(config):
            rows.append(_layer(config, layer, batch, contexts, itemsize))
        else:
            rows.append(LayerMemory(layer.name, contexts * _symbol_bytes(config, layer, batch), 0, 0))
    return Memory(tuple(rows), _scratch_bytes(config, layers, batch, itemsize))


def _layer(config: Config, layer: LayerShape, batch: int, contexts: int, itemsize: int) -> LayerMemory:
    order = config.max_order
    each = batch * contexts

    def kept(rows: int, width: int) -> int:
        return each * sum(size for _, size in _forms(config, rows, width, itemsize))

    cached = 0 if layer.keeps_o else (order + 1) * sum(kept(*output) for output in layer.outputs)
    cached += (order + 1) * sum(kept(rows, features) for _, rows, features in layer.following(config))
    history = (order + 1 if layer.keeps_o else order) * kept(layer.tokens, layer.width)
    symbols = contexts * _symbol_bytes(config, layer, batch)
    if config.history == "host" and not layer.keeps_o:
        return LayerMemory(layer.name, symbols, cached, 0, history)
    return LayerMemory(layer.name, symbols, cached, history)


def _forms(config: Config, rows: int, width: int, itemsize: int) -> list[tuple[str, int]]:
    """The tensors that a kept tensor of [rows, width] is made of: (what they are, bytes)."""
    if config.cache_dtype == "model":
        return [("", rows * width * itemsize)]
    return [(" values", rows * width), (" scales", rows * -(-width // SCALE_COLUMNS) * 4)]


def _symbol_bytes(config: Config, layer: LayerShape, batch: int) -> int:
    tiles = -(-layer.tokens // config.block_q) * layer.heads
    blocks = -(-layer.tokens // config.block_kv)
    return batch * (-(-tiles // 8) + -(-tiles * blocks // 8))


def _scratch_bytes(config: Config, layers: Sequence[LayerShape], batch: int, itemsize: int) -> int:
    """Tensors of one name and size are one tensor."""
    tensors: set[tuple[str, int]] = set()
    for index, layer in enumerate(layers):
        o = layer.tokens * layer.width * itemsize
        tensors |= {("q", o), ("k", o), ("v", o)}
        tensors |= {(name, size * itemsize) for name, size in layer.scratch}
        if index not in config.dense_layers and not layer.keeps_nothing(config):
            tensors |= _kept_scratch(config, layer, itemsize)
    return batch * sum(size for _, size in tensors)


def _kept_scratch(config: Config, layer: LayerShape, itemsize: int) -> set[tuple[str, int]]:
    """What kept tensors go through on their way."""
    order, o = config.max_order, layer.tokens * layer.width * itemsize
    tensors: set[tuple[str, int]] = set()
    if order > 0 and not layer.keeps_o:
        tensors.add(("last_difference", o))
    for i in range(order + 1 if layer.keeps_o else order):
        if config.cache_dtype != "model" and i > 0:
            tensors.add((f"history {i}", o))
        if config.history == "host" and not layer.keeps_o:
            forms = _forms(config, layer.tokens, layer.width, itemsize)
            tensors |= {(f"history {i}{form}", size) for form, size in forms}
    if config.cache_dtype != "model" and not layer.keeps_o:
        products = [rows * features * itemsize for rows, features in layer.outputs]
        tensors |= {(f"product {i}", size) for i in range(order + 1) for size in products}
    return tensors
