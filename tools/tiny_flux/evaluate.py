"""Scores tiny_flux on its held-out prompts, through diffusers' FluxPipeline as users run it.

    PYTHONPATH=python python tools/tiny_flux/evaluate.py --config bfloat16,20,5 --config bfloat16,20,5,2

A config is DTYPE,STEPS,SHIFT[,GUIDANCE]. The dtype "mixed" keeps weights and latents in float32 and
multiplies in bfloat16. Prompt i uses seed i. Prints a line of JSON a config; --out keeps all verdicts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from sampling import contact_sheet, table

from flashomni.tiny_flux import HELD_OUT_PROMPTS, generate, load, score


def run(config: str, prompts: list[str], weights: Path | None, device: str, batch: int):
    """(summary, a verdict a prompt, images) of one config."""
    dtype, steps, shift, *guidance = config.split(",")
    mixed = dtype == "mixed"
    pipe = load(torch.float32 if mixed else getattr(torch, dtype), device, weights)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    guidance = float(guidance[0]) if guidance else 1.0
    start = time.perf_counter()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
        images = generate(pipe, prompts, range(len(prompts)), int(steps), batch=batch, guidance=guidance)
    seconds = (time.perf_counter() - start) / len(prompts)
    scores = [score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    summary = {"config": config, "seconds_an_image": round(seconds, 4), **table(scores)}
    return summary, {prompt: str(s) for prompt, s in zip(prompts, scores, strict=True)}, images


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones")
    parser.add_argument("--prompts", type=int, default=len(HELD_OUT_PROMPTS), help="how many, from the first")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, help="folder for verdicts and contact sheets")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further config after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    prompts = HELD_OUT_PROMPTS[: args.prompts]
    for config in args.config:
        if time.perf_counter() - start > args.seconds:
            break
        summary, verdicts, images = run(config, prompts, args.weights, args.device, args.batch)
        print(json.dumps(summary), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            name = config.replace(",", "-")
            (args.out / f"{name}.json").write_text(
                json.dumps({"summary": summary, "verdicts": verdicts}, indent=1)
            )
            contact_sheet(images[:40]).save(args.out / f"{name}.jpg", quality=92)


if __name__ == "__main__":
    main()
