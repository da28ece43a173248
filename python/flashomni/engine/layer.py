"""One attention layer in one step: Full, Update or Dispatch, from q, k, v to the output projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.engine.follow import follow
from flashomni.engine.kept import Kept, differences, forecast, unit, update
from flashomni.engine.linear import (
    Norm,
    add_product,
    apply_linear,
    linear_tiles,
    norm_and_rope_pair,
    weight_and_bias,
    why_not_plain,
)
from flashomni.engine.measure import Measures, tile_norms
from flashomni.engine.state import LayerState
from flashomni.policies import Choice, Layout, Segment, Stats, Step
from flashomni.symbols import SparseSymbols


@dataclass(slots=True)
class Stream:
    """Rows of the joint sequence that share their projections: x [B, M, K] is rows start .. start + M.

    across_heads: the norms are over all heads at once. A head of a row then needs the others: GEMM-Q skips a
    row block only where it is cached in all heads.
    """

    x: Tensor
    start: int
    q: nn.Module
    k: nn.Module
    v: nn.Module
    norm_q: Norm | None = None
    norm_k: Norm | None = None
    across_heads: bool = False


@dataclass(slots=True)
class Output:
    """An output projection over rows start .. start + rows of the joint O."""

    linear: nn.Module
    start: int
    rows: int


@dataclass(slots=True)
class Attention:
    """A joint attention as a model asks for it.

    `o` [B, S, heads * head_dim] receives the heads' outputs. past(rows) makes [B, S, K] (a parallel MLP's) on
    the active row blocks at least (None: on all), for the one output projection there is then, where these
    are the columns past the heads; Config.mlp says whether the projection's rows follow the attention's.

    text: where the text lies; its length is 0 where there is none. condition: tokens that no policy may cache
    or skip either. valid: tokens a batch element, where padding ends the sequence: no key past them is seen.
    rope: tables of the joint sequence, float32 [S, D] each; or a function that rotates x [B, M, H, D], rows
    from its second argument on, in place.
    """

    layer: int
    heads: int
    head_dim: int
    text: Segment
    streams: list[Stream]
    outputs: list[Output]
    o: Tensor
    past: Callable[[SparseSymbols | None], Tensor] | None = None
    rope: tuple[Tensor, Tensor] | Callable[[Tensor, int], None] | None = None
    condition: Segment | None = None
    valid: tuple[int, ...] | None = None

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class LayerRun:
    """Carries out one Attention. `engine` gives the step, the buffers, the policy and the ledger.

    What the step does here is known before anything runs: `kind`, and for what follows it state.done.
    """

    def __init__(self, engine, attention: Attention):
        self.engine, self.a = engine, attention
        o, config = attention.o, engine.config
        self.shape = (*o.shape[:2], attention.heads, attention.head_dim)  # of q, k and v
        self.o4 = o.view(self.shape)
        self.state: LayerState = engine.contexts.layer(
            engine.context,
            attention.layer,
            (*self.shape, o.dtype, o.device),
            config.block_q,
            config.block_kv,
        )
        # Where nothing can be cached, nothing is kept either.
        self.caches = attention.text.length > 0 or not getattr(engine.policy, "caches_by_text", False)
        self.past: Tensor | None = None
        self.keeps_o = self.caches and any(
            why_not_plain(output.linear, o.dtype) is not None for output in attention.outputs
        )
        # Rows without an active head are forecast with what the MLP adds to them, not by GEMM-O.
        self.follows = (
            self.caches and attention.past is not None and config.mlp == "follow" and not self.keeps_o
        )
        self.kind, record = self._decide()
        self.record = record and self.caches
        self.state.done = self.kind if self.caches else "full"
        if self.record:
            self.state.done = self.kind if self.kind == "update" else "record"
            self.state.differences = self.state.history_of(engine)
            self.state.keeps_o = self.keeps_o

    def _decide(self) -> tuple[str, bool]:
        """(the kind of step here, whether its O enters the history)."""
        engine, state = self.engine, self.state
        if self.a.layer in engine.config.dense_layers:
            return "full", False
        plan = engine.plan
        if plan.kind != "dispatch":
            return plan.kind, plan.kind == "update" or plan.record
        ready = state.is_ready(engine) and state.keeps_o == self.keeps_o
        if ready and (not self.follows or state.is_followed("output")):
            return "dispatch", False
        # This context was not there at the Update (guidance that starts late), or its modules changed.
        engine.journal.later(partial(engine.stats.note, "dispatch without an update: dense"))
        return "full", engine.is_before_update()

    def run(self) -> list[Tensor]:
        """The outputs [B, rows, N], one a projection."""
        if not self.follows:
            return self._run()
        (output,) = self.a.outputs

        def compute(rows: SparseSymbols | None, out: Tensor | None) -> Tensor:
            return self._run(rows, out)[0]

        return [follow(self.engine, self.a.layer, "output", compute, start=output.start)]

    def _run(self, rows: SparseSymbols | None = None, into: Tensor | None = None) -> list[Tensor]:
        """The outputs; given `into` at a Dispatch, only the active `rows` of the one output, put there."""
        engine, state, a = self.engine, self.state, self.a
        if self.record:
            self._prepare_history()
        if a.past is not None:
            self.past = a.past(rows)
        if self.kind == "dispatch":
            outputs = self._dispatch(into)
        else:
            outputs = self._update() if self.kind == "update" else self._full()
        engine.journal.later(partial(_count, engine, a.layer, self.kind, state))
        return outputs

    def _full(self) -> list[Tensor]:
        self._attend(None)
        if self.record:
            self._record(keep=False)
        return [self._dense(output) for output in self.a.outputs]

    def _update(self) -> list[Tensor]:
        engine, state = self.engine, self.state
        q, k, _ = self._qkv()
        measures = Measures(engine.policy.needs, q, k, state.symbols)
        self._attend(None, measures)
        derivatives = self._record(keep=True) if self.caches else [self.a.o]
        with engine.ledger("select"):
            stats = measures.stats()
            if "o_change" in engine.policy.needs and len(derivatives) > 1:
                stats.o_change = tile_norms(derivatives[1], self.a.heads, state.symbols.block_q)
            self._select(stats)
        orders = 1 if state.reuse_all else len(derivatives)
        engine.journal.now(partial(state.note_updated, engine, orders))
        if state.keeps_o or not self.caches:
            state.cached = []
            return [self._dense(output) for output in self.a.outputs]
        with engine.ledger("gemm_o"):
            return [self._output_update(i, derivatives[1 : state.orders]) for i in range(len(self.a.outputs))]

    def _dispatch(self, into: Tensor | None) -> list[Tensor]:
        engine, state = self.engine, self.state
        coefficients = state.coefficients(engine, state.orders)
        if state.keeps_o:
            with engine.ledger("forecast"):
                forecast(state.history[: state.orders], coefficients, self.a.o)
        if not state.reuse_all:
            self._attend(state.symbols)
        if state.keeps_o or not self.caches:
            return [self._dense(output) for output in self.a.outputs]
        return [self._output_dispatch(i, coefficients, into) for i in range(len(self.a.outputs))]

    def _qkv(self) -> list[Tensor]:
        """Scratch for q, k and v, each [B, S, H, D]."""
        return [self.engine.buffers.take(name, self.shape, self.a.o) for name in "qkv"]

    def _attend(self, symbols, measures: Measures | None = None) -> None:
        """Projections, norm, RoPE and attention into o; `measures` looks at q and k on the way."""
        engine, a = self.engine, self.a
        keys = self.state.asleep.keys if symbols is not None and self.state.asleep is not None else None
        whole = self._qkv()
        for stream in a.streams:
            start, count = stream.start, stream.x.shape[1]
            (q, flat_q), (k, flat_k), (_, flat_v) = engine.buffers.rows("qkv", self.shape, a.o, start, count)
            tiles = self.state.rows if stream.across_heads and symbols is not None else symbols
            with engine.ledger("gemm_q"):
                apply_linear(stream.q, stream.x, flat_q, tiles, row_offset=start)
            with engine.ledger("gemm_kv"):
                apply_linear(stream.k, stream.x, flat_k, keys, row_offset=start)
                apply_linear(stream.v, stream.x, flat_v, keys, row_offset=start)
            with engine.ledger("norm_rope"):
                norms, options = (stream.norm_q, stream.norm_k), {"across_heads": stream.across_heads}
                if measures is not None:
                    measures.norm_and_rope(norms, start, count, a.rope, **options)
                else:
                    norm_and_rope_pair(norms, q, k, a.rope, symbols, row_offset=start, **options)
        with engine.ledger("attention"):
            if a.valid is None:
                ops.sparse_attention(*whole, symbols, out=self.o4)
            else:
                self._attend_to_valid(*whole, symbols)

    def _attend_to_valid(self, q: Tensor, k: Tensor, v: Tensor, symbols) -> None:
        """Attention where elements end before the sequence does; one by one, if not all at the same key."""
        ends = self.a.valid if len(set(self.a.valid)) > 1 else self.a.valid[:1]
        for i, valid in enumerate(ends):
            one = slice(i, i + 1) if len(ends) > 1 else slice(None)
            out = self.o4[one]
            if symbols is None:
                ops.sparse_attention(q[one], k[one, :valid], v[one, :valid], out=out)
                continue
            block, element = symbols.block_kv, symbols.element(i) if len(ends) > 1 else symbols
            starts = torch.arange(0, k.shape[1], block, dtype=torch.int32, device=k.device)
            lengths = (valid - starts).clamp(0, block)
            ops.sparse_attention(q[one], k[one], v[one], element, out=out, kv_block_len=lengths)

    def _select(self, stats: Stats) -> None:
        engine, state, a = self.engine, self.state, self.a
        tokens = a.o.shape[1]
        layout = Layout(
            batch=a.o.shape[0],
            heads=a.heads,
            head_dim=a.head_dim,
            tokens=tokens,
            segments=_segments(a.text, a.condition, tokens),
            block_q=state.symbols.block_q,
            block_kv=state.symbols.block_kv,
        )
        ramp = engine.scalars.row(engine, a.o.device)[-1:] if a.o.is_cuda else None
        step = Step(
            engine.index, engine.count, engine.plan.ramp, engine.context, a.layer, engine.layers, ramp
        )
        engine.policy.select(step, layout, stats, state.policy, Choice(state.symbols))
        if a.condition is not None:
            state.protect(a.condition)
        state.summarize(engine.config.max_order, spread=engine.config.cross_attention == "follow")

    def _prepare_history(self) -> None:
        """What of the history this step reads can come from the host while attention runs.

        Where O itself is forecast, every Dispatch reads the history, so that it stays on the device.
        """
        engine, state = self.engine, self.state
        on_host = engine.config.history == "host" and not state.keeps_o
        if state.history and state.history[0].on_host != on_host:
            state.drop_history()
        valid, _ = state.history_of(engine)
        for kept in state.history[:valid]:
            kept.prefetch()

    def _record(self, *, keep: bool) -> list[Tensor]:
        """Feeds O to the history; [O, ΔO, .. Δ^v O], v as far as the history goes (arXiv 2503.06923).

        The last difference is needed only while it is multiplied, so the layers share one buffer for it,
        unless O itself has to be forecast. Without `keep` it is not even computed, and nothing is returned.
        """
        engine, state = self.engine, self.state
        order = engine.config.max_order
        persistent = order + 1 if state.keeps_o else order
        valid, gap = state.history_of(engine)
        if persistent == 0:
            return [self.a.o]
        on_host = engine.config.history == "host" and not state.keeps_o
        while len(state.history) < persistent:
            state.history.append(self._keep(f"history {len(state.history)}", self.a.o, on_host))
        del state.history[persistent:]
        kept = state.history[: valid + 1]
        derivatives: list[Tensor] = []
        with engine.ledger("forecast"):
            if keep:
                last = None
                if len(kept) == valid:
                    last = engine.buffers.take("last_difference", tuple(self.a.o.shape), self.a.o)
                derivatives = differences(kept, self.a.o, gap=gap, valid=valid, last=last)
            else:
                update(kept, self.a.o, gap=gap, valid=len(kept) - 1)
        engine.journal.now(partial(state.note_recorded, engine, valid + 1))
        return derivatives

    def _keep(self, name: str, like: Tensor, on_host: bool = False) -> Kept:
        engine = self.engine
        return Kept(
            name,
            tuple(like.shape),
            like,
            engine.buffers,
            fp8=engine.config.cache_dtype == "float8_e4m3",
            traffic=engine.traffic if on_host else None,
        )

    def _output_update(self, i: int, derivatives: list[Tensor]) -> Tensor:
        state, a = self.state, self.a
        output = a.outputs[i]
        o = self._rows(a.o, output)
        while len(state.cached) <= i:
            state.cached.append([])
        cached = state.cached[i]
        while len(cached) <= len(derivatives):
            product = o[..., :1].expand(-1, -1, output.linear.out_features)
            cached.append(self._keep(f"product {len(cached)}", product))
        kept = cached[: len(derivatives) + 1]
        products = [one.space() for one in kept]
        out, _ = ops.gemm_o_update(
            o,
            output.linear.weight,
            output.linear.bias,
            state.symbols,
            head_dim=a.head_dim,
            row_offset=output.start,
            past=self._past(output),
            keep_rows=self.follows,
            derivatives=[self._rows(d, output) for d in derivatives],
            cached=products,
        )
        for one, product in zip(kept, products, strict=True):
            one.keep(product)
        return out

    def _output_dispatch(self, i: int, coefficients: Tensor, into: Tensor | None) -> Tensor:
        """Given `into`, rows without an active head are left as they are there.

        The kernel adds orders of the model's own dtype: what is kept in e4m3 is forecast before, on the rows
        that it adds to.
        """
        engine, state, output = self.engine, self.state, self.a.outputs[i]
        kept = state.cached[i][: state.orders]
        if kept[0].fp8:
            with engine.ledger("forecast"):
                rows = state.rows if into is not None else None
                where = {"row_offset": output.start, "rows": "active"}
                products = [forecast(kept, coefficients, kept[0].space(), rows, **where)]
            coefficients = unit(self.a.o.device)
        else:
            products = [one.read() for one in kept]
        weight, _ = weight_and_bias(output.linear)
        with engine.ledger("gemm_o"):
            return ops.gemm_o_dispatch(
                self._rows(self.a.o, output),
                weight,
                products,
                coefficients,
                state.symbols,
                head_dim=self.a.head_dim,
                row_offset=output.start,
                past=self._past(output),
                keep_rows=into is not None,
                out=into,
            )

    def _dense(self, output: Output) -> Tensor:
        o, past, linear = self._rows(self.a.o, output), self._past(output), output.linear
        with self.engine.ledger("gemm_o"):
            if why_not_plain(linear, o.dtype) is not None:
                return linear(o if past is None else torch.cat([o, past], dim=-1))
            if past is None:
                return linear_tiles(o, linear.weight, linear.bias)
            of_heads, of_past = linear.weight.split([self.a.width, past.shape[-1]], dim=1)
            out = linear_tiles(o, of_heads, linear.bias)
            add_product(past, of_past, out)
            return out

    def _past(self, output: Output) -> Tensor | None:
        return self._rows(self.past, output) if self.past is not None else None

    @staticmethod
    def _rows(tensor: Tensor, output: Output) -> Tensor:
        if output.rows == tensor.shape[1]:
            return tensor
        return tensor[:, output.start : output.start + output.rows]


def _count(engine, layer: int, kind: str, state: LayerState) -> None:
    """Statistics of one layer in the pass at hand."""
    if kind == "update":
        state.keep_density()
    engine.stats.record(engine.index, engine.context, layer, kind, state)


def _segments(text: Segment, condition: Segment | None, tokens: int) -> tuple[Segment, ...]:
    """The joint sequence in parts: text and condition where they are, image between; none is empty."""
    given = sorted((s for s in (text, condition) if s is not None and s.length), key=lambda s: s.start)
    parts, end = [], 0
    for segment in (*given, Segment("image", tokens, 0)):
        if segment.start > end:
            parts.append(Segment("image", end, segment.start - end))
        if segment.length:
            parts.append(segment)
        end = segment.start + segment.length
    return tuple(parts)
