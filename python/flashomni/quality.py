"""The quality sweep: how far sparse pictures of tiny_flux move from dense ones, and what is gained for it.

Each drawn picture is one line of records.jsonl, so that a sweep can be cut anywhere and goes on from there;
the documents are made from the lines alone.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter

from PIL import Image

from flashomni.config import PRESETS, Config
from flashomni.report import metrics

PAPER_WARM_UP = 6  # of 40 steps: the paper's 8 of 50
REFERENCE = "dense, torch"
FLOOR_PSNR = 30.0  # dB; what the demo's setting has to keep on average
CENTRE = {
    "cache_interval": 5,
    "max_order": 2,
    "tau_q": 0.8,
    "tau_kv": 0.1,
    "ramp_power": 0.0,
    "disable_cache_before_step": 10,
}
FIELDS = {
    "cache_interval": "N",
    "max_order": "D",
    "tau_q": "τq",
    "tau_kv": "τkv",
    "s_q": "S_q",
    "ramp_power": "ramp",
    "disable_cache_before_step": "warm-up",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table: a configuration, or a dense run without the engine (config None) in a type."""

    name: str
    config: Config | None
    dtype: str = "float32"
    group: str = "sweep"  # "reference", "floor", "paper" or "sweep"


def describe(config: Config) -> str:
    """The fields that the sweep turns, in the paper's letters."""
    shown = {letter: getattr(config, field) for field, letter in FIELDS.items()}
    if not shown["S_q"]:
        del shown["S_q"]
    more = ["fp8"] if config.cache_dtype != "model" else []
    more += ["MLP follows"] if config.mlp == "follow" else []
    return " ".join([*(f"{letter}={value:g}" for letter, value in shown.items()), *more])


def settings() -> list[Setting]:
    """Reference, floors, the paper's two settings, and one factor at a time around a centre, with corners."""
    changes: list[dict] = [{}]
    changes += [{"tau_q": value} for value in (0.0, 0.5, 0.9)]
    changes += [{"tau_kv": value} for value in (0.0, 0.3)]
    changes += [{"cache_interval": value} for value in (3, 8)]
    changes += [{"max_order": value} for value in (0, 1)]
    changes += [{"max_order": value, "cache_dtype": "float8_e4m3"} for value in (0, 1, 2)]
    changes += [
        {"disable_cache_before_step": 6},
        {"tau_q": 0.9, "tau_kv": 0.3},
        {"mlp": "follow"},
        {"tau_q": 0.9, "tau_kv": 0.3, "mlp": "follow"},
        {"tau_q": 0.9, "tau_kv": 0.05, "cache_interval": 6, "s_q": 0.3, "disable_cache_before_step": 12},
    ]
    dense = Config(**{**CENTRE, "policy": "dense", "max_order": 0})
    found = [
        Setting(REFERENCE, None, group="reference"),
        Setting("dense, our kernels", dense, group="floor"),
        Setting("dense, torch, bfloat16", None, "bfloat16", group="floor"),
    ]
    for name, label in (("flux", "paper, FLUX"), ("hunyuan_video", "paper, HunyuanVideo")):
        config = Config(**{**PRESETS[name], "disable_cache_before_step": PAPER_WARM_UP})
        found.append(Setting(f"{label}: {describe(config)}", config, group="paper"))
    for change in changes:
        config = Config(**{**CENTRE, **change})
        found.append(Setting(describe(config), config))
    return found


def prompts_of(count: int) -> list[tuple[str, int]]:
    """The first `count` of the held-out prompts in a fixed random order, each with its seed.

    A smaller subset is the beginning of a larger one, so that a sweep can grow prompt by prompt.
    """
    from flashomni import tiny_flux

    held_out = tiny_flux.HELD_OUT_PROMPTS
    if not 1 <= count <= len(held_out):
        raise ValueError(f"prompts: expected 1 to {len(held_out)}, got {count}")
    order = random.Random(0).sample(range(len(held_out)), len(held_out))
    return [(held_out[index], 1000 + i) for i, index in enumerate(order[:count])]


def key_of(setting: Setting, prompt: str, seed: int, steps: int) -> str:
    """What makes two pictures the same experiment."""
    config = None if setting.config is None else dataclasses.asdict(setting.config)
    return json.dumps([config, setting.dtype, prompt, seed, steps], sort_keys=True)


def read_records(work: Path) -> dict[str, dict]:
    """The finished pictures by key; a line that a cut left unfinished is left out."""
    path, found = work / "records.jsonl", {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["key"]] = record
    return found


def sweep(
    work: Path,
    prompts: int,
    steps: int,
    only: Sequence[str] = (),
    limit: float = float("inf"),
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> None:
    """Draws what is not drawn yet, prompt by prompt, and appends a line a picture to work/records.jsonl.

    only: names (or parts of names) of settings to draw; the reference is always drawn. limit: seconds after
    which no new picture is begun.
    """
    import torch

    from flashomni import demo, tiny_flux

    work.mkdir(parents=True, exist_ok=True)
    done = read_records(work)
    chosen = [
        s for s in settings() if not only or s.group == "reference" or any(part in s.name for part in only)
    ]
    tasks = [(s, prompt, seed) for prompt, seed in prompts_of(prompts) for s in chosen]
    pipes: dict[str, object] = {}
    begun = perf_counter()
    for index, (setting, prompt, seed) in enumerate(tasks):
        progress(index, len(tasks), setting.name)
        key = key_of(setting, prompt, seed, steps)
        reference = work / f"dense-{steps}-{seed}.png"
        if key in done and (setting.group != "reference" or reference.is_file()):
            continue
        if perf_counter() - begun > limit:
            return
        if setting.dtype not in pipes:
            pipes[setting.dtype] = tiny_flux.load(dtype=getattr(torch, setting.dtype))
            demo.draw(pipes[setting.dtype], prompt, seed, 1, setting.config)
        drawing = demo.draw(pipes[setting.dtype], prompt, seed, steps, setting.config)
        record = {
            "key": key,
            "prompt": prompt,
            "seed": seed,
            "seconds": drawing.seconds,
            "density": drawing.density,
            "shows_prompt": bool(tiny_flux.score(drawing.image, prompt).ok),
        }
        if setting.group == "reference":
            drawing.image.save(reference)
        else:
            dense = Image.open(reference).convert("RGB")
            record |= {"psnr": metrics.psnr(drawing.image, dense), "ssim": metrics.ssim(drawing.image, dense)}
        with (work / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        done[key] = record
    progress(len(tasks), len(tasks), "done")


def summarize(records: Sequence[dict], dense: dict[str, dict]) -> dict:
    """One setting's pictures as numbers. dense: the reference's record of each prompt."""

    def mean(field: str) -> float | None:
        values = [r[field] for r in records if field in r]
        return sum(values) / len(values) if values else None

    worst = min((r for r in records if "psnr" in r), key=lambda r: r["psnr"], default=None)
    return {
        "pictures": len(records),
        "density": mean("density"),
        "seconds": mean("seconds"),
        "speed_up": sum(dense[r["prompt"]]["seconds"] for r in records) / sum(r["seconds"] for r in records),
        "psnr": mean("psnr"),
        "ssim": mean("ssim"),
        "shows_prompt": sum(r["shows_prompt"] for r in records),
        "dense_shows_prompt": sum(dense[r["prompt"]]["shows_prompt"] for r in records),
        "worst_psnr": worst and worst["psnr"],
        "worst_prompt": worst and worst["prompt"],
    }


def pareto(rows: Iterable[dict]) -> list[dict]:
    """The rows that no other beats in both speed-up and PSNR, slowest first."""
    rows = list(rows)
    best = [
        r
        for r in rows
        if not any(
            o["speed_up"] >= r["speed_up"]
            and o["psnr"] >= r["psnr"]
            and (o["speed_up"], o["psnr"]) != (r["speed_up"], r["psnr"])
            for o in rows
        )
    ]
    return sorted(best, key=lambda r: r["speed_up"])


def collect(work: Path, prompts: int, steps: int) -> list[dict]:
    """A row for each setting that has all its pictures. ValueError if the reference has not."""
    records, subset = read_records(work), prompts_of(prompts)
    rows, dense = [], {}
    for setting in settings():
        keys = [key_of(setting, prompt, seed, steps) for prompt, seed in subset]
        found = [records[key] for key in keys if key in records]
        if setting.group == "reference":
            dense = {record["prompt"]: record for record in found}
        if len(found) < len(subset):
            if setting.group == "reference":
                raise ValueError(
                    f"work: {work} holds {len(found)} of {len(subset)} dense pictures; "
                    f"run `flashomni quality --prompts {prompts} --steps {steps}` first"
                )
            continue
        config = None if setting.config is None else dataclasses.asdict(setting.config)
        summary = summarize(found, dense)
        rows.append({"name": setting.name, "group": setting.group, "config": config, **summary})
    return rows


def write_docs(work: Path, docs: Path, prompts: int, steps: int) -> Path:
    """Writes quality.json, quality.md and images/frontier.png into `docs`; the path of the table."""
    from flashomni import doctor
    from flashomni.report import frontier

    rows = collect(work, prompts, steps)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    host = doctor.machine()
    content = {"prompts": prompts_of(prompts), "steps": steps, "machine": host, "rows": rows}
    (docs / "quality.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    best = pareto(row for row in rows if row["group"] in ("paper", "sweep"))
    frontier.plot(rows, best, FLOOR_PSNR, docs / "images" / "frontier.png")
    path = docs / "quality.md"
    path.write_text(frontier.markdown(content, best, FLOOR_PSNR), encoding="utf-8")
    return path
