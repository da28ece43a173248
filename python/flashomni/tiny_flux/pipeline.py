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

    Use it as any FluxPipeline, with `prompt_embeds` and `pooled_prompt_embeds` from `encode`, height = width
    = 256.
    """
    transformer = FluxTransformer2DModel(**transformer_config())
    if weights is None:
        with importlib.resources.as_file(
            importlib.resources.files(__package__) / "weights.safetensors"
        ) as path:
            state = load_file(path)
    else:
        state = load_file(weights)
    transformer.load_state_dict(state)
    transformer.requires_grad_(False).eval()
    vae = PixelVAE()
    for model in (transformer, vae):
        # Module's own `to`: ModelMixin's warns about layers to keep in float32, of which there are none.
        torch.nn.Module.to(model, dtype)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    callback: Callable | None = None,
    *,
    batch: int = 8,
    guidance: float = 1.0,
) -> list:
    """One PIL image a prompt, `batch` at a time, from noise that depends on the image's own seed alone.

    The noise is drawn on the CPU, so it is the same for any device. `callback(pipe, step, timestep,
    tensors)` runs
    after each step, as diffusers' `callback_on_step_end`; it may return None. `guidance` above 1 turns on
    true
    classifier-free guidance, at twice the cost.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: one seed a prompt is needed")
    device, dtype = pipe.transformer.device, pipe.transformer.dtype

    def on_step_end(*args):
        return callback(*args) or {}

    images = []
    for start in range(0, len(prompts), batch):
        embeds, pooled = encode(list(prompts[start : start + batch]), device, dtype)
        without = encode([""] * len(embeds), device, dtype) if guidance > 1 else (None, None)
        output = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=without[0],
            negative_pooled_prompt_embeds=without[1],
            true_cfg_scale=guidance,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]],
            callback_on_step_end=on_step_end if callback else None,
        )
        images.extend(output.images)
    return images
