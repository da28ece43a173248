"""The engine on the GPU: a step reads nothing of the device, and its graph gives what it gives itself."""

from __future__ import annotations

import pytest
import torch
from flux_models import tiny_transformer
from torch._dynamo.utils import counters

import flashomni
from flashomni import Config

pytestmark = pytest.mark.gpu

TEXT, HEIGHT, WIDTH, STEPS = 77, 24, 20, 16
KEPT = [{}, {"cache_dtype": "float8_e4m3"}, {"history": "host"}, {"mlp": "follow"}]


@pytest.fixture(autouse=True)
def _needs_gemms() -> None:
    """The engine is as good as the operators of its backend."""
    x = torch.zeros(1, 8, 64, device="cuda", dtype=torch.bfloat16)
    try:
        flashomni.gemm_q(x, torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16))
    except NotImplementedError as error:
        pytest.skip(str(error))


def config(**changes) -> Config:
    settings = {
        "cache_interval": 4,
        "disable_cache_before_step": 3,
        "block_q": 64,
        "block_kv": 64,
        "tau_q": 0.6,
        "tau_kv": 0.2,
        "ramp_power": 1.0,
    }
    return Config(**(settings | changes))


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(HEIGHT, WIDTH, 3)
    ids[..., 1] += torch.arange(HEIGHT)[:, None]
    ids[..., 2] += torch.arange(WIDTH)
    half = {
        "hidden_states": torch.randn(1, HEIGHT * WIDTH, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
    }
    places = {"img_ids": ids.flatten(0, 1).cuda(), "txt_ids": torch.zeros(TEXT, 3, device="cuda")}
    return {name: x.to("cuda", torch.bfloat16) for name, x in half.items()} | places


def denoise(model, engine, strict: bool = False) -> list[torch.Tensor]:
    """The model's output at each step. strict: in a step, whatever makes the host wait is an error."""
    given, outputs = inputs(), []
    times = torch.linspace(1, 0, STEPS + 1, device="cuda", dtype=torch.bfloat16)
    engine.begin(STEPS)
    for i in range(STEPS):
        # The first steps allocate; the first ones of a kind may load kernels.
        torch.cuda.set_sync_debug_mode("error" if strict and i > 8 else "default")
        try:
            y = model(timestep=times[i : i + 1], return_dict=False, **given)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        outputs.append(y)
        given["hidden_states"] = given["hidden_states"] - y / STEPS
        engine.step()
    return outputs


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("s_q", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_graphs_give_the_bits_of_eager_steps(order: int, s_q: float, kept: dict) -> None:
    model = tiny_transformer().to("cuda", torch.bfloat16)
    settings = {"max_order": order, "s_q": s_q} | kept
    eager = flashomni.enable(model, config(**settings))
    want, stats = denoise(model, eager), flashomni.stats(model)
    flashomni.disable(model)
    engine = flashomni.enable(model, config(cuda_graphs=True, **settings))
    for run in range(3):  # the later runs replay what the first one captured
        for step, (got, wanted) in enumerate(zip(denoise(model, engine), want, strict=True)):
            assert torch.equal(got, wanted), f"run {run}, step {step}"
        found = flashomni.stats(model)
        assert found.density_by_step == stats.density_by_step and found.steps == stats.steps
        assert not found.notes
    assert sum(graph is not None for graph in engine.graphs._graphs.values()) >= 3
    flashomni.disable(model)


@pytest.mark.parametrize("cache_dtype", ["model", "float8_e4m3"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_history_on_the_host_changes_no_bit(cache_dtype: str, order: int) -> None:
    model = tiny_transformer().to("cuda", torch.bfloat16)
    settings = {"max_order": order, "cache_dtype": cache_dtype}
    runs = []
    for history in ("device", "host"):
        engine = flashomni.enable(model, config(history=history, **settings))
        runs.append([*denoise(model, engine), *denoise(model, engine)])
        held = engine.bytes_held()
        assert (held["host_history"] > 0) == (history == "host") and (held["history"] > 0) != (
            history == "host"
        )
        assert all(t.is_pinned() for s in engine.contexts.states() for t in s.tensors()["host_history"])
        flashomni.disable(model)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_step_never_waits_for_the_device(kept: dict) -> None:
    model = tiny_transformer().to("cuda", torch.bfloat16)
    for graphs in (False, True):
        engine = flashomni.enable(model, config(cuda_graphs=graphs, s_q=0.3, **kept))
        denoise(model, engine)
        denoise(model, engine)
        denoise(model, engine, strict=True)
        flashomni.disable(model)


def test_the_gpu_does_as_the_cpu() -> None:
    """Dense symbols, so that no bit of the choice can differ; the rest is rounding in bfloat16.

    The model's own code does it on the CPU in that type too: the times alone, rounded, move the outputs by
    40%.
    """
    model = tiny_transformer().to(torch.bfloat16)
    exact = [x.float() for x in _on_cpu(model)]
    model = model.to("cuda")
    engine = flashomni.enable(model, config(policy="dense"))
    for got, want in zip(denoise(model, engine), exact, strict=True):
        assert (got.cpu().float() - want).norm() < 0.1 * want.norm()
    flashomni.disable(model)


def _on_cpu(model) -> list[torch.Tensor]:
    given, outputs = {name: x.cpu() for name, x in inputs().items()}, []
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.bfloat16)
    for i in range(STEPS):
        y = model(timestep=times[i : i + 1], return_dict=False, **given)[0]
        outputs.append(y)
        given["hidden_states"] = given["hidden_states"] - y / STEPS
    return outputs


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_memory_is_predicted(kept: dict) -> None:
    model = tiny_transformer().to("cuda", torch.bfloat16)
    said = flashomni.memory(config(**kept), model, image_tokens=HEIGHT * WIDTH, text_tokens=TEXT)
    engine = flashomni.enable(model, config(**kept))
    denoise(model, engine)
    held = flashomni.stats(model).bytes_held
    assert held["host_history"] == said.host
    there = sum(held.values()) - said.host
    assert abs(said.total - there) <= 0.02 * there, (said.by_kind, held)
    flashomni.disable(model)


@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_blocks_give_the_bits_of_eager_steps(graphs: bool) -> None:
    """By aot_eager, whose graphs are torch's own kernels; nothing is compiled after the first run."""
    torch.compiler.reset()
    model = tiny_transformer(doubles=2, singles=3).to("cuda", torch.bfloat16)
    want = denoise(model, flashomni.enable(model, config()))
    flashomni.disable(model)
    engine = flashomni.enable(model, config(cuda_graphs=graphs))
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled = []
    for run in range(3):
        for step, (got, wanted) in enumerate(zip(denoise(model, engine), want, strict=True)):
            assert torch.equal(got, wanted), f"run {run}, step {step}"
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1], compiled
    assert not flashomni.stats(model).notes
    flashomni.disable(model)


def test_blocks_compiled_by_inductor_are_near() -> None:
    torch.compiler.reset()
    model = tiny_transformer().to("cuda", torch.bfloat16)
    engine = flashomni.enable(model, config(policy="dense"))
    want = denoise(model, engine)
    model.compile_repeated_blocks(fullgraph=True)
    for got, wanted in zip(denoise(model, engine), want, strict=True):
        assert (got.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()
    flashomni.disable(model)
