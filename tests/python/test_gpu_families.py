"""Model families on a GPU: padding that differs in a batch, fused products, rotations an element."""

from __future__ import annotations

import copy

import pytest
import torch
from family_checks import config, denoise, error
from test_family_flux2 import passes as flux2_passes
from test_family_flux2 import pipeline as flux2_pipeline
from test_family_hunyuan_video import pipeline as hunyuan_pipeline

import flashomni

pytestmark = pytest.mark.gpu


def hunyuan(dtype: torch.dtype) -> tuple:
    """(model, x, inputs): two elements with 13 and 6 tokens of text."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator).to("cuda", dtype)

    model = hunyuan_pipeline().transformer.to("cuda", dtype)
    inputs = {
        "encoder_hidden_states": noise(20, 16),
        "encoder_attention_mask": (torch.arange(20) < torch.tensor([[13], [6]])).cuda(),
        "pooled_projections": noise(8),
        "guidance": torch.full((2,), 6000.0, device="cuda", dtype=dtype),
    }
    return model, noise(4, 3, 16, 16), inputs


def test_padding_that_differs_in_a_batch() -> None:
    exact = denoise(*hunyuan(torch.float64), steps=6)[-1]
    model, x, inputs = hunyuan(torch.bfloat16)
    theirs = error(denoise(model, x, inputs, 6)[-1], exact)
    engine = flashomni.enable(model, config(policy="dense", strict=True))
    assert error(denoise(model, x, inputs, 6, engine)[-1], exact) < 1.5 * theirs


def test_graphs_follow_the_lengths() -> None:
    model, x, inputs = hunyuan(torch.bfloat16)
    other = inputs | {"encoder_attention_mask": inputs["encoder_attention_mask"].flip(0)}
    runs = [inputs, other, inputs]
    engine = flashomni.enable(model, config(tau_kv=0.3))
    want = [denoise(model, x, given, 14, engine) for given in runs]
    flashomni.disable(model)
    engine = flashomni.enable(model, config(tau_kv=0.3, cuda_graphs=True))
    for given, outputs in zip(runs, want, strict=True):
        for a, b in zip(denoise(model, x, given, 14, engine), outputs, strict=True):
            assert torch.equal(a, b)


def test_fused_products() -> None:
    model = flux2_pipeline().transformer
    exact = flux2_passes(copy.deepcopy(model).to("cuda", torch.float64))[-1]
    model = model.to("cuda", torch.bfloat16)
    theirs = error(flux2_passes(model)[-1], exact)
    engine = flashomni.enable(model, config(policy="dense", strict=True))
    engine.begin(6)
    assert error(flux2_passes(model, engine.step)[-1], exact) < 1.5 * theirs
