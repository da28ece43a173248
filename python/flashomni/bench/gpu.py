"""Times on a GPU: every arm is a CUDA graph, arms take turns on a warm chip, events time the replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch

WARM_UP = 3
SHORTEST = (
    1.0  # milliseconds that one replay should last at least: shorter arms are repeated within their graph
)


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm, as harness.interleave gives them for the CPU."""
    graphs, repeats = {}, {}
    for name, arm in arms.items():
        once = _milliseconds(_capture(arm, 10)) / 10
        repeats[name] = max(1, min(200, round(SHORTEST / max(once, 1e-4))))
        graphs[name] = _capture(arm, repeats[name])
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(WARM_UP + rounds):
        for name, graph in graphs.items():
            found = _milliseconds(graph) / repeats[name]
            if i >= WARM_UP:
                times[name].append(found)
    return {name: median(values) for name, values in times.items()}


def _capture(arm: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    """The arm `repeats` times in a row, warmed up before."""
    for _ in range(WARM_UP):
        arm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            arm()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
