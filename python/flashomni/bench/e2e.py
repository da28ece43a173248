"""tiny_flux end to end: seconds a picture, and milliseconds a step by its kind, arms taking turns."""

from __future__ import annotations

from statistics import median

import torch

from flashomni import demo, schedule, tiny_flux
from flashomni.bench import harness
from flashomni.config import Config


def run(*, steps: int, config: Config, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Rows of suite "e2e": whole pictures, and the steps of each kind beside a dense torch step."""
    pipe = tiny_flux.load(dtype=dtype)
    arms = {"torch": None, "dense": demo.dense_config(config), "flashomni": config}
    for arm in arms.values():
        demo.draw(pipe, demo.PROMPTS[0], 0, 1, arm)
    drawings: dict[str, list[demo.Drawing]] = {name: [] for name in arms}
    for i in range(rounds):
        for name, arm in arms.items():
            drawings[name].append(demo.draw(pipe, demo.PROMPTS[i % len(demo.PROMPTS)], i, steps, arm))
    kinds = [plan.kind for plan in schedule.plan(steps, config)]
    dense_picture = median(d.seconds for d in drawings["torch"]) * 1e3
    dense_step = median(s for d in drawings["torch"] for s in d.step_seconds) * 1e3
    rows = []
    for name in ("dense", "flashomni"):
        case = {
            "model": "tiny_flux",
            "steps": steps,
            "arm": name,
            "density": drawings[name][0].density,
            "dtype": str(dtype).removeprefix("torch."),
        }
        picture = median(d.seconds for d in drawings[name]) * 1e3
        whole = {**case, "what": "picture"}
        rows.append(harness.row("e2e", whole, picture, None, ("torch", dense_picture, None)))
        for kind in dict.fromkeys(kinds):
            times = [d.step_seconds[i] for d in drawings[name] for i in range(steps) if kinds[i] == kind]
            step = {**case, "what": f"{kind} step"}
            rows.append(harness.row("e2e", step, median(times) * 1e3, None, ("torch", dense_step, None)))
    return rows
