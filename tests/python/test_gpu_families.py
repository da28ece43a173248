"""Model families on a GPU: padding that differs in a batch, fused products, rotations an element; and those
that no other test runs there."""

from __future__ import annotations

import copy

import pytest
import torch
from family_checks import config, denoise, error
from test_family_allegro import case as allegro
from test_family_aura_flow import case as aura_flow
from test_family_cogvideox import consisid
from test_family_cogview4 import case as cogview4
from test_family_cosmos import case as cosmos
from test_family_flux2 import passes as flux2_passes
from test_family_flux2 import pipeline as flux2_pipeline
from test_family_hunyuan_video import pipeline as hunyuan_pipeline
from test_family_lumina2 import case as lumina2
from test_family_pixart import latte_case

import flashomni

pytestmark = pytest.mark.gpu

MODELS = {  # each: (model, x, inputs)
    "allegro": allegro,
    "aura_flow": aura_flow,
    "cogview4": cogview4,
    "consisid": consisid,
    "cosmos": cosmos,
    "latte": latte_case,
    "lumina2": lumina2,
}
CAPTURED = [name for name in MODELS if name not in ("cogview4", "lumina2")]  # they use the host in every call


def put(given, dtype: torch.dtype):
    """Tensors and nested sequences of them on the GPU; numbers in `dtype`."""
    if isinstance(given, (list, tuple)):
        return type(given)(put(each, dtype) for each in given)
    return given.to("cuda", dtype if given.is_floating_point() else None)


def case(name: str, dtype: torch.dtype) -> tuple:
    """(model, x, inputs) on the GPU; tables of RoPE stay in float32, as pipelines have them."""
    model, x, inputs = MODELS[name]()
    inputs = {
        key: put(given, torch.float32 if key == "image_rotary_emb" else dtype)
        for key, given in inputs.items()
    }
    return model.to("cuda", dtype), put(x, dtype), inputs


@pytest.mark.parametrize("name", MODELS)
def test_nothing_reused_is_as_exact_as_the_models_own(name: str) -> None:
    exact = denoise(*case(name, torch.float64), steps=6)[-1]
    model, x, inputs = case(name, torch.bfloat16)
    theirs = error(denoise(model, x, inputs, 6)[-1], exact)
    engine = flashomni.enable(model, config(policy="dense", strict=True))
    assert error(denoise(model, x, inputs, 6, engine)[-1], exact) < 1.5 * theirs


@pytest.mark.parametrize("name", CAPTURED)
def test_graphs_have_the_same_bits(name: str) -> None:
    model, x, inputs = case(name, torch.bfloat16)
    engine = flashomni.enable(model, config(tau_kv=0.3))
    want = denoise(model, x, inputs, 14, engine)
    flashomni.disable(model)
    engine = flashomni.enable(model, config(tau_kv=0.3, cuda_graphs=True))
    for a, b in zip(denoise(model, x, inputs, 14, engine), want, strict=True):
        assert torch.equal(a, b)


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
