"""Caches in e4m3 and a history in the host's memory: what the engine makes of them."""

from __future__ import annotations

import pytest
import reference
import torch
from graph_stand_in import StandIn
from inputs import poison
from test_engine import WIDTH, Toy, config, inputs
from test_engine_device import BySign, GraphedToy, device_decides, twins  # noqa: F401
from torch import nn

from flashomni import ops
from flashomni.engine import layer
from flashomni.engine.buffers import Buffers
from flashomni.engine.kept import Kept, Traffic, differences, update
from flashomni.policies import RandomPolicy

FP8, HOST = {"cache_dtype": "float8_e4m3"}, {"history": "host"}
KINDS = [FP8, HOST, FP8 | HOST]


def alike(first: Toy, kind: type[Toy] = Toy, **changes) -> Toy:
    """A toy of the same weights."""
    second = kind(config(**changes), first.engine.policy, layers=first.layers)
    second.q, second.k, second.v, second.out = first.q, first.k, first.v, first.out
    return second


class Wrapped(nn.Linear):
    """No plain linear layer: O itself is forecast."""


class Rounded(Kept):
    """What e4m3 means, by torch's own rounding: the step that writes sees it as it is, others rounded."""

    def __init__(self, *args, fp8, traffic):
        super().__init__(*args)
        self.stored = self.parts[0].clone()

    def arrived(self) -> list[torch.Tensor]:
        self.parts[0].copy_(self.stored)
        return self.parts

    def written(self) -> None:
        runs = []
        for run in self.parts[0].split(128, -1):
            largest = run.abs().amax(-1, keepdim=True)
            inverse = torch.where(largest > 0, 448 / largest, 0.0)
            runs.append((run * inverse).to(torch.float8_e4m3fn).float() * (largest / 448))
        self.stored = torch.cat(runs, -1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_e4m3_rounds_what_is_kept_and_nothing_else(order: int, monkeypatch) -> None:
    first = Toy(config(max_order=order), RandomPolicy(0.3, 0.5), layers=2)
    fp8, rounded = alike(first, max_order=order, **FP8), alike(first, max_order=order)
    steps = inputs(14)
    got = fp8.run(steps)
    monkeypatch.setattr(layer, "Kept", Rounded)
    for t, (a, b) in enumerate(zip(got, rounded.run(steps), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, t=t: f"step {t}: {m}")
    monkeypatch.undo()
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, first.run(steps), strict=True)]
    kinds = [plan.kind for plan in fp8.engine.plans]
    assert all((error == 0) == (kind != "dispatch") for error, kind in zip(errors, kinds, strict=True))


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("fp8", [False, True])
def test_an_update_keeps_the_differences(fp8: bool, where: str) -> None:
    """Bit by bit the same whether the differences are asked for or not, as float32 rounds none of them."""
    buffers = [Buffers(), Buffers()]
    traffic = Traffic() if where == "host" else None
    like = torch.empty(2, 50, 300)
    first, second = (
        [Kept(f"kept {i}", tuple(like.shape), like, own, fp8=fp8, traffic=traffic) for i in range(3)]
        for own in buffers
    )
    for step in range(4):
        feature, valid = torch.randn(like.shape), min(step, 2)
        for one in (*first, *second):
            one.prefetch()
        update(first[: valid + 1], feature, gap=3, valid=valid)
        tensors = differences(second[: valid + 1], feature, gap=3, valid=valid)
        assert torch.equal(tensors[0], feature)
        for a, b in zip(first, second, strict=True):
            for part, wanted in zip(a.parts, b.parts, strict=True):
                assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    assert bool(list(buffers[0].tensors())) == (where == "host")


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_differences_are_of_what_was_kept(fp8: bool, order: int, where: str, monkeypatch) -> None:
    """Against float64, as they are before e4m3; at order 1, as at any without e4m3, it takes one kernel."""
    calls = []
    for name in ("taylor_update", "taylor_forecast", "quantize_fp8"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, n=name, f=real, **options: (calls.append(n), f(*args, **options))[1]
        )
    buffers, like = Buffers(), torch.empty(2, 50, 300)
    traffic = Traffic() if where == "host" else None
    history = [
        Kept(f"kept {i}", tuple(like.shape), like, buffers, fp8=fp8, traffic=traffic) for i in range(order)
    ]
    for step in range(order + 3):
        feature, valid = torch.randn(like.shape), min(step, order)
        kept = history[: valid + 1]
        for one in kept:
            one.prefetch()
        old = [one.read().clone() for one in kept[:valid]]
        last = poison(*like.shape, dtype=like.dtype) if valid == order else None
        calls.clear()
        found = differences(kept, feature, gap=3, valid=valid, last=last)
        assert calls == ["taylor_update"] * (len(kept) if fp8 else 1)
        expected = reference.taylor_update(feature, [*old, feature], 3, valid)[: valid + 1]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fp8", [False, True])
def test_an_update_keeps_the_same_wherever_it_lies(fp8: bool) -> None:
    """In a type that rounds what goes through scratch."""
    like, buffers = torch.empty(2, 50, 300, dtype=torch.bfloat16), Buffers()
    here, there = (
        [Kept(f"{traffic} {i}", tuple(like.shape), like, buffers, fp8=fp8, traffic=traffic) for i in range(3)]
        for traffic in (None, Traffic())
    )
    for step in range(4):
        feature = torch.randn(like.shape).bfloat16()
        for kept in (here, there):
            for one in kept:
                one.prefetch()
            update(kept, feature, gap=3, valid=min(step, 2))
        for a, b in zip(here, there, strict=True):
            for part, wanted in zip(a.parts, b.parts, strict=True):
                assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kept", [{}, FP8], ids=["as it is", "e4m3"])
def test_a_history_on_the_host_changes_no_bit(order: int, kept: dict) -> None:
    first = Toy(config(max_order=order, **kept), RandomPolicy(0.3, 0.5), layers=2)
    second = alike(first, max_order=order, **kept, **HOST)
    for steps in (inputs(14), inputs(11, tokens=200)):
        for a, b in zip(first.run(steps), second.run(steps), strict=True):
            assert torch.equal(a, b)
    held = second.engine.bytes_held()
    assert held["history"] == 0 and held["host_history"] == first.engine.bytes_held()["history"] > 0


@pytest.mark.parametrize("kept", KINDS, ids=str)
def test_a_forecast_of_o_itself(kept: dict) -> None:
    """Every Dispatch reads the history then: it stays on the device. Modules may change between runs."""
    plain, other = Toy(config(max_order=1), RandomPolicy(0.3, 0.5)), Wrapped(WIDTH, WIDTH)
    toy = alike(plain, max_order=1, **kept)
    for out in (other, plain.out, other):
        plain.out = toy.out = out
        steps = inputs(8)
        for a, b in zip(toy.run(steps), plain.run(steps), strict=True):
            if kept is HOST:
                assert torch.equal(a, b)
            else:
                assert float((a - b).norm()) < 0.1 * float(b.norm())
        held = toy.engine.bytes_held()
        if out is other:
            assert held["host_history"] == 0 and held["history"] > 0


@pytest.mark.parametrize("kept", KINDS, ids=str)
def test_dispatch_ignores_what_scratch_holds(kept: dict) -> None:
    toy = Toy(config(max_order=2, **kept), RandomPolicy(0.3, 0.5), layers=2)
    toy.engine.begin(12)
    for x in inputs(12):
        for tensor in toy.engine.buffers.tensors():
            tensor.view(torch.uint8).fill_(0x7F) if tensor.itemsize == 1 else tensor.fill_(float("nan"))
        assert toy.attend(x).isfinite().all()
        toy.engine.step()


@pytest.mark.parametrize("kept", KINDS, ids=str)
def test_replayed_steps_are_the_steps_themselves(kept: dict, monkeypatch, device_decides) -> None:  # noqa: F811
    plain, graphed = twins(BySign, GraphedToy, max_order=1, **kept)
    graphed.engine.graph_steps(graphed.out)
    runs = [inputs(12), inputs(9)]
    want = [plain.run(steps) for steps in runs]
    stand_in = StandIn(monkeypatch, graphed.engine)
    for steps, outputs in zip(runs, want, strict=True):
        for a, b in zip(graphed.run(steps), outputs, strict=True):
            assert torch.equal(a, b)
    assert stand_in.replays >= 8
