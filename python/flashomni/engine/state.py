"""What is kept between steps a (context, layer): symbols, cached products, histories."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from flashomni import ops
from flashomni.engine.buffers import new_zeros
from flashomni.engine.follow import Followed
from flashomni.engine.kept import Kept
from flashomni.policies import Segment
from flashomni.symbols import SparseSymbols, pack


class Summary:
    """What a layer's symbols come to, read off them at every Update into memory that stays where it is.

    rows: S_c of whole row blocks, active where any head is, with one head: for work that all heads of a row
    share. awake: uint8 [B], 1 in batch elements with an active tile. shares: float32 [2, H], the selected
    share of block pairs and the share of active tiles.
    """

    def __init__(self, symbols: SparseSymbols):
        s = symbols
        self.symbols = s
        self.rows = _rows_of(s, 1)
        self.awake = new_zeros((s.batch,), torch.uint8, s.device)
        self.shares = new_zeros((2, s.heads), torch.float32, s.device)

    def measure(self) -> None:
        ops.summarize_symbols(self.symbols, self.rows.cache, self.shares, self.awake)


class Asleep:
    """Whether a layer is reused whole, decided on the GPU at every Update and obeyed there.

    keys: one bit a row block, for the projections of keys and values: 0 in batch elements without any active
    tile, which look at none. weights: float32 [D + 1], times which the coefficients are taken: a layer
    without any active tile is reused at order 0. first_weights[n]: the first n of them.
    """

    def __init__(self, summary: Summary, order: int):
        self.keys = _rows_of(summary.symbols, 1)
        with torch.inference_mode(False):
            self.ones = self.keys.cache.clone()
            self.awake = summary.awake.unsqueeze(1)
            self.weights = torch.ones(order + 1, device=summary.awake.device)
            self.first_weights = [self.weights[:n] for n in range(order + 2)]
            self.later_weights = self.weights[1:]

    def decide(self) -> None:
        torch.mul(self.ones, self.awake, out=self.keys.cache)
        self.later_weights.copy_(self.awake.any())


class SpreadRows:
    """A summary's rows in every head, no key skipped: for work on whole rows that is done head by head."""

    def __init__(self, summary: Summary):
        self.rows = summary.rows
        self.symbols = _rows_of(summary.symbols, summary.symbols.heads)

    def decide(self) -> None:
        rows, _ = self.rows.masks()
        self.symbols.cache.copy_(pack(rows[:, 0].repeat_interleave(self.symbols.heads, dim=1)))


def _rows_of(symbols: SparseSymbols, heads: int) -> SparseSymbols:
    """Ones to be written, with the geometry of `symbols` and `heads` heads; no key is skipped."""
    s = symbols
    with torch.inference_mode(False):
        ones = SparseSymbols.ones(s.batch, heads, s.q_tokens, s.kv_tokens, s.block_q, s.block_kv, s.device)
        return replace(ones, cache=ones.cache.clone(), skip=None)


class Protection:
    """Bits of a segment that no policy may clear: its rows whole, and its columns in every row."""

    def __init__(self, symbols: SparseSymbols, segment: Segment):
        s, end = symbols, segment.start + segment.length
        rows = slice(segment.start // s.block_q, -(-end // s.block_q))
        columns = slice(segment.start // s.block_kv, -(-end // s.block_kv))
        with torch.inference_mode(False):
            cache = torch.zeros(1, s.heads, s.q_blocks, dtype=torch.bool, device=s.device)
            skip = torch.zeros(*cache.shape, s.kv_blocks, dtype=torch.bool, device=s.device)
            cache[:, :, rows] = skip[:, :, rows] = skip[..., columns] = True
            sizes = {"q_tokens": s.q_tokens, "kv_tokens": s.kv_tokens}
            self.bits = SparseSymbols.from_masks(cache, skip, block_q=s.block_q, block_kv=s.block_kv, **sizes)

    def apply(self, symbols: SparseSymbols) -> None:
        """An element that is reused whole stays so."""
        awake = symbols.cache.any(1, keepdim=True)
        symbols.cache.bitwise_or_(self.bits.cache * awake)
        symbols.skip.bitwise_or_(self.bits.skip)


@dataclass(slots=True)
class LayerState:
    """One attention layer in one context. Tensors outlive a run; the numbers say what in them is valid."""

    shape: tuple  # (batch, tokens, heads, head_dim, dtype, device): a change makes a new state
    symbols: SparseSymbols
    cached: list[list[Kept]] = field(default_factory=list)  # per output projection, D + 1 of [B, M, N]
    history: list[Kept] = field(default_factory=list)  # differences of O, each [B, S, H * head_dim]
    recorded: int = 0  # steps in a row whose O entered the history
    recorded_step: int = -1
    updated_step: int = -1  # the Update whose symbols and caches these are
    orders: int = 1  # how many of D + 1 the history supported at that Update
    reuse_all: bool = False  # known on the host: S_c is zero everywhere, so that nothing is launched
    asleep: Asleep | None = None  # the same on a GPU, where the host does not know
    summary: Summary | None = None  # of the last Update
    spread: SpreadRows | None = None
    protections: dict[Segment, Protection] = field(default_factory=dict)
    keeps_o: bool = False  # O itself is forecast, as an output projection is no plain linear
    followed: dict[str, Followed] = field(default_factory=dict)  # what follows the attention
    done: str = "full"  # what the pass at hand did here: "full", "record" (full, into the history), ..
    differences: tuple[int, int] = (0, 1)  # history_of() the last recorded step, before it was recorded
    density: Tensor | None = None  # float32 [H], selected share of block pairs
    cache_density: Tensor | None = None  # float32 [H], share of active tiles
    policy: dict = field(default_factory=dict)

    def summarize(self, order: int, *, spread: bool) -> None:
        """After a choice of symbols: what follows from them, for a history up to `order`."""
        if self.summary is None:
            self.summary = Summary(self.symbols)
        self.summary.measure()
        self.decide_reuse(order)
        if not spread:
            return
        if self.spread is None:
            self.spread = SpreadRows(self.summary)
        self.spread.decide()

    def decide_reuse(self, order: int) -> None:
        """Is the layer reused whole? The host reads that only where it is free."""
        if not self.summary.awake.is_cuda:
            self.reuse_all = not bool(self.summary.awake.any())
            return
        if self.asleep is None:
            self.asleep = Asleep(self.summary, order)
        self.asleep.decide()

    @property
    def rows(self) -> SparseSymbols:
        """S_c of whole row blocks; valid once summarize() has been called."""
        return self.summary.rows

    @property
    def spread_rows(self) -> SparseSymbols:
        """The same in every head, no key skipped; valid once summarize(spread=True) has been called."""
        return self.spread.symbols

    def protect(self, segment: Segment) -> None:
        if segment not in self.protections:  # one each: graphs read them by address
            self.protections[segment] = Protection(self.symbols, segment)
        self.protections[segment].apply(self.symbols)

    def keep_density(self) -> None:
        """Statistics keep these tensors; the next Update, or a graph of it, writes the summary's."""
        self.density, self.cache_density = self.summary.shares.clone().unbind(0)

    def note_recorded(self, engine, recorded: int) -> None:
        self.recorded, self.recorded_step = recorded, engine.index

    def note_updated(self, engine, orders: int) -> None:
        self.orders, self.updated_step = orders, engine.index

    def coefficients(self, engine, orders: int) -> Tensor:
        """Of the Dispatch step at hand, float32 [orders]; order 0's alone in a layer that is reused whole."""
        row = engine.scalars.first(engine, self.shape[-1], orders)
        return row if self.asleep is None or orders == 1 else row * self.asleep.first_weights[orders]

    def is_ready(self, engine) -> bool:
        """Whether the Update before the Dispatch step at hand was done here."""
        return self.updated_step == engine.index - engine.plan.since_update

    def is_followed(self, name: str) -> bool:
        """Whether what follows by this name was kept at the Update whose symbols these are."""
        followed = self.followed.get(name)
        return followed is not None and followed.recorded_step == self.updated_step

    def history_of(self, engine) -> tuple[int, int]:
        """(how many differences the history supports, steps since its last record) at the step at hand."""
        gap = engine.index - self.recorded_step
        valid = min(self.recorded, engine.config.max_order) if self.recorded and gap > 0 else 0
        return valid, max(gap, 1) if valid else 1

    def drop_history(self) -> None:
        self.history, self.recorded, self.recorded_step = [], 0, -1

    def reset(self) -> None:
        """Forgets the run, keeps the memory."""
        self.recorded, self.recorded_step, self.updated_step = 0, -1, -1
        self.policy = {}
        for followed in self.followed.values():
            followed.recorded_step = -1

    def tensors(self) -> dict[str, list[Tensor]]:
        """Tensors by what they are for."""
        return {
            "symbols": [t for t in (self.symbols.cache, self.symbols.skip) if t is not None],
            "cached": [
                t
                for kept in chain(*self.cached, *(f.kept for f in self.followed.values()))
                for t in kept.parts
            ],
            "history": [t for kept in self.history if not kept.on_host for t in kept.parts],
            "host_history": [t for kept in self.history if kept.on_host for t in kept.parts],
        }


class Contexts:
    """Layer states of every context (pass of classifier-free guidance) that has been seen."""

    def __init__(self) -> None:
        self._states: dict[Hashable, dict[int, LayerState]] = {}

    def layer(self, context: Hashable, layer: int, shape: tuple, block_q: int, block_kv: int) -> LayerState:
        """The state of a layer, made anew when the shape differs from the one before."""
        layers = self._states.setdefault(context, {})
        state = layers.get(layer)
        if state is None or state.shape != shape:
            batch, tokens, heads, _, _, device = shape
            with torch.inference_mode(False):
                symbols = SparseSymbols.ones(batch, heads, tokens, tokens, block_q, block_kv, device)
            state = layers[layer] = LayerState(shape, symbols)
        return state

    def of(self, context: Hashable) -> dict[int, LayerState]:
        return self._states.get(context, {})

    def get(self, context: Hashable, layer: int) -> LayerState | None:
        return self._states.get(context, {}).get(layer)

    def names(self) -> list[Hashable]:
        return list(self._states)

    def reset(self, seen: set[Hashable]) -> None:
        """Begins a run: keeps the memory of the contexts in `seen` only."""
        self._states = {name: layers for name, layers in self._states.items() if name in seen}
        for layers in self._states.values():
            for state in layers.values():
                state.reset()

    def states(self) -> Iterator[LayerState]:
        for layers in self._states.values():
            yield from layers.values()
