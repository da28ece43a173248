"""Parallel blocks that follow their attention's rows, on the GPU."""

from __future__ import annotations

import pytest
import torch
from family_checks import check_forecast_rows, config, denoise, error
from flux_models import tiny_transformer
from test_family_flux2 import pipeline as flux2_pipeline
from test_family_flux_kin import ids
from test_follow import OddRows
from test_follow_parallel import active_rows, watch
from test_gpu_families import hunyuan

import flashomni

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
STEPS = 14


def flux(dtype: torch.dtype) -> tuple:
    """(model, x, inputs): 192 tokens with 77 of text."""
    where, generator = {"device": "cuda", "dtype": dtype}, torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(1, 77, 32, generator=generator).to(**where),
        "pooled_projections": torch.randn(1, 32, generator=generator).to(**where),
        "img_ids": ids(16, 3).cuda(),
        "txt_ids": torch.zeros(77, 3, device="cuda"),
    }
    return tiny_transformer().to(**where), torch.randn(1, 192, 4, generator=generator).to(**where), inputs


def flux2(dtype: torch.dtype) -> tuple:
    """The same with 20 of text, two elements."""
    where, generator = {"device": "cuda", "dtype": dtype}, torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 20, 32, generator=generator).to(**where),
        "guidance": torch.full((2,), 2.5, **where),
        "img_ids": ids(16, 4).cuda().expand(2, -1, -1),
        "txt_ids": torch.zeros(2, 20, 4, device="cuda"),
    }
    model = flux2_pipeline().transformer.to(**where)
    return model, torch.randn(2, 192, 16, generator=generator).to(**where), inputs


MODELS = {"flux": flux, "padded": hunyuan, "one product": flux2}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name, block_q", [*((name, 64) for name in MODELS), ("flux", 128)])
def test_cached_rows_are_forecast_and_others_computed(name: str, order: int, block_q: int) -> None:
    model, x, inputs = MODELS[name](BF16)
    settings = config(disable_cache_before_step=3, max_order=order, mlp="follow", block_q=block_q)
    engine = flashomni.enable(model, settings, policy=OddRows(whole=True))
    steps = watch(engine, model.single_transformer_blocks[0])
    denoise(model, x, inputs, 11, engine)
    active = active_rows(engine, steps[0][1].shape[1])
    # Each result is rounded to 8 bits; the forecast adds three with weights of up to 2.
    check_forecast_rows(steps, active, order, 0.05, rounding=0.02)


@pytest.mark.parametrize("kept", [{}, {"cache_dtype": "float8_e4m3"}, {"history": "host"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_graphs_and_compiled_blocks_give_the_bits_of_eager_steps(name: str, kept: dict) -> None:
    torch.compiler.reset()
    model, x, inputs = MODELS[name](BF16)
    settings = {"policy": "drift", "mlp": "follow", "tau_q": 0.8, "tau_kv": 0.3, **kept}
    want = denoise(model, x, inputs, STEPS, flashomni.enable(model, config(**settings)))
    assert 0 < flashomni.stats(model).cache_density < 1
    flashomni.disable(model)
    for compiled in (False, True):
        engine = flashomni.enable(model, config(cuda_graphs=True, **settings))
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            for got, wanted in zip(denoise(model, x, inputs, STEPS, engine), want, strict=True):
                assert torch.equal(got, wanted)
        assert not flashomni.stats(model).notes
        flashomni.disable(model)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_reused_is_as_near_to_exact_as_the_models_own(name: str) -> None:
    exact = denoise(*MODELS[name](torch.float64), steps=6)[-1]
    model, x, inputs = MODELS[name](BF16)
    theirs = error(denoise(model, x, inputs, 6)[-1], exact)
    engine = flashomni.enable(model, config(policy="dense", mlp="follow", strict=True))
    assert error(denoise(model, x, inputs, 6, engine)[-1], exact) < 1.5 * theirs
