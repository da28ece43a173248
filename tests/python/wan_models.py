"""Tiny models of Wan's make with random weights, and a run of their pipelines."""

from __future__ import annotations

import torch
from family_checks import lively
from torch import nn

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}


def stirred(model: nn.Module) -> nn.Module:
    """With modulation scaled up, for attention to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_shift_table") and "blocks" in name:
                parameter.mul_(8)
    return lively(model)


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **inputs) -> torch.Tensor:
    """3 frames of 7 x 8 tokens."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs |= {"prompt_embeds": noise(batch, 20, 16), "latents": noise(batch, 4, 3, 14, 16)}
    if guided:
        inputs["negative_prompt_embeds"] = noise(batch, 20, 16)
    sizes = {"height": 112, "width": 128, "num_frames": 9, "num_inference_steps": steps}
    return pipe(
        **inputs, **sizes, guidance_scale=4.0 if guided else 1.0, output_type="latent", return_dict=False
    )[0]
