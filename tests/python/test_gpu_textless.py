"""Families without text, the policy drift and feed-forwards that follow, on the GPU."""

from __future__ import annotations

import pytest
import test_family_kandinsky5 as kandinsky5
import test_family_pixart as pixart
import test_family_wan as wan
import torch
from family_checks import config, error

import flashomni

pytestmark = pytest.mark.gpu

MODELS = ("wan", "pixart", "kandinsky5")
STEPS = 14


@pytest.fixture(autouse=True)
def _needs_gemms() -> None:
    x = torch.zeros(1, 8, 64, device="cuda", dtype=torch.bfloat16)
    try:
        flashomni.gemm_q(x, torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16))
    except NotImplementedError as error:
        pytest.skip(str(error))


def model_of(name: str) -> torch.nn.Module:
    if name == "kandinsky5":
        return kandinsky5.of_type(kandinsky5.transformer(), torch.bfloat16).cuda()
    model = wan.transformer() if name == "wan" else pixart.pixart().transformer
    return model.to("cuda", torch.bfloat16)


def exact(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64; Kandinsky 5 knows none, and is in float32 for the most part anyway."""
    return model.float() if name == "kandinsky5" else model.double()


def denoise(name: str, model: torch.nn.Module, engine, strict: bool = False) -> list[torch.Tensor]:
    """The model's output at each step; strict: in a late step, whatever makes the host wait is an error."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        rounded = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return rounded.to("cuda", model.dtype)

    shapes = {"wan": (2, 4, 3, 14, 16), "pixart": (2, 4, 24, 28), "kandinsky5": (2, 3, 14, 16, 4)}
    x, text, outputs = noise(*shapes[name]), noise(2, 20, 16), []
    times = torch.linspace(1000, 0, STEPS + 1, device="cuda")
    options = {
        "wan": dict,
        "pixart": lambda: {"added_cond_kwargs": {}},
        "kandinsky5": lambda: {
            "pooled_projections": noise(2, 8),
            "visual_rope_pos": [torch.arange(count, device="cuda") for count in (3, 7, 8)],
            "text_rope_pos": torch.arange(20, device="cuda"),
        },
    }[name]()
    engine.begin(STEPS)
    for i in range(STEPS):
        torch.cuda.set_sync_debug_mode("error" if strict and i > 8 else "default")
        try:
            given = {"encoder_hidden_states": text, "timestep": times[i].expand(2)}
            y = model(hidden_states=x, **given, **options).sample
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
    want = denoise(name, exact(name, model_of(name)), NoEngine())[-1]
    model = model_of(name)
    theirs = error(denoise(name, model, NoEngine())[-1], want)
    engine = flashomni.enable(model, config(policy="dense", mlp="follow"))
    assert error(denoise(name, model, engine)[-1], want) < 1.5 * theirs
