"""What follows an attention by rows: a row block that is cached in all heads is forecast there too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flashomni.engine.kept import Kept, forecast, update
from flashomni.symbols import SparseSymbols

Compute = Callable[[SparseSymbols | None, Tensor | None], Tensor]


@dataclass(slots=True)
class Followed:
    """What one module gave and how that changed: D + 1 differences of its output, [B, rows, N] each."""

    kept: list[Kept] = field(default_factory=list)
    orders: int = 0
    recorded_step: int = -1

    def note_recorded(self, engine, orders: int) -> None:
        self.orders, self.recorded_step = orders, engine.index


def follow(engine, layer: int, name: str, compute: Compute, *, start: int) -> Tensor:
    """What follows the attention `layer` of the pass at hand by the name `name`: a feed-forward or
    cross-attention after it; "output": its own projection together with the MLP beside it.

    compute(rows, out) does it on the active rows (None: all) into `out` (None: a new tensor), returned; its
    rows begin at row `start` of the joint sequence. An Update keeps all of the result; a Dispatch forecasts
    the cached rows and computes the active ones anew.
    """
    state = engine.contexts.get(engine.context, layer)
    followed = state.followed.setdefault(name, Followed())
    if state.done == "dispatch" and state.is_followed(name):
        kept = followed.kept[: followed.orders]
        out = torch.empty(kept[0].shape, dtype=kept[0].like.dtype, device=kept[0].like.device)
        with engine.ledger("forecast"):
            coefficients = state.coefficients(engine, followed.orders)
            forecast(kept, coefficients, out, state.rows, row_offset=start, rows="cached")
        return compute(state.rows, out)
    out = compute(None, None)
    if state.done in ("update", "record"):
        _record(engine, state, followed, name, out)
    return out


def _record(engine, state, followed: Followed, name: str, out: Tensor) -> None:
    """The same steps enter this history as enter that of the attention's output."""
    valid, gap = state.differences
    if not followed.kept or followed.recorded_step != engine.index - gap:
        valid = 0
    fp8 = engine.config.cache_dtype == "float8_e4m3"
    while len(followed.kept) <= engine.config.max_order:
        scratch = f"{name} {len(followed.kept)}"
        followed.kept.append(Kept(scratch, tuple(out.shape), out, engine.buffers, fp8=fp8))
    with engine.ledger("forecast"):
        update(followed.kept[: valid + 1], out, gap=gap, valid=valid)
    orders = 1 if state.reuse_all else valid + 1
    engine.journal.now(partial(followed.note_recorded, engine, orders))
