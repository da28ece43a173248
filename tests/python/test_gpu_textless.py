"""Families without text, the policy drift and feed-forwards that follow, on the GPU."""

from __future__ import annotations

import pytest
import test_family_pixart as pixart
import test_family_wan as wan
import torch
from family_checks import config, error

import flashomni

pytestmark = pytest.mark.gpu

MODELS = {"wan": wan, "pixart": pixart}
STEPS = 14


@pytest.fixture(autouse=True)
def _needs_gemms() -> None:
    x = torch.zeros(1, 8, 64, device="cuda", dtype=torch.bfloat16)
    try:
        flashomni.gemm_q(x, torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16))
    except NotImplementedError as error:
        pytest.skip(str(error))


def model_of(name: str) -> torch.nn.Module:
    model = wan.transformer() if name == "wan" else pixart.pixart().transformer
    return model.to("cuda", torch.bfloat16)


def denoise(name: str, model: torch.nn.Module, engine, strict: bool = False) -> list[torch.Tensor]:
    """The model's output at each step; strict: in a late step, whatever makes the host wait is an error."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        rounded = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return rounded.to("cuda", next(model.parameters()).dtype)

    x = noise(2, 4, 3, 14, 16) if name == "wan" else noise(2, 4, 24, 28)
    text, outputs = noise(2, 20, 16), []
    times = torch.linspace(1000, 0, STEPS + 1, device="cuda")
    options = {} if name == "wan" else {"added_cond_kwargs": {}}
    engine.begin(STEPS)
    for i in range(STEPS):
        torch.cuda.set_sync_debug_mode("error" if strict and i > 8 else "default")
        try:
            given = {"encoder_hidden_states": text, "timestep": times[i].expand(2)}
            y = model(hidden_states=x, return_dict=False, **given, **options)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        outputs.append(y)
        x = x - y[:, :4] / STEPS
        engine.step()
    return outputs


@pytest.mark.parametrize("mlp", ["dense", "follow"])
@pytest.mark.parametrize("policy", ["drift", "flashomni"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_bits_of_eager_steps(name: str, policy: str, mlp: str) -> None:
    model = model_of(name)
    settings = {"policy": policy, "mlp": mlp, "tau_q": 0.8, "tau_kv": 0.6, "ramp_power": 1.0}
    eager = flashomni.enable(model, config(**settings))
    want, stats = denoise(name, model, eager), flashomni.stats(model)
    assert (stats.cache_density < 1) == (policy == "drift") and stats.density < 1
    flashomni.disable(model)
    engine = flashomni.enable(model, config(cuda_graphs=True, **settings))
    for _ in range(2):
        for got, wanted in zip(denoise(name, model, engine), want, strict=True):
            assert torch.equal(got, wanted)
    assert not flashomni.stats(model).notes


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    model = model_of(name)
    engine = flashomni.enable(model, config(policy="drift", mlp="follow", tau_q=0.8, s_q=0.3))
    denoise(name, model, engine)
    denoise(name, model, engine, strict=True)


class NoEngine:
    """The model's own code has no clock."""

    def begin(self, steps: int) -> None: ...

    def step(self) -> None: ...


@pytest.mark.parametrize("name", MODELS)
def test_nothing_reused_is_as_near_to_exact_as_the_models_own(name: str) -> None:
    exact = denoise(name, model_of(name).double(), NoEngine())[-1]
    model = model_of(name)
    theirs = error(denoise(name, model, NoEngine())[-1], exact)
    engine = flashomni.enable(model, config(policy="dense", mlp="follow"))
    assert error(denoise(name, model, engine)[-1], exact) < 1.5 * theirs
