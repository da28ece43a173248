"""What the engine does on a GPU, as far as it can be shown without one: reuse decided by tensors, steps
replayed from graphs. tests/python/test_gpu_engine.py runs the same on a GPU."""

from __future__ import annotations

import pytest
import torch
from graph_stand_in import StandIn
from test_engine import HEADS, ReuseEverything, Toy, config, inputs

from flashomni.engine import graphs
from flashomni.engine.state import Asleep, LayerState
from flashomni.policies import Policy, protect


class BySign(Policy):
    """Symbols that the queries and keys decide: other ones at each Update, the same from the same inputs."""

    needs = frozenset({"q_mean", "k_mean"})
    capturable = True

    def select(self, step, layout, stats, state, choice) -> None:
        score = torch.einsum("bihd,bjhd->bhij", stats.q_mean, stats.k_mean)
        cache, skip = score.sum(-1) > 0, score > 0
        protect(cache, skip, layout)
        choice.write(cache, skip)


class EveryOther(Policy):
    """All is reused at every second Update."""

    def select(self, step, layout, stats, state, choice) -> None:
        state["updates"] = state.get("updates", 0) + 1
        choice.symbols.cache.fill_(255 if state["updates"] % 2 == 0 else 0)
        choice.symbols.skip.fill_(255)


class GraphedToy(Toy):
    """A Toy whose passes go through the engine's graphs."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        if self.engine.graphs is None:
            return super().attend(x)
        self.engine.start_pass()
        start, end = self.engine.start_pass, self.engine.end_pass
        self.engine.start_pass = self.engine.end_pass = lambda *_: None  # once, and outside the graph
        try:
            y = self.engine.graphs.run(super().attend, (x,), {})
        finally:
            self.engine.start_pass, self.engine.end_pass = start, end
        self.engine.end_pass(True)
        return y


@pytest.fixture
def device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(state: LayerState, order: int) -> None:
        state.asleep = state.asleep or Asleep(state.summary, order)
        state.asleep.decide()

    monkeypatch.setattr(LayerState, "decide_reuse", decide)


def twins(policy: type[Policy], kind: type[Toy] = Toy, **changes) -> tuple[Toy, Toy]:
    """Two toys of the same weights."""
    first, second = Toy(config(**changes), policy(), layers=2), kind(config(**changes), policy(), layers=2)
    second.q, second.k, second.v, second.out = first.q, first.k, first.v, first.out
    return first, second


@pytest.mark.parametrize("policy", [ReuseEverything, EveryOther])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_reuse_decided_on_the_device_is_the_hosts(policy, order, monkeypatch, request):
    """Order 0 where nothing is active, decided anew at each Update."""
    host, device = twins(policy, max_order=order)
    steps = inputs(12, batch=2)
    want = host.run(steps)
    assert any(state.reuse_all for state in host.engine.contexts.states()) or policy is EveryOther
    request.getfixturevalue("device_decides")
    for a, b in zip(device.run(steps), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not any(state.reuse_all for state in device.engine.contexts.states())


def test_a_layer_that_sleeps_projects_no_keys(device_decides):
    toy = Toy(config(), ReuseEverything())
    toy.engine.begin(6)
    for x in inputs(6):
        dispatch = toy.engine.plan.kind == "dispatch"
        for tensor in toy.engine.buffers.tensors() if dispatch else ():
            tensor.fill_(float("nan"))
        assert toy.attend(x).isfinite().all()
        if dispatch:
            kept = [t for key, t in toy.engine.buffers._tensors.items() if key[0] in ("q", "k", "v")]
            assert all(t.isnan().all() for t in kept)
        toy.engine.step()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_replayed_steps_are_the_steps_themselves(order, monkeypatch, device_decides):
    plain, graphed = twins(BySign, GraphedToy, max_order=order)
    graphed.engine.graph_steps(graphed.out)
    runs = [inputs(14), inputs(14), inputs(9)]
    want = [(plain.run(steps), plain.engine.run_stats()) for steps in runs]
    stand_in = StandIn(monkeypatch, graphed.engine)
    for steps, (outputs, stats) in zip(runs, want, strict=True):
        for t, (a, b) in enumerate(zip(graphed.run(steps), outputs, strict=True)):
            assert torch.equal(a, b), f"step {t}"
        found = graphed.engine.run_stats()
        assert found.density_by_step == stats.density_by_step
        assert found.density_by_head == stats.density_by_head
        assert (found.steps, found.notes) == (stats.steps, stats.notes)
    assert stand_in.captures <= 8 and stand_in.replays >= 24
    assert len(found.density_by_head[0]) == HEADS


def test_graphs_of_another_shape_or_of_moved_weights_are_made_anew(monkeypatch, device_decides):
    plain, graphed = twins(BySign, GraphedToy)
    graphed.engine.graph_steps(graphed.out)
    stand_in = StandIn(monkeypatch, graphed.engine)
    for steps in (inputs(10), inputs(10, tokens=200), inputs(10)):
        for a, b in zip(graphed.run(steps), plain.run(steps), strict=True):
            assert torch.equal(a, b)
    graphed.out.weight = torch.nn.Parameter(graphed.out.weight.clone() * 2)
    captures = stand_in.captures
    plain.out = graphed.out
    steps = inputs(10)
    for a, b in zip(graphed.run(steps), plain.run(steps), strict=True):
        assert torch.equal(a, b)
    assert stand_in.captures > captures


def test_a_policy_that_is_not_capturable_updates_outside_graphs(monkeypatch):
    toy = GraphedToy(config(), EveryOther())
    steps = toy.engine.graph_steps(toy.out)
    toy.engine.begin(6)
    for x in inputs(3):
        toy.attend(x)  # on the CPU: as it is
        toy.engine.step()
    assert toy.engine.run_stats().notes == {"cuda_graphs: an input is not on the GPU": 3}
    toy.engine.index = 2

    class Pretends:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert steps._why_not([Pretends()]) == "policy EveryOther is not capturable"
    toy.engine.index = 3
    assert steps._why_not([Pretends()]) is None


def test_a_graph_sees_the_strides_of_its_inputs(monkeypatch, device_decides):
    """torch rounds a linear layer's bias otherwise where its input has gaps: bits depend on strides."""
    toy = GraphedToy(config(), BySign(), layers=2)
    toy.engine.graph_steps(toy.out)
    StandIn(monkeypatch, toy.engine)
    steps = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in inputs(9, batch=2)]
    assert not steps[0].is_contiguous()
    toy.run(steps)
    captured = [graph for graph in toy.engine.graphs._graphs.values() if graph is not None]
    assert captured and all(graph.inputs[0].stride() == steps[0].stride() for graph in captured)
    repeated = torch.zeros(1, 1, 8).expand(2, 3, 8)  # elements that share memory get memory each
    assert graphs._room_for(repeated).is_contiguous()
