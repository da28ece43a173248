"""What real models come with: adapters, quantized layers, offloading, other schedulers, dropped modules."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from family_checks import ROUNDING, config, error
from flux_models import draw, tiny_pipeline
from graph_stand_in import StandIn
from torch import nn

import flashomni
from flashomni.engine.graphs import StepGraphs, fingerprint
from flashomni.policies import RandomPolicy

RANDOM = RandomPolicy(0.4, 0.5)


class LowRank(nn.Module):
    """What peft makes of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a, self.b = (
            nn.Linear(base.in_features, 4, bias=False),
            nn.Linear(4, base.out_features, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def adapt(model: nn.Module, names: tuple[str, ...]) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith(names) and type(module) is nn.Linear:
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, LowRank(module))


def check_dense_then_sparse(pipe) -> None:
    """All ones give the model's own picture; random symbols another one, with attention sparse."""
    want = draw(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        flashomni.enable(pipe, config(policy="dense"))
        assert error(draw(pipe), want) < ROUNDING
        flashomni.disable(pipe)
        flashomni.enable(pipe, config(), policy=RANDOM)
    assert 1e-4 < error(draw(pipe), want) < 0.5
    assert flashomni.stats(pipe).density < 1
    flashomni.disable(pipe)


def test_low_rank_adapters() -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe)
    adapt(pipe.transformer, ("to_q", "to_out.0", "proj_out"))
    assert error(draw(pipe), plain) > 1e-3
    rows = flashomni.explain(pipe).rows
    assert {(row.attention, row.gemm_q, row.gemm_o) for row in rows} == {("sparse", "dense", "dense")}
    assert "to_q is LowRank, not torch.nn.Linear: called as a module" in rows[0].notes
    check_dense_then_sparse(pipe)


def test_what_falls_back_is_said_once() -> None:
    pipe = tiny_pipeline()
    adapt(pipe.transformer, ("to_q",))
    with pytest.warns(UserWarning, match=r"3 of 3 layers .*to_q is LowRank.*explain") as caught:
        flashomni.enable(pipe, config())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe)
    flashomni.disable(pipe)
    with pytest.raises(NotImplementedError, match="strict: .*to_q is LowRank"):
        flashomni.enable(pipe, config(strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashomni.enable(tiny_pipeline(), config())


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_out"]
        )
    )
    check_dense_then_sparse(pipe)


def test_quantized_layers() -> None:
    pipe = tiny_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
            torch.ao.quantization.quantize_dynamic(blocks, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert {row.attention for row in flashomni.explain(pipe).rows} == {"sparse"}
    want = draw(pipe)
    with pytest.warns(UserWarning, match="3 of 3 layers"):
        flashomni.enable(pipe, config(policy="dense"))
    # Activations are quantized anew at each call: rounding decides to which of 255 values.
    assert error(draw(pipe), want) < 0.02
    flashomni.disable(pipe)
    with pytest.warns(UserWarning):
        flashomni.enable(pipe, config(), policy=RANDOM)
    draw(pipe)
    assert flashomni.stats(pipe).density < 1


@pytest.mark.parametrize("before", [True, False], ids=["offloaded first", "enabled first"])
def test_offloading_of_whole_models(before: bool) -> None:
    """enable_model_cpu_offload's hook, which moves weights before each call and back when another runs."""
    from accelerate import cpu_offload_with_hook

    pipe = tiny_pipeline()
    want = draw(pipe)
    if before:
        cpu_offload_with_hook(pipe.transformer, "cpu")
    flashomni.enable(pipe, config(policy="dense"))
    if not before:
        cpu_offload_with_hook(pipe.transformer, "cpu")
    assert error(draw(pipe), want) < ROUNDING
    assert flashomni.stats(pipe).steps["dispatch"] > 0
    flashomni.disable(pipe)
    assert torch.equal(draw(pipe), want)


def test_offloading_layer_by_layer() -> None:
    """Weights are on the meta device between calls: layers are called as modules, attention stays sparse."""
    from accelerate import cpu_offload

    pipe = tiny_pipeline()
    want = draw(pipe)
    cpu_offload(pipe.transformer, "cpu")
    assert next(pipe.transformer.parameters()).device.type == "meta"
    with pytest.warns(UserWarning, match="3 of 3 layers"):
        flashomni.enable(pipe, config(policy="dense"))
    assert error(draw(pipe), want) < ROUNDING
    flashomni.disable(pipe)
    with pytest.warns(UserWarning):
        flashomni.enable(pipe, config(), policy=RANDOM)
    draw(pipe)
    assert flashomni.stats(pipe).density < 1


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_graphs_do_not_outlive_offloading(place: str) -> None:
    """Weights that are away when a run begins come back to other addresses, whatever is seen of them."""
    model = nn.Linear(4, 4).to(place)
    graphs = StepGraphs(None, model)
    graphs._graphs, graphs._used = {"a pass": SimpleNamespace(inputs=[torch.zeros(1)])}, {"a pass"}
    graphs._model_print = fingerprint(model)
    graphs.begin()
    assert bool(graphs._graphs) is (place == "cpu")


def test_graphs_of_layers_that_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import cpu_offload

    pipe = tiny_pipeline()
    want = draw(pipe)
    cpu_offload(pipe.transformer, "cpu")
    with pytest.warns(UserWarning):
        engine = flashomni.enable(pipe, config(policy="dense", cuda_graphs=True))
    stand_in = StandIn(monkeypatch, engine)
    assert error(draw(pipe), want) < ROUNDING
    assert stand_in.captures == 0
    assert "cuda_graphs: weights are offloaded layer by layer" in flashomni.stats(pipe).notes


def test_schedulers_that_call_the_model_twice_a_step() -> None:
    """Heun: 5 steps are 9 calls, each a step of the plan."""
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()

    def run() -> torch.Tensor:
        return draw(pipe, steps=5, sigmas=None, guided=True)

    # The pipeline passes sigmas, which this scheduler does not take: it sets its own.
    pipe.scheduler.set_timesteps = _without_sigmas(pipe.scheduler.set_timesteps)
    want = run()
    flashomni.enable(pipe, config(policy="dense"))
    assert error(run(), want) < ROUNDING
    stats = flashomni.stats(pipe)
    assert stats.num_steps == stats.steps_done == 9 and stats.passes == 18
    flashomni.disable(pipe)
    flashomni.enable(pipe, config(), policy=RANDOM)
    assert torch.equal(run(), run())


def _without_sigmas(set_timesteps):
    def wrapped(num_inference_steps=None, device=None, sigmas=None, mu=None, **kwargs):
        return set_timesteps(len(sigmas) if sigmas is not None else num_inference_steps, device=device)

    return wrapped
