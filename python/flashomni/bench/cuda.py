"""How times are taken on a GPU: each arm a CUDA graph of many calls, arms in turn, medians."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch

WARM_UP_ROUNDS = 2
MOST_CALLS = 400  # in one graph


def interleave(
    arms: Mapping[str, Callable[[], object]], rounds: int = 7, slice_ms: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of a call of each arm.

    A turn replays the arm's graph, `slice_ms` long, twice and times the second: clocks and caches are those
    of this arm's own steady load, and an arm that heats the chip does not slow the next one's figure.
    """
    graphs = {name: _graph_of(arm, slice_ms) for name, arm in arms.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, (graph, calls) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARM_UP_ROUNDS:
                times[name].append(start.elapsed_time(end) / calls)
    return {name: median(values) for name, values in times.items()}


def _graph_of(arm: Callable[[], object], slice_ms: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """The arm, captured as often as `slice_ms` lasts, and how often that is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        arm()
        side.synchronize()
        start = perf_counter()
        arm()
        arm()
        side.synchronize()
    calls = max(1, min(MOST_CALLS, int(slice_ms / (perf_counter() - start) / 500)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(calls):
            arm()
    return graph, calls


def host_us(call: Callable[[], object], calls: int = 500, rounds: int = 7) -> float:
    """Microseconds that an eager call holds the host. The GPU must be done sooner than the host."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(calls):
            call()
        times.append((perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return median(times[1:]) * 1e6


def kernels_us(call: Callable[[], object], calls: int = 20) -> dict[str, float]:
    """Mean microseconds of each kernel that `call` launches, by its name without arguments."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.match(r"(?:void )?([\w:]|\(anonymous namespace\))+", event.name)[0]
            found[name.split("::")[-1]] += event.device_time / calls
    return dict(found)


def busy_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call in which the GPU is at work on anything."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)  # a range that a name was given to
    )
    busy, end = 0.0, float("-inf")
    for begun, ended in spans:
        busy += max(0.0, ended - max(begun, end))
        end = max(end, ended)
    return busy / 1e3
