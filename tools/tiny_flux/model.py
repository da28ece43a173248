"""The transformer in training: start values, resolutions, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashomni.tiny_flux.pipeline import SIDE, transformer_config

PATCH = 4  # pixels
MAX_FILE = 15 << 20  # bytes; larger checkpoints are split


def new_model(device: torch.device) -> FluxTransformer2DModel:
    """The model with zero modulation and zero output, so that each block starts as the identity."""
    model = FluxTransformer2DModel(**transformer_config())
    for name, param in model.named_parameters():
        modulation = ".norm" in name and ".linear." in name
        if modulation or name.startswith(("norm_out.linear.", "proj_out.")):
            torch.nn.init.zeros_(param)
        elif name.endswith(".bias"):
            torch.nn.init.zeros_(param)
        elif name == "context_embedder.weight":
            # Its inputs are one-hot: this gives a word about unit scale.
            torch.nn.init.normal_(param, std=0.5)
        elif name == "time_text_embed.text_embedder.linear_1.weight":
            torch.nn.init.normal_(param, std=0.3)
    return model.to(device)


def to_tokens(pictures: torch.Tensor) -> torch.Tensor:
    """[B, 3, S, S] -> [B, (S/4)^2, 48], in the order of PixelVAE and FluxPipeline's packing."""
    latents = torch.nn.functional.pixel_unshuffle(pictures, 2)
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def to_pictures(tokens: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_tokens`."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    latents = tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return torch.nn.functional.pixel_shuffle(latents.reshape(b, c // 4, 2 * side, 2 * side), 2)


def image_ids(side: int, device: torch.device) -> torch.Tensor:
    """Position ids [(side/4)^2, 3] of a picture of `side` pixels on the grid of the full picture.

    A token of a smaller picture stands for several of the full one and sits at their centre, so that
    positions mean the same at every resolution of the curriculum.
    """
    step = SIDE // side
    axis = torch.arange(side // PATCH, device=device) * float(step) + (step - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)


def save_checkpoint(folder: Path, model: torch.nn.Module, ema: dict[str, torch.Tensor], meta: dict) -> None:
    """Writes `weights.safetensors` (averaged, bf16: ships) and `master-*.safetensors` (fp32, to resume)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"tiny_flux": json.dumps(meta)}
    shipped = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in ema.items()}
    save_file(shipped, folder / "weights.safetensors", metadata=text)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = MAX_FILE
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu().contiguous()
        if tensor.nbytes > room:
            shards.append({})
            room = MAX_FILE
        shards[-1][name] = tensor
        room -= tensor.nbytes
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"master-{i}.safetensors", metadata=text)


def load_checkpoint(folder: Path, model: torch.nn.Module, ema: dict[str, torch.Tensor]) -> dict:
    """Restores model and average in place; returns the checkpoint's meta."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("master-*.safetensors")):
        state.update(load_file(path))
    model.load_state_dict(state)
    for name, tensor in load_file(folder / "weights.safetensors").items():
        ema[name].copy_(tensor)
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["tiny_flux"])
