"""Full-size transformers for benchmarks, as data: real configurations, random weights and inputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """In pixels and frames."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass(frozen=True)
class Model:
    """One model of the benchmark.

    cls: class of diffusers. config: its constructor's arguments where the published checkpoint differs from
    the defaults. tiny: in their place for tests. size, text, steps: what is run unless asked otherwise; text
    in tokens. settings: of the Config. inputs: (transformer, size, text) -> all arguments but the timestep.
    grid: (pixels, frames) a token; frames past the first. joint: the text stands in the sequence itself.
    mask_argument: position of the blocks' attention mask, where the model always makes one.
    """

    cls: str
    size: Size
    text: int
    inputs: Callable[[nn.Module, Size, int], dict[str, Any]]
    tiny: dict[str, Any]
    tiny_size: Size
    settings: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 50
    timestep_scale: float = 1.0
    grid: tuple[int, int] = (16, 1)
    joint: bool = True
    images: int = 1  # pictures of `size` in the sequence: a reference picture counts
    mask_argument: int | None = None

    def image_tokens(self, size: Size) -> int:
        pixels, frames = self.grid
        if size.width % pixels or size.height % pixels or (size.frames - 1) % frames:
            raise ValueError(
                f"resolution: expected sides that are multiples of {pixels}"
                + (f" and {frames}n + 1 frames" if frames > 1 else "")
                + f", got {size}"
            )
        count = size.width // pixels * (size.height // pixels) * ((size.frames - 1) // frames + 1)
        return count * self.images

    def tokens(self, size: Size, text: int) -> int:
        """Of the sequence that attention sees."""
        return self.image_tokens(size) + (text if self.joint else 0)


def parse_size(text: str, default: Size) -> Size:
    """ "1024x1024" or, for videos, "832x480x81" (width, height, frames); empty: `default`."""
    if not text:
        return default
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise ValueError(f"resolution: expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, got {text!r}")
    frames = int(match[3]) if match[3] else default.frames
    if frames > 1 and default.frames == 1:
        raise ValueError(f"resolution: expected WIDTHxHEIGHT for a model of pictures, got {text!r}")
    return Size(int(match[1]), int(match[2]), max(frames, 1))


def build(model: Model, device: torch.device | str, dtype: torch.dtype, *, tiny: bool = False) -> nn.Module:
    """The transformer with random weights, made on the device; parts that diffusers keeps in float32 are."""
    import diffusers

    cls = getattr(diffusers, model.cls)
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        transformer = cls(**(model.config | (model.tiny if tiny else {})))
    kept = getattr(cls, "_keep_in_fp32_modules", None) or ()
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(False)
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_inputs(model: Model, transformer: nn.Module, size: Size, text: int) -> Callable[[float], dict]:
    """Random inputs, the same at every step but for the time: gives (time from 1 to 0) -> arguments."""
    torch.manual_seed(1)
    fixed = model.inputs(transformer, size, text)
    device = next(transformer.parameters()).device
    dtype = next(t.dtype for t in fixed.values() if isinstance(t, Tensor))

    def at(time: float) -> dict[str, Any]:
        timestep = torch.full((1,), time * model.timestep_scale, device=device, dtype=dtype)
        return {**fixed, "timestep": timestep, "return_dict": False}

    return at


def _noise(transformer: nn.Module, *shape: int) -> Tensor:
    dtype = transformer.proj_out.weight.dtype
    return torch.randn(shape, device=transformer.proj_out.weight.device, dtype=torch.float32).to(dtype)


def _latents(transformer: nn.Module, size: Size) -> Tensor:
    """Of a video: [1, C, frames, height, width], 8 pixels and 4 frames a latent."""
    shape = ((size.frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    return _noise(transformer, 1, transformer.config.in_channels, *shape)


def _flux_inputs(transformer: nn.Module, size: Size, text: int, images: int = 1) -> dict[str, Any]:
    config, device = transformer.config, transformer.proj_out.weight.device
    rows, columns = size.height // 16, size.width // 16
    ids = torch.zeros(images, rows, columns, 3, device=device)
    ids[..., 0] += torch.arange(images, device=device)[:, None, None]  # 1: Kontext's reference
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)
    found = {
        "hidden_states": _noise(transformer, 1, images * rows * columns, config.in_channels),
        "encoder_hidden_states": _noise(transformer, 1, text, config.joint_attention_dim),
        "pooled_projections": _noise(transformer, 1, config.pooled_projection_dim),
        "img_ids": ids.flatten(0, 2),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    if config.guidance_embeds:
        found["guidance"] = torch.full((1,), 3.5, device=device)
    return found


def _kontext_inputs(transformer: nn.Module, size: Size, text: int) -> dict[str, Any]:
    return _flux_inputs(transformer, size, text, images=2)


def _hunyuan_video_inputs(transformer: nn.Module, size: Size, text: int) -> dict[str, Any]:
    config, device = transformer.config, transformer.proj_out.weight.device
    return {
        "hidden_states": _latents(transformer, size),
        "encoder_hidden_states": _noise(transformer, 1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, device=device, dtype=torch.int64),
        "pooled_projections": _noise(transformer, 1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=transformer.proj_out.weight.dtype),
    }


def _wan_inputs(transformer: nn.Module, size: Size, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(transformer, size),
        "encoder_hidden_states": _noise(transformer, 1, text, transformer.config.text_dim),
    }


def _qwen_inputs(transformer: nn.Module, size: Size, text: int) -> dict[str, Any]:
    rows, columns = size.height // 16, size.width // 16
    return {
        "hidden_states": _noise(transformer, 1, rows * columns, transformer.config.in_channels),
        "encoder_hidden_states": _noise(transformer, 1, text, transformer.config.joint_attention_dim),
        "img_shapes": [[(1, rows, columns)]],
    }


# The paper's settings for FLUX and HunyuanVideo; the others take those of the model most like them.
_IMAGE = {"tau_q": 0.5, "tau_kv": 0.15, "cache_interval": 5, "max_order": 1, "s_q": 0.3, "ramp_power": 2.0}
_VIDEO = {"tau_q": 0.5, "tau_kv": 0.05, "cache_interval": 6, "max_order": 1, "s_q": 0.3, "ramp_power": 1.7}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
_TINY_FLUX = _HEADS | {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (16, 24, 24),
}
_FLUX = {
    "cls": "FluxTransformer2DModel",
    "config": {"guidance_embeds": True},
    "size": Size(1024, 1024),
    "text": 512,
    "tiny": _TINY_FLUX,
    "tiny_size": Size(256, 256),
    "settings": _IMAGE,
}

MODELS: dict[str, Model] = {
    "flux-dev": Model(inputs=_flux_inputs, **_FLUX),
    "flux-kontext": Model(inputs=_kontext_inputs, images=2, **_FLUX),
    "hunyuanvideo": Model(
        cls="HunyuanVideoTransformer3DModel",
        size=Size(640, 400, 129),  # 33,256 tokens with the text
        text=256,
        inputs=_hunyuan_video_inputs,
        tiny=_HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (16, 24, 24),
        },
        tiny_size=Size(128, 128, 17),
        settings=_VIDEO,
        timestep_scale=1000.0,
        grid=(16, 4),
        mask_argument=3,
    ),
    "wan-14b": Model(
        cls="WanTransformer3DModel",
        size=Size(832, 480, 81),
        text=512,
        inputs=_wan_inputs,
        tiny=_HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 64,
            "rope_max_seq_len": 64,
        },
        tiny_size=Size(128, 128, 17),
        settings=_VIDEO,
        timestep_scale=1000.0,
        grid=(16, 4),
        joint=False,
    ),
    "qwen-image": Model(
        cls="QwenImageTransformer2DModel",
        size=Size(1328, 1328),
        text=512,
        inputs=_qwen_inputs,
        tiny=_HEADS
        | {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (16, 24, 24),
        },
        tiny_size=Size(256, 256),
        settings=_IMAGE,
    ),
}


def model_of(name: str) -> Model:
    """ValueError lists the names."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
