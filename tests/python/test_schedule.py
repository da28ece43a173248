"""The step schedule, through the binding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashomni import Config
from flashomni.schedule import coefficients, plan


def test_the_papers_schedule() -> None:
    steps = plan(50, Config(cache_interval=5, disable_cache_before_step=8, cooldown_steps=1, max_order=1))
    kinds = [step.kind for step in steps]
    assert kinds[:8] == ["full"] * 8 and kinds[-1] == "full"
    assert [i for i, kind in enumerate(kinds) if kind == "update"] == [8, 13, 18, 23, 28, 33, 38, 43]
    assert kinds[9:13] == ["dispatch"] * 4
    assert [step.since_update for step in steps[8:14]] == [0, 1, 2, 3, 4, 0]
    assert steps[7].record and not steps[6].record
    assert (steps[8].gap, steps[13].gap) == (1, 5)
    assert steps[25].ramp == pytest.approx(0.25)


@given(
    steps=st.integers(1, 60),
    interval=st.integers(1, 8),
    warmup=st.integers(0, 12),
    cooldown=st.integers(0, 5),
    order=st.integers(0, 3),
    power=st.sampled_from([0.0, 1.0, 1.7, 2.0]),
)
def test_every_schedule_is_sound(steps, interval, warmup, cooldown, order, power) -> None:
    config = Config(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        cooldown_steps=cooldown,
        max_order=order,
        ramp_power=power,
    )
    planned = plan(steps, config)
    assert len(planned) == steps
    last_update = last_record = None
    for i, step in enumerate(planned):
        if i < warmup or i >= steps - cooldown:
            assert step.kind == "full"
        if step.kind == "update":
            last_update = i
            assert step.record
            assert planned[i + 1].kind == "dispatch", "an Update that nobody uses"
        if step.kind == "dispatch":
            assert last_update is not None and step.since_update == i - last_update < interval
            assert not step.record
        else:
            assert step.since_update == 0
        if step.record:
            assert step.gap == (0 if last_record is None else i - last_record)
            last_record = i
        assert step.ramp == pytest.approx((i / steps) ** power if power else 1.0, abs=1e-6)


@given(order=st.integers(0, 3), k=st.floats(-8, 8, width=32))
def test_coefficients_are_taylors(order: int, k: float) -> None:
    values = coefficients(order, k)
    assert values.dtype == torch.float32 and values.shape == (order + 1,)
    assert values.tolist() == pytest.approx(
        [k**i / math.factorial(i) for i in range(order + 1)], rel=1e-5, abs=1e-30
    )


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="order: expected 0 to 3, got 4"):
        coefficients(4, 1.0)
    with pytest.raises(ValueError, match="order: expected 0 to 3, got -1"):
        coefficients(-1, 1.0)
    with pytest.raises(ValueError, match="num_inference_steps"):
        plan(-1, Config())
