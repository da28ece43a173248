"""The paper's policy: caching by what vision gives to and takes from text, skipping by row mass."""

from __future__ import annotations

from flashomni import ops
from flashomni.policies.base import Choice, Layout, Policy, Stats, Step


class FlashOmniPolicy(Policy):
    """FlashOmni (arXiv 2509.25401, section 3). The thresholds grow with the ramp f(t) of the schedule.

    With a self_similarity above 0, KV blocks whose tokens are no more alike than that are never skipped.
    """

    needs = frozenset({"q_mean", "k_mean"})
    capturable = True
    caches_by_text = True

    def __init__(self, tau_q: float, tau_kv: float, s_q: float = 0.0, self_similarity: float = 0.0):
        self.tau_q, self.tau_kv, self.s_q = tau_q, tau_kv, s_q
        self.self_similarity = self_similarity
        if self_similarity > 0:
            self.needs = self.needs | {"k_similarity"}

    def select(self, step: Step, layout: Layout, stats: Stats, state: dict, choice: Choice) -> None:
        ramp = step.ramp if step.ramp_on_device is None else 1.0
        ops.select_flashomni(
            stats.q_mean,
            stats.k_mean,
            choice.symbols,
            text_start=layout.text.start,
            text_length=layout.text.length,
            tau_q=self.tau_q * ramp,
            tau_kv=self.tau_kv * ramp,
            s_q=self.s_q,
            ramp=step.ramp_on_device,
            k_similarity=stats.k_similarity,
            self_similarity=self.self_similarity,
        )
