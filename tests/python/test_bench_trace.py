"""Gaps of a GPU's timeline, from made-up events."""

import pytest

from flashomni.bench import trace


def event(ts: float, dur: float, launch: int) -> dict:
    return {"ts": ts, "dur": dur, "args": {"correlation": launch}}


def test_gaps_inside_a_graph_and_between_launches_are_told_apart():
    found = trace.gaps(
        [
            event(100, 10, 1),
            event(112, 8, 1),  # 2 inside graph 1
            event(150, 5, 2),  # 30 between
            event(154, 6, 2),  # overlaps the one before
            event(161, 1, 2),  # 1 inside graph 2
        ]
    )
    assert found["kernels"] == 5 and found["launches"] == 2
    assert found["busy_ms"] == pytest.approx(29e-3)
    assert found["inside_ms"] == pytest.approx(3e-3) and found["inside_longest_us"] == pytest.approx(2)
    assert found["between_ms"] == pytest.approx(30e-3) and found["between_longest_us"] == pytest.approx(30)


def test_events_come_in_any_order_and_one_may_hold_others():
    found = trace.gaps([event(5, 1, 2), event(20, 1, 1), event(0, 10, 1)])
    assert found["busy_ms"] == pytest.approx(11e-3)
    # The last one to end before the gap was of the same launch as the one after it.
    assert found["inside_ms"] == pytest.approx(10e-3) and found["between_ms"] == 0


def test_nothing_recorded_is_all_zero():
    assert not any(trace.gaps([]).values())
