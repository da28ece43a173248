"""Models built like FLUX.1 (LongCat-Image, Ovis-Image, Bria), and FLUX.3."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    BriaTransformer2DModel,
    Flux3Transformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from family_checks import check_passes, config, lively

import flashomni

SIZES = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1, "num_single_layers": 2}


def longcat() -> torch.nn.Module:
    return LongCatImageTransformer2DModel(
        **SIZES, in_channels=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[16, 24, 24]
    )


def ovis() -> torch.nn.Module:
    return OvisImageTransformer2DModel(
        **SIZES, in_channels=4, out_channels=4, joint_attention_dim=32, axes_dims_rope=(16, 24, 24)
    )


def bria() -> torch.nn.Module:
    return BriaTransformer2DModel(**SIZES, in_channels=4, joint_attention_dim=32, axes_dims_rope=[16, 24, 24])


def flux3() -> torch.nn.Module:
    return Flux3Transformer2DModel(
        **SIZES,
        in_channels=4,
        cond_in_channels=4,
        joint_attention_dim=32,
        axes_dims_rope=(16, 16, 16, 16),
    )


def ids(width: int, axes: int, first: int = 0) -> torch.Tensor:
    tokens = torch.arange(192)
    given = torch.zeros(192, axes)
    given[:, 0], given[:, 1], given[:, 2] = first, tokens // width, tokens % width
    return given


@pytest.mark.parametrize("kind", [longcat, ovis, bria], ids=lambda kind: kind.__name__)
def test_passes(kind) -> None:
    """12 x 16 tokens with 20 of text, batch 2."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 20, 32, generator=generator),
        "img_ids": ids(16, 3, first=1),
        "txt_ids": torch.zeros(20, 3),
    }
    model = lively(kind())
    said = flashomni.memory(config(), model, image_tokens=192, text_tokens=20, batch=2)
    stats = check_passes(model, torch.randn(2, 192, 4, generator=generator), inputs)
    assert stats.bytes_held == said.by_kind
    assert not bool(stats.symbols[0, 0].masks()[0][:, :, 1:].all())  # nothing of the image is protected


@pytest.mark.parametrize("references", [False, True], ids=["text", "references"])
def test_flux3(references: bool) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    model = lively(flux3())
    with torch.no_grad():
        for layers in (model.early_stream_modulations, model.single_stream_modulations):
            for name in layers:
                layers[name].linear.weight.mul_(4)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 20, 32, generator=generator),
        "img_ids": ids(16, 4),
        "txt_ids": torch.zeros(20, 4),
    }
    if references:
        inputs |= {
            "image_cond_hidden_states": torch.randn(2, 128, 4, generator=generator),
            "image_cond_ids": ids(16, 4, first=10)[:128],
        }
    stats = check_passes(model, torch.randn(2, 192, 4, generator=generator), inputs)
    for symbols in stats.symbols.values():
        cache = symbols.masks()[0]
        assert symbols.q_tokens == (340 if references else 212)
        assert bool(cache[:, :, 4:].all()) and not bool(cache[:, :, 1:3].all())
