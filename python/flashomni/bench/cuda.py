"""How times are taken on a GPU: each arm a CUDA graph of many calls, arms in turns, medians."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from random import Random
from statistics import median
from time import perf_counter

import torch

WARM_UP_ROUNDS = 2
MOST_CALLS = 400  # in one graph


def interleave(
    arms: Mapping[str, Callable[[], object]], rounds: int = 7, slice_ms: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of a call of each arm.

    A turn replays the arm's graph, `slice_ms` long, twice and times the second, so that caches are those of
    this arm's own load. Clocks follow the power of the last second or so: every round has another order, or
    an arm that comes after a hot one would always read slower than one that comes after a cool one.
    """
    order, shuffled = list(arms), Random(0)
    graphs = {name: _graph_of(arm, slice_ms) for name, arm in arms.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(WARM_UP_ROUNDS + rounds):
        shuffled.shuffle(order)
        for name in order:
            graph, calls = graphs[name]
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


def host_us(call: Callable[[], object], calls: int = 100, rounds: int = 15) -> float:
    """Microseconds that an eager call holds the host: of so few calls that all wait in the GPU's queue."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(calls):
            call()
        times.append((perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return median(times[1:]) * 1e6


def kernels_us(arms: Mapping[str, Callable[[], object]], calls: int = 10) -> dict[str, dict[str, float]]:
    """Mean microseconds of each kernel that an arm launches, by the kernel's name without arguments."""
    from torch.profiler import ProfilerActivity, profile

    for call in arms.values():
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in arms.values():
            torch.cuda._sleep(1000)  # a kernel of torch's own parts the arms
            for _ in range(calls):
                call()
        torch.cuda.synchronize()
    kernels = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    found: list[dict[str, float]] = []
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        name = re.match(r"(?:void )?([\w:]|\(anonymous namespace\))+", event.name)[0].split("::")[-1]
        if name.startswith("spin_kernel"):
            found.append(defaultdict(float))
        elif found:
            found[-1][name] += event.device_time / calls
    if len(found) != len(arms):
        raise RuntimeError(f"profiler: expected kernels of {len(arms)} arms, got {len(found)}")
    return {name: dict(times) for name, times in zip(arms, found, strict=True)}


def plan_us(kernels: Mapping[str, float]) -> float:
    """Of an arm's kernels, what planning takes."""
    return sum(us for name, us in kernels.items() if "plan" in name)
