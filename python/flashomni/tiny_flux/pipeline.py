"""The trained model as diffusers' own FluxPipeline."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from .vae import PixelVAE
from .vocabulary import encode

SIDE = 256  # pixels: 64 x 64 tokens of 4 x 4 pixels
BATCH = 8  # images a pipeline call in `generate`
SHIFT = 5.0  # of the timesteps towards noise, as in training


def transformer_config() -> dict:
    """Keyword arguments of the FluxTransformer2DModel."""
    text = importlib.resources.files(__package__).joinpath("config.json").read_text()
    return json.loads(text)


def load(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: str | Path | None = None,
) -> FluxPipeline:
    """The ready pipeline; `weights` names another safetensors file of the same model than the shipped one.

    Use it as any FluxPipeline, with `prompt_embeds` and `pooled_prompt_embeds` from `encode`, height = width = 256.
    """
    transformer = FluxTransformer2DModel(**transformer_config())
    if weights is None:
        with importlib.resources.as_file(importlib.resources.files(__package__) / "weights.safetensors") as path:
            state = load_file(path)
    else:
        state = load_file(weights)
    transformer.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    transformer.requires_grad_(False).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=PixelVAE(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    ).to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    callback: Callable | None = None,
) -> list:
    """One PIL image a prompt, from noise that depends on its own seed alone (drawn on the CPU, any device alike).

    `callback(pipe, step, timestep, tensors)` runs after each step, as diffusers' `callback_on_step_end`; it may
    return None.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: one seed a prompt is needed")
    device, dtype = pipe.transformer.device, pipe.transformer.dtype

    def on_step_end(*args):
        return callback(*args) or {}

    images = []
    for start in range(0, len(prompts), BATCH):
        embeds, pooled = encode(list(prompts[start : start + BATCH]), device, dtype)
        output = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + BATCH]],
            callback_on_step_end=on_step_end if callback else None,
        )
        images.extend(output.images)
    return images
