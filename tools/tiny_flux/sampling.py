"""Sampling and scoring during training, at any resolution of the curriculum."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from model import image_ids, to_pictures
from PIL import Image

from flashomni.tiny_flux.check import score
from flashomni.tiny_flux.vocabulary import encode


@torch.no_grad()
def sample(model, prompts: list[str], side: int, steps: int, shift: float, batch: int = 40) -> torch.Tensor:
    """Euler samples [B, 3, side, side] in [0, 1]; prompt i uses seed i. The sigmas are FluxPipeline's."""
    device = model.device
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).tolist() + [0.0]
    ids, no_ids = image_ids(side, device), torch.zeros(16, 3, device=device)
    pictures = []
    for start in range(0, len(prompts), batch):
        embeds, pooled = encode(prompts[start : start + batch], device)
        noise = [
            torch.randn(1, (side // 4) ** 2, 48, generator=torch.Generator().manual_seed(start + i))
            for i in range(len(embeds))
        ]
        x = torch.cat(noise).to(device)
        for now, after in itertools.pairwise(sigmas):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                velocity = model(
                    hidden_states=x,
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    timestep=torch.full((len(x),), now, device=device),
                    img_ids=ids,
                    txt_ids=no_ids,
                    return_dict=False,
                )[0]
            x = x + (after - now) * velocity.float()
        pictures.append((to_pictures(x) / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(pictures)


def table(scores: list) -> dict[str, float]:
    """Share of pictures that are right, in all and by attribute."""
    names = ["ok", *scores[0].parts]
    return {name: round(float(np.mean([getattr(s, name) for s in scores])), 4) for name in names}


def evaluate(model, prompts: list[str], side: int, steps: int, shift: float) -> tuple[dict, torch.Tensor]:
    """Scores samples of the prompts; also returns the pictures."""
    pictures = sample(model, prompts, side, steps, shift)
    return table([score(p, prompt) for p, prompt in zip(pictures, prompts, strict=True)]), pictures


def contact_sheet(pictures, columns: int = 8) -> Image.Image:
    """PIL images, or pictures [B, 3, S, S] in [0, 1], side by side."""
    if isinstance(pictures, torch.Tensor):
        arrays = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    else:
        arrays = np.stack([np.asarray(p) for p in pictures])
    arrays = arrays[: max(columns, len(arrays) // columns * columns)]
    rows = [np.concatenate(list(arrays[i : i + columns]), 1) for i in range(0, len(arrays), columns)]
    return Image.fromarray(np.concatenate(rows, 0))
