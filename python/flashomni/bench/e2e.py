"""tiny_flux end to end: a picture, and milliseconds a step by its kind, arms taking turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import nn

import flashomni
from flashomni import demo, schedule, tiny_flux
from flashomni.bench import dense, harness, trace
from flashomni.config import Config

GPU_WARM_UP = (
    3  # pictures: graphs are captured at the second step of a kind, in the second picture at the latest
)


@dataclass
class Drawing:
    """One picture: seconds in all, and of each step."""

    seconds: float
    step_seconds: list[float]
    density: float = 1.0


@dataclass
class Arm:
    """A way to draw, on a pipeline of its own, so that nothing has to be set up anew between turns."""

    pipe: object
    config: Config | None = None
    gaps: dict[str, float] | None = None  # of a picture's timeline, on a GPU
    drawings: list[Drawing] = field(default_factory=list)

    def draw_without_stops(self, index: int, steps: int) -> None:
        tiny_flux.generate(self.pipe, [demo.PROMPTS[index % len(demo.PROMPTS)]], [index], steps=steps)

    def draw(self, index: int, steps: int) -> Drawing:
        device = self.pipe.transformer.device
        prompt, ends = demo.PROMPTS[index % len(demo.PROMPTS)], []

        def after(*_) -> None:
            dense.synchronize(device)
            ends.append(perf_counter())

        dense.synchronize(device)
        start = perf_counter()
        tiny_flux.generate(self.pipe, [prompt], [index], steps=steps, callback=after)
        dense.synchronize(device)
        seconds = perf_counter() - start
        density = flashomni.stats(self.pipe).density if self.config is not None else 1.0
        return Drawing(seconds, [b - a for a, b in zip([start, *ends], ends, strict=False)], density)


def run(
    *,
    steps: int,
    config: Config,
    dtype: torch.dtype,
    rounds: int,
    device: str = "cpu",
    backend: str | None = None,
) -> list[dict]:
    """Rows of suite "e2e": whole pictures, and the steps of each kind beside a dense torch step.

    On a GPU the dense arms are diffusers' eager code, its blocks compiled, and the whole model compiled with
    CUDA graphs; ours run as they are, with compiled blocks, and both as CUDA graphs. The baseline is the
    fastest of the dense ones. backend: of torch.compile; with one, blocks are compiled on a CPU too.
    trace: when the GPU is at work (trace.gaps), of a picture drawn without a stop after each step.
    """
    on_gpu = torch.device(device).type == "cuda"
    try:
        return _run(steps, config, dtype, rounds, device, _arms(config, on_gpu, backend))
    finally:
        torch._dynamo.reset()


def _run(
    steps: int, config: Config, dtype: torch.dtype, rounds: int, device: str, makers: dict[str, Callable]
) -> list[dict]:
    on_gpu = torch.device(device).type == "cuda"
    arms = {name: make(dtype, device) for name, make in makers.items()}
    missing = {}
    for name, arm in list(arms.items()):
        try:
            for _ in range(GPU_WARM_UP if on_gpu else 1):
                arm.draw(0, steps if on_gpu else 1)
        except Exception as error:  # a compiler's failure is no reason to lose the other arms
            if "compiled" not in name:
                raise
            missing[name] = harness.short(error)
            del arms[name]
    for i in range(rounds):
        for arm in arms.values():
            arm.drawings.append(arm.draw(i, steps))
    if on_gpu:
        for arm in arms.values():
            arm.gaps = trace.record(lambda a=arm: a.draw_without_stops(0, steps))
    rows = _rows(arms, steps, config, dtype, device)
    rows[0]["not_measured"] = missing
    return rows


def _arms(config: Config, on_gpu: bool, backend: str | None) -> dict[str, Callable[..., Arm]]:
    """By name, what makes the arm."""

    def torch_arm(prepare: Callable = lambda transformer: None) -> Callable[..., Arm]:
        def make(dtype: torch.dtype, device: str) -> Arm:
            pipe = tiny_flux.load(dtype=dtype, device=device)
            prepare(pipe.transformer)
            return Arm(pipe)

        return make

    def ours(chosen: Config, prepare: Callable = lambda transformer: None) -> Callable[..., Arm]:
        def make(dtype: torch.dtype, device: str) -> Arm:
            pipe = tiny_flux.load(dtype=dtype, device=device)
            flashomni.enable(pipe, chosen)
            prepare(pipe.transformer)
            return Arm(pipe, chosen)

        return make

    def blocks(transformer: nn.Module) -> None:
        dense.compile_blocks(transformer, backend or "inductor")

    arms = {"torch": torch_arm(), "dense": ours(demo.dense_config(config)), "flashomni": ours(config)}
    if on_gpu or backend is not None:
        arms |= {"torch compiled": torch_arm(blocks), "flashomni compiled": ours(config, blocks)}
    if on_gpu:
        graphs = Config(**{**vars(config), "cuda_graphs": True})
        arms |= {
            "torch compiled graphs": torch_arm(lambda t: t.compile(mode="reduce-overhead")),
            "flashomni graphs": ours(graphs),
            "flashomni compiled graphs": ours(graphs, blocks),
        }
    return arms


def _rows(arms: dict[str, Arm], steps: int, config: Config, dtype: torch.dtype, device: str) -> list[dict]:
    kinds = [plan.kind for plan in schedule.plan(steps, config)]
    pictures = {name: median(d.seconds for d in arm.drawings) * 1e3 for name, arm in arms.items()}
    best = min((name for name in arms if name.startswith("torch")), key=pictures.__getitem__)
    best_step = median(s for d in arms[best].drawings for s in d.step_seconds) * 1e3
    rows = []
    for name, arm in arms.items():
        case = {
            "model": "tiny_flux",
            "steps": steps,
            "arm": name,
            "density": arm.drawings[0].density,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
        }
        whole = {**case, "what": "picture"}
        rows.append(harness.row("e2e", whole, pictures[name], None, (best, pictures[best], None)))
        if arm.gaps is not None:
            rows[-1]["trace"] = arm.gaps
        if arm.config is None:
            continue
        for kind in dict.fromkeys(kinds):
            times = [d.step_seconds[i] for d in arm.drawings for i in range(steps) if kinds[i] == kind]
            step = {**case, "what": f"{kind} step"}
            rows.append(harness.row("e2e", step, median(times) * 1e3, None, (best, best_step, None)))
    return rows


def tables(rows: list[dict]) -> list:
    """What the rows say, as rich tables; on a GPU also a picture's timeline."""
    from rich import box
    from rich.table import Table

    found = [harness.rows_table(rows)]
    traced = [row for row in rows if "trace" in row]
    if traced:
        timeline = Table("the GPU in a picture, ms", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in trace.COLUMNS:
            timeline.add_column(name, justify="right")
        for row in traced:
            timeline.add_row(row["case"]["arm"], *trace.cells(row["trace"]))
        found.append(timeline)
    return found
