"""Caching by how little a row changes: for sequences without text, on which the paper has no criterion."""

from __future__ import annotations

from flashomni.policies.base import Choice, Layout, Policy, Stats, Step
from flashomni.policies.paper import FlashOmniPolicy
from flashomni.symbols import pack


class DriftPolicy(Policy):
    """Caches the row blocks whose attention output changes least; skips keys as the paper's policy does.

    The change of a row block is the sum of squares, over its tokens and all heads, of ΔO: the output's change
    a step since the step that was recorded before this Update. In each batch element the longest run of row
    blocks, from the least change on, is cached that holds at most tau_q (times the ramp) of the whole change.
    A row block is cached in all heads or in none, so that norms over all heads (Wan, LTX) let GEMM-Q skip it.
    Text is never cached. An Update without a recorded step before it caches nothing.
    """

    capturable = True

    def __init__(self, tau_q: float, tau_kv: float, s_q: float = 0.0, self_similarity: float = 0.0):
        self.tau_q, self.s_q = tau_q, s_q
        self.skip = FlashOmniPolicy(0.0, tau_kv, 0.0, self_similarity)
        self.needs = self.skip.needs | {"o_change"}

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        self.skip.select(step, layout, stats, state, choice)  # caches nothing
        if stats.o_change is None or self.tau_q == 0:
            return
        text = layout.text_blocks(layout.block_q)
        change = stats.o_change.square().sum(-1)
        change[:, text] = 0
        ordered, rows = change.sort(1)
        sums = ordered.cumsum(1)
        ramp = step.ramp if step.ramp_on_device is None else step.ramp_on_device
        beyond = sums > self.tau_q * ramp * sums[:, -1:]
        active = beyond.scatter(1, rows, beyond)
        active[:, text] = True
        if self.s_q > 0:
            active &= active.float().mean(1, keepdim=True) > self.s_q
        symbols = choice.symbols
        symbols.cache.copy_(pack(active.repeat_interleave(layout.heads, 1)))
