"""Which steps are Full, Update or Dispatch. Asks the library's plan_step, the one implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flashomni._native import library

if TYPE_CHECKING:
    import torch

    from flashomni.config import Config

_KINDS = ("full", "update", "dispatch")


class StepPlan(NamedTuple):
    """What one denoising step does.

    kind: "full" (dense, caches untouched), "update" (dense, symbols and caches renewed), "dispatch" (sparse).
    record: whether the step's features enter the forecast history.
    since_update: k, steps since the last Update; 0 unless Dispatch.
    gap: steps since the previous recorded step; 0 if there is none.
    ramp: f(t), which scales tau_q and tau_kv.
    """

    kind: str
    record: bool
    since_update: int
    gap: int
    ramp: float


def plan(num_steps: int, config: Config) -> list[StepPlan]:
    """The plan of each of `num_steps` denoising steps. ValueError where the numbers make no schedule."""
    steps = library.plan_steps(
        num_steps,
        config.cache_interval,
        config.disable_cache_before_step,
        config.cooldown_steps,
        config.max_order,
        config.ramp_power,
    )
    return [
        StepPlan(_KINDS[kind], bool(record), int(since_update), int(gap), float(ramp))
        for kind, record, since_update, gap, ramp in steps
    ]


def coefficients(order: int, k: float) -> torch.Tensor:
    """k^i / i! for i = 0..order, as float32 [order + 1] on the CPU (TaylorSeer, arXiv 2503.06923, eq. 6)."""
    import torch

    out = torch.empty(max(int(order), 0) + 1, dtype=torch.float32)
    library.taylor_coefficients(order, k, out)
    return out
