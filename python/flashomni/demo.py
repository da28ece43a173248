"""The demo: each picture three times from the same noise: dense with torch, dense with our kernels,
sparse.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import flashomni
from flashomni import doctor, schedule, tiny_flux
from flashomni.config import PRESETS, Config
from flashomni.report import data, metrics
from flashomni.report.clock import ModelClock

PROMPTS = ("a red star above a blue circle", "a green three left of a purple ring on a striped background")
STEPS, QUICK_STEPS = 40, 4
TIME_LIMIT = 215.0  # seconds for the demo without a prompt of the user's
# The centre of the sweep in docs/quality.md. Early steps settle what the picture shows, so a quarter stays
# dense.
SETTINGS: dict[str, Any] = {
    "cache_interval": 5,
    "max_order": 2,
    "tau_q": 0.8,
    "tau_kv": 0.1,
    "ramp_power": 0.0,
    "disable_cache_before_step": 10,
}
QUICK_SETTINGS: dict[str, Any] = {"cache_interval": 3, "disable_cache_before_step": 0, "ramp_power": 0.0}
MASKS_SHOWN = 8

ARMS = {
    "torch": ("Dense, torch SDPA", "what diffusers does today"),
    "dense": ("Dense, our kernels", "every bit set"),
    "flashomni": ("FlashOmni", ""),
}


def parse_config(changes: Iterable[str], base: dict[str, Any]) -> Config:
    """A Config from `base` and "field=value" strings ("preset=name" starts from a preset instead).

    Raises ValueError or TypeError that names the field.
    """
    fields = {field.name for field in dataclasses.fields(Config)}
    settings = dict(base)
    for item in changes:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f"config: expected field=value, got {item!r}")
        if name == "preset":
            if value not in PRESETS:
                raise ValueError(f"preset: expected one of {', '.join(sorted(PRESETS))}, got {value!r}")
            settings = dict(PRESETS[value])
            continue
        if name not in fields:
            raise ValueError(f"config: no field {name!r}; fields: {', '.join(sorted(fields))}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return Config(**settings)


def default_dtype() -> torch.dtype:
    """bfloat16 where the chip multiplies it natively, else float32."""
    return torch.bfloat16 if doctor.native()["isa"] == "avx512bf16" else torch.float32


def dense_config(config: Config) -> Config:
    """The same schedule with every bit set and no history kept: this library's dense arm."""
    return dataclasses.replace(config, policy="dense", max_order=0, s_q=0.0)


def layer_names(transformer: torch.nn.Module) -> list[str]:
    """Names of the attention layers in the engine's order."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    return [f"double {i}" for i in range(double)] + [f"single {i}" for i in range(single)]


@dataclasses.dataclass
class Drawing:
    """One picture and what drawing it took."""

    image: Any
    seconds: float
    step_seconds: list[float]
    time: dict[str, float]
    density: float = 1.0
    # At every Update: {layer: (cache bool [H, q_blocks], skip bool [H, q_blocks, kv_blocks])}
    masks: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = dataclasses.field(default_factory=dict)


def draw(
    pipe,
    prompt: str,
    seed: int,
    steps: int,
    config: Config | None = None,
    on_step: Callable[[], None] = lambda: None,
    keep_masks: bool = False,
) -> Drawing:
    """Draws one picture: with `config` through the engine, without as diffusers does."""
    engine = flashomni.enable(pipe, config) if config is not None else None
    try:
        plans = schedule.plan(steps, config) if config is not None else []
        ends: list[float] = []
        masks: dict[int, dict] = {}

        def after(pipe, step, timestep, tensors):
            ends.append(perf_counter())
            if keep_masks and plans[step].kind == "update":
                symbols = flashomni.stats(pipe).symbols
                masks[step] = {
                    layer: tuple(m[0].clone() for m in s.masks()) for (_, layer), s in symbols.items()
                }
            on_step()

        with ModelClock(pipe.transformer, engine) as clock:
            start = perf_counter()
            (image,) = tiny_flux.generate(pipe, [prompt], [seed], steps=steps, callback=after)
            seconds = perf_counter() - start
        density = flashomni.stats(pipe).density if engine is not None else 1.0
    finally:
        if engine is not None:
            flashomni.disable(pipe)
    step_seconds = [b - a for a, b in zip([start, *ends], ends, strict=False)]
    return Drawing(image, seconds, step_seconds, clock.breakdown(seconds), density, masks)


def density_by_step(plans: Sequence, masks: dict[int, dict], layers: int, heads: int) -> dict[str, list]:
    """Shares [step][layer][head] of block pairs and of tiles computed; dense steps and layers count 1."""
    pairs, tiles = [], []
    for step, plan in enumerate(plans):
        chosen = masks.get(step - plan.since_update, {}) if plan.kind == "dispatch" else {}
        step_pairs, step_tiles = (
            [[1.0] * heads for _ in range(layers)],
            [[1.0] * heads for _ in range(layers)],
        )
        for layer, (cache, skip) in chosen.items():
            step_pairs[layer] = (cache.unsqueeze(-1) & skip).float().mean((1, 2)).tolist()
            step_tiles[layer] = cache.float().mean(1).tolist()
        pairs.append(step_pairs)
        tiles.append(step_tiles)
    return {"pairs": pairs, "tiles": tiles}


def sample_masks(masks: dict[int, dict], names: list[str], shown: int = MASKS_SHOWN) -> list[dict]:
    """A few masks spread over steps, layers and heads: the first, middle and last Update, every layer in
    turn.
    """
    if not masks:
        return []
    steps = sorted(masks)
    picked = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    found = []
    for i in range(shown):
        step = picked[i * len(picked) // shown]
        layers = sorted(masks[step])
        if not layers:
            continue
        layer = layers[i * len(layers) // shown if len(layers) > shown else i % len(layers)]
        cache, skip = masks[step][layer]
        head = i % cache.shape[0]
        rows, columns = skip.shape[1:]
        selected = cache[head, :, None] & skip[head]
        found.append(
            {
                "step": step,
                "layer": names[layer],
                "head": head,
                "rows": rows,
                "columns": columns,
                "bits": data.pack_mask(selected.numpy()),
                "active": data.pack_mask(cache[head].numpy()),
            }
        )
    return found


def run(
    prompts: Sequence[str],
    seed: int,
    steps: int,
    out: Path,
    config: Config,
    dtype: torch.dtype,
    command: str,
    progress: Callable[[str, int], None] = lambda what, steps: None,
    time_limit: float = math.inf,
) -> data.Run:
    """Draws every prompt in every arm, arms taking turns; writes the PNGs and run.json into `out`.

    progress(what, steps) is told before a picture (steps 0) and after each of its steps (steps 1).
    time_limit: seconds; a prompt after the first is left out if it would probably end later.
    """
    begun = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    pipe = tiny_flux.load(dtype=dtype)
    names, heads = layer_names(pipe.transformer), pipe.transformer.config.num_attention_heads
    plans = schedule.plan(steps, config)
    arms = {"torch": None, "dense": dense_config(config), "flashomni": config}
    for (
        arm
    ) in arms.values():  # first calls build plans and fill caches; one step of each stays out of the timing
        progress("warming up", 0)
        draw(pipe, prompts[0], seed, 1, arm)
    pictures, times, first_masks = [], {key: [] for key in arms}, {}
    for index, prompt in enumerate(prompts):
        if index and (perf_counter() - begun) * (index + 1) / index > time_limit:
            break
        results: dict[str, dict] = {}
        reference = None
        for key, arm in arms.items():
            progress(f"{ARMS[key][0]}: {prompt}", 0)
            drawing = draw(
                pipe,
                prompt,
                seed + index,
                steps,
                arm,
                lambda: progress("", 1),
                key == "flashomni" and index == 0,
            )
            file = f"{index + 1}-{key}.png"
            drawing.image.save(out / file)
            results[key] = {
                "file": file,
                "seconds": drawing.seconds,
                "step_seconds": drawing.step_seconds,
                "shows_prompt": bool(tiny_flux.score(drawing.image, prompt).ok),
                "density": drawing.density,
            }
            times[key].append(drawing.time)
            if reference is None:
                reference = drawing.image
            else:
                results[key]["psnr"] = metrics.psnr(drawing.image, reference)
                results[key]["ssim"] = metrics.ssim(drawing.image, reference)
            first_masks = first_masks or drawing.masks
        pictures.append({"prompt": prompt, "seed": seed + index, "arms": results})
    tokens, text = (tiny_flux.pipeline.SIDE // 4) ** 2, tiny_flux.vocabulary.MAX_WORDS
    note = f"N={config.cache_interval}, D={config.max_order}, τq={config.tau_q:g}, τkv={config.tau_kv:g}"
    content = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": doctor.machine(),
        "model": {
            "name": "tiny_flux",
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
            "tokens": tokens + text,
            "text_tokens": text,
            "layers": names,
            "heads": heads,
        },
        "config": dataclasses.asdict(config),
        "steps": steps,
        "schedule": [plan._asdict() for plan in plans],
        "arms": [
            {"key": key, "title": ARMS[key][0], "note": ARMS[key][1] or note, "time": mean_of(times[key])}
            for key in arms
        ],
        "pictures": pictures,
        "density": density_by_step(plans, first_masks, len(names), heads),
        "masks": sample_masks(first_masks, names),
    }
    data.save(content, out)
    return data.load(out)


def mean_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean by key; a key that one lacks counts 0 there."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) / len(parts) for key in keys}


def results_table(found: data.Run):
    """The run as a rich table."""
    from rich import box
    from rich.table import Table

    from flashomni.report.figures import seconds
    from flashomni.report.page import psnr_text, shows_text

    title = f"tiny_flux, {found.json['steps']} steps, {found.json['model']['dtype']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "an image", "speed-up", "density", "PSNR", "SSIM", "as asked"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for arm in found.json["arms"]:
        key, ssim = arm["key"], found.mean(arm["key"], "ssim")
        table.add_row(
            arm["title"],
            seconds(found.mean(key, "seconds")),
            f"{found.speed_up(key):.2f}x",
            f"{found.mean(key, 'density'):.0%}",
            psnr_text(found.mean(key, "psnr")),
            "–" if ssim is None else f"{ssim:.4f}",
            shows_text(found, key),
        )
    return table
