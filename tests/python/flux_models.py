"""Tiny FLUX models with random weights, and the pipeline around them, for the tests of the engine."""

from __future__ import annotations

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

HEADS, HEAD_DIM = 2, 64


def tiny_transformer(seed: int = 0, doubles: int = 1, singles: int = 2) -> FluxTransformer2DModel:
    """float32, head_dim 64. Modulation and projections are scaled up, for attention to matter."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        num_layers=doubles,
        num_single_layers=singles,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name and "linear.weight" in name:
                parameter.mul_(8)
            elif any(part in name for part in ("to_v", "add_v", "to_out", "to_add_out", "proj_out")):
                parameter.mul_(3)
            elif "norm_q" in name or "norm_k" in name or "norm_added" in name:
                parameter.copy_(1.5 + 0.5 * torch.rand_like(parameter))
    return model


def tiny_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs) -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny_transformer(seed, **kwargs).to(dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FluxPipeline, steps: int = 8, text: int = 16, batch: int = 1, guided: bool = False, **kwargs):
    """Latents of a run with fixed noise and embeddings; 19 x 17 = 323 image tokens, an odd number."""
    generator = torch.Generator().manual_seed(1)  # every dtype rounds the same numbers
    dtype = pipe.transformer.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {"prompt_embeds": noise(batch, text, 32), "pooled_prompt_embeds": noise(batch, 32)}
    inputs["latents"] = noise(batch, 323, 4)
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, text, 32),
            "negative_pooled_prompt_embeds": noise(batch, 32),
            "true_cfg_scale": 3.0,
        }
    arguments = inputs | {
        "height": 304,
        "width": 272,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    return pipe(**(arguments | kwargs)).images


def passes(
    model: FluxTransformer2DModel, steps: int, text: int, batch: int, after_step=None
) -> list[torch.Tensor]:
    """A denoising loop by hand: the model's output at each step, over inputs that drift with it."""
    generator = torch.Generator().manual_seed(3)
    dtype = model.dtype
    height, width = 19, 17
    x = torch.randn(batch, height * width, 4, generator=generator).to(dtype)
    embeds = torch.randn(batch, text, 32, generator=generator).to(dtype)
    pooled = torch.randn(batch, 32, generator=generator).to(dtype)
    image_ids = torch.zeros(height, width, 3)
    image_ids[..., 1] += torch.arange(height)[:, None]
    image_ids[..., 2] += torch.arange(width)
    outputs = []
    for i in range(steps):
        y = model(
            hidden_states=x,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=torch.full((batch,), 1 - i / steps).to(dtype),
            img_ids=image_ids.flatten(0, 1),
            txt_ids=torch.zeros(text, 3),
            return_dict=False,
        )[0]
        outputs.append(y)
        x = x - y / steps
        if after_step is not None:
            after_step()
    return outputs


def double(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A float64 copy."""
    return copy.deepcopy(model).double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())
