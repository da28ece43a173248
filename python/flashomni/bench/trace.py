"""What a GPU's timeline shows: how long it works, and how long not, inside CUDA graphs and between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a chrome trace
COLUMNS = ("at work", "idle in launches", "longest, µs", "idle between", "longest, µs", "kernels", "launches")


def record(call: Callable[[], object]) -> dict[str, float]:
    """gaps() of one call, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return gaps(event for event in events if event.get("cat") in DEVICE_WORK)


def gaps(events: Iterable[Mapping]) -> dict[str, float]:
    """Of a chrome trace's device events (ts and dur in microseconds; what one launch of a graph started has
    one args.correlation).

    kernels; launches: calls of the host, a graph's being one; busy_ms; inside_ms and inside_longest_us: no
    kernel at work between two of one launch; between_ms and between_longest_us: the same between launches,
    where the GPU may wait for the host.
    """
    found = dict.fromkeys(("kernels", "launches"), 0) | dict.fromkeys(
        ("busy_ms", "inside_ms", "inside_longest_us", "between_ms", "between_longest_us"), 0.0
    )
    end, launch, launches = None, None, set()
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        own = event["args"].get("correlation")
        launches.add(own)
        found["kernels"] += 1
        if end is not None and start > end:
            where = "inside" if own == launch else "between"
            found[f"{where}_ms"] += (start - end) / 1e3
            found[f"{where}_longest_us"] = max(found[f"{where}_longest_us"], start - end)
        found["busy_ms"] += max(0.0, stop - max(start, end if end is not None else start)) / 1e3
        if end is None or stop >= end:
            end, launch = stop, own
    found["launches"] = len(launches)
    return found


def cells(found: Mapping[str, float]) -> list[str]:
    """gaps() under COLUMNS; times in milliseconds but where they say otherwise."""
    return [
        f"{found['busy_ms']:.1f}",
        f"{found['inside_ms']:.1f}",
        f"{found['inside_longest_us']:.0f}",
        f"{found['between_ms']:.1f}",
        f"{found['between_longest_us']:.0f}",
        f"{found['kernels']:.0f}",
        f"{found['launches']:.0f}",
    ]
