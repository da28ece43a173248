"""The policy `drift` against its rule, written out in loops."""

from __future__ import annotations

import pytest
import torch

from flashomni.engine.measure import tile_norms
from flashomni.policies import Choice, DriftPolicy, Layout, Segment, Stats, Step
from flashomni.symbols import SparseSymbols

BATCH, HEADS, TOKENS, BLOCK = 2, 3, 64 * 9 - 20, 64


def rule(change: torch.Tensor, share: float, text: range, s_q: float) -> torch.Tensor:
    """Active row blocks of [B, blocks, H], as the docstring of DriftPolicy says."""
    batch, blocks, _ = change.shape
    active = torch.ones(batch, blocks, dtype=torch.bool)
    for b in range(batch):
        rows = [i for i in range(blocks) if i not in text]
        of_row = {i: float((change[b, i].double() ** 2).sum()) for i in rows}
        held, whole = 0.0, sum(of_row.values())
        for i in sorted(rows, key=of_row.get):
            held += of_row[i]
            active[b, i] = held > share * whole
        if s_q > 0 and float(active[b].float().mean()) <= s_q:
            active[b] = False
    return active


@pytest.mark.parametrize("text", [range(0), range(1), range(7, 9)], ids=str)
@pytest.mark.parametrize(
    "tau_q, ramp, s_q", [(0.3, 1.0, 0.0), (0.8, 0.5, 0.0), (0.9, 1.0, 0.5), (0.0, 1.0, 0.9)]
)
def test_the_rule(text: range, tau_q: float, ramp: float, s_q: float) -> None:
    generator = torch.Generator().manual_seed(len(text))
    change = torch.rand(BATCH, 9, HEADS, generator=generator) ** 3
    q, k = (torch.randn(BATCH, 9, HEADS, 64, generator=generator) for _ in range(2))
    symbols = SparseSymbols.ones(BATCH, HEADS, TOKENS, TOKENS, BLOCK, BLOCK, "cpu")
    segments = (Segment("text", text.start * BLOCK, TOKENS - text.start * BLOCK if text.start else BLOCK),)
    layout = Layout(BATCH, HEADS, 64, TOKENS, segments if len(text) else (), BLOCK, BLOCK)
    step = Step(5, 10, ramp, 0, 0, 1)
    stats = Stats(q, k, o_change=change.clone())
    DriftPolicy(tau_q, 0.4, s_q).select(step, layout, stats, {}, Choice(symbols))
    cache, skip = symbols.masks()
    want = rule(change, tau_q * ramp, text, s_q) if tau_q > 0 else torch.ones(BATCH, 9, dtype=torch.bool)
    assert torch.equal(cache, want.unsqueeze(1).expand(-1, HEADS, -1))
    assert not bool(skip.all()) and bool(skip[:, :, :, list(text)].all())


def test_without_a_difference_nothing_is_cached() -> None:
    q = torch.randn(BATCH, 9, HEADS, 64)
    symbols = SparseSymbols.ones(BATCH, HEADS, TOKENS, TOKENS, BLOCK, BLOCK, "cpu")
    layout = Layout(BATCH, HEADS, 64, TOKENS, (), BLOCK, BLOCK)
    DriftPolicy(1.0, 0.0).select(Step(5, 10, 1.0, 0, 0, 1), layout, Stats(q, q), {}, Choice(symbols))
    assert bool(symbols.masks()[0].all())


def test_norms_of_tiles() -> None:
    x = torch.randn(BATCH, TOKENS, HEADS * 16)
    got = tile_norms(x, HEADS, BLOCK)
    assert got.dtype == torch.float32 and got.shape == (BATCH, 9, HEADS)
    for i in range(9):
        for head in range(HEADS):
            tile = x[:, i * BLOCK : (i + 1) * BLOCK, head * 16 : (head + 1) * 16]
            want = tile.double().flatten(1).norm(dim=1)
            torch.testing.assert_close(got[:, i, head].double(), want, rtol=1e-6, atol=0)
