"""The end-to-end benchmark: levels are what they say, samples stand for runs, every model runs in small."""

from __future__ import annotations

import functools
import importlib
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_stand_in import StandIn
from torch import nn

import flashomni
from flashomni import schedule
from flashomni.bench import classes, dense, e2e_model, harness, levels, models
from flashomni.config import Config
from flashomni.diffusers.families import FAMILIES
from flashomni.policies import Choice, Layout, Segment, Stats, Step
from flashomni.symbols import SparseSymbols

CONFIG = Config(cache_interval=3, disable_cache_before_step=2, tau_q=0.5, block_q=64, block_kv=64)
SERVED = [name for name, model in models.MODELS.items() if model.cls in FAMILIES]
APART = [name for name in models.MODELS if name != "flux-kontext"]  # it is FLUX with more tokens


@functools.cache
def built(name: str) -> tuple[nn.Module, dense.Call]:
    model = models.model_of(name)
    transformer = models.build(model, "cpu", torch.float32, tiny=True)
    inputs = models.make_inputs(model, transformer, model.tiny_size, 32)
    return transformer, lambda time: transformer(**inputs(time))[0]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tiles", [None, 0.6])
@pytest.mark.parametrize("text,given", [((0, 500), 0), ((3200, 256), 0), ((0, 0), 0), ((0, 260), 500)])
def test_a_level_has_its_density(text, given, tiles, whole):
    tokens = 3500
    start, length = text
    segments = (Segment("image", 0, start), Segment("text", start, length))
    segments += (Segment("image", start + length, tokens - start - length - given),)
    segments += (Segment("condition", tokens - given, given),)
    layout = Layout(1, 3, 64, tokens, tuple(s for s in segments if s.length))
    symbols = SparseSymbols.ones(1, 3, tokens, tokens, 128, 128)
    means = torch.randn(1, symbols.q_blocks, 3, 64), torch.randn(1, symbols.kv_blocks, 3, 64)
    policy = levels.LevelPolicy(0.4, tiles, rows=whole)
    policy.select(Step(4, 10, 0.5, "cond", 2, 5), layout, Stats(*means), {}, Choice(symbols))
    cache, skip = symbols.masks()
    counted = float((cache.unsqueeze(-1) & skip).double().mean())
    assert counted == pytest.approx(0.4, abs=0.03)  # whole blocks of 28
    if tiles is not None:
        assert float(cache.double().mean()) == pytest.approx(tiles, abs=0.03)
    rows = [i for i in range(28) if text[0] < (i + 1) * 128 and i * 128 < sum(text)]
    rows += [i for i in range(28) if (i + 1) * 128 > tokens - given] if given else []
    assert cache[:, :, rows].all() and skip[:, :, rows].all() and skip[..., rows].all()
    assert (cache.sum(-1) == cache.sum(-1)[0, 0]).all(), "as many tiles in every head"
    assert whole == bool((cache == cache[:, :1]).all()), "the same only where rows are cached as wholes"
    before = symbols.cache.clone(), symbols.skip.clone()
    policy.select(Step(7, 10, 0.7, "cond", 2, 5), layout, Stats(*means), {}, Choice(symbols))
    assert torch.equal(symbols.cache, before[0]) and torch.equal(symbols.skip, before[1])


def run_tiny(**changes):
    """A whole model's bench at the size of a test, on the CPU."""
    small = {"device": "cpu", "dtype": torch.float32, "tiny": True, "say": lambda text: None}
    return e2e_model.run(**(small | changes))


def test_levels_that_cannot_be_are_refused():
    plans = schedule.plan(20, CONFIG)
    dispatches = sum(plan.kind == "dispatch" for plan in plans)
    density = levels.dispatch_density(0.3, plans)
    assert (20 - dispatches + dispatches * density) / 20 == pytest.approx(0.7)
    with pytest.raises(ValueError, match="sparsity: expected from 0 to less than"):
        levels.dispatch_density(0.9, plans)
    with pytest.raises(ValueError, match="sparsity: expected"):
        levels.dispatch_density(0.1, schedule.plan(2, CONFIG))
    with pytest.raises(ValueError, match="density: expected at least 0.250"):
        levels.image_shares(0.2, 8, 8, 2, 2)
    with pytest.raises(ValueError, match="density: expected more than 0 and at most 1, got 1.5"):
        levels.LevelPolicy(1.5)
    with pytest.raises(ValueError, match="tiles: expected"):
        levels.image_shares(0.5, 8, 8, 0, 0, tiles=0.25)


@pytest.mark.parametrize("order,warm_up", [(0, 2), (1, 0), (1, 4), (2, 4)])
def test_a_sample_has_a_step_for_every_step(order, warm_up):
    config = Config(cache_interval=4, max_order=order, disable_cache_before_step=warm_up)
    plans = schedule.plan(24, config)
    for each_window, whole in ((False, False), (True, False), (False, True)):
        sample = levels.Sample(plans, order, each_window, whole)
        measured = sample.measured()
        assert {sample.keys[i] for i in measured} == set(sample.keys)
        for key, plan in zip(sample.keys, plans, strict=True):
            of_key = [plans[i] for i in measured if sample.keys[i] == key]
            assert all(p.kind == plan.kind and p.record == plan.record for p in of_key)
        updates = [i for i in measured if plans[i].kind == "update"]
        assert all(i - plans[i].since_update in updates for i in measured if plans[i].kind == "dispatch")
        assert whole == (len(measured) == 24) and len(sample.shortest()) <= len(measured)
    distances = {plans[i].since_update for i in levels.Sample(plans, order).measured()}
    assert distances == {0, 1, 2, 3}
    windows = sum(plan.kind == "update" for plan in plans)
    assert len({k for k in levels.Sample(plans, order, True).keys if k[0] == "update"}) == windows


@pytest.mark.parametrize("name", APART)
def test_dense_bars_leave_the_model_as_it_was(name):
    model, (transformer, call) = models.model_of(name), built(name)
    want = call(0.5)
    with dense.without_masks(transformer, model.mask_argument):
        torch.testing.assert_close(call(0.5), want)  # all of the text is valid: no mask is the same
    measured = dense.Dense(transformer, call, model.mask_argument, count=2)
    eager = measured.eager(model.image_tokens(model.tiny_size))
    assert len(eager.steps) == 2 and min(eager.steps) > 0
    if name == "hunyuanvideo":  # blocks of two kinds, with hooks; the others cost seconds and say no more
        assert min(measured.compiled("eager").steps) > 0
    assert {"attention", "gemm_q", "gemm_kv", "gemm_o", "mlp", "norm_rope"} <= set(eager.classes)
    sparse = classes.sparse_work(eager.classes, transformer)
    assert 0 < sum(sparse.values()) < sum(eager.classes.values())
    assert torch.equal(call(0.5), want)
    for module in transformer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert module._compiled_call_impl is None


def test_published_sizes():
    sizes = {name: model.tokens(model.size, model.text) for name, model in models.MODELS.items()}
    assert sizes == {
        "flux-dev": 512 + 4096,
        "flux-kontext": 512 + 2 * 4096,
        "hunyuanvideo": 33 * 25 * 40 + 256,
        "wan-14b": 21 * 30 * 52,
        "qwen-image": 512 + 83 * 83,
    }
    import diffusers

    parameters = {}
    for name, model in models.MODELS.items():
        with torch.device("meta"):
            transformer = getattr(diffusers, model.cls)(**model.config)
        parameters[name] = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert {name: round(count, 1) for name, count in parameters.items()} == {
        "flux-dev": 11.9,
        "flux-kontext": 11.9,
        "hunyuanvideo": 12.8,
        "wan-14b": 14.3,
        "qwen-image": 20.4,
    }


def check_rows(rows: list[dict], levels_wanted: set[str], steps: int) -> None:
    runs = {(r["case"]["arm"], r["case"]["level"]): r for r in rows if r["case"]["what"] == "run"}
    assert {level for _, level in runs} == levels_wanted | {"dense"}
    for (arm, level), found in runs.items():
        assert math.isclose(found["ratio"], found["baseline"]["ms"] / found["ms"])
        if level == "dense":
            continue
        assert found["bound"] >= 1 and found["share_of_bound"] == pytest.approx(
            found["ratio"] / found["bound"]
        )
        assert 0 < found["density"] <= found["tiles"] <= 1
        kinds = {
            r["case"]["what"]: r["ms"]
            for r in rows
            if r["case"]["arm"] == arm and r["case"]["level"] == level and r["case"]["what"] != "run"
        }
        plans = schedule.plan(steps, CONFIG)
        assert found["ms"] == pytest.approx(sum(kinds[f"{plan.kind} step"] for plan in plans))
        if arm == next(name for name, of in runs if of == level and "graphs" not in name):
            assert {"attention", "gemm_q", "gemm_o", "rest"} <= set(found["classes"]["dispatch"])
            assert "select" in found["classes"]["update"]
        else:
            assert not found["classes"]
    assert json.loads(json.dumps(harness.record(rows)))["benchmarks"]
    from rich.console import Console

    screen = Console(width=100, record=True, quiet=True)
    for table in e2e_model.tables(rows):
        screen.print(table)
    assert "…" not in screen.export_text()


@pytest.mark.parametrize("name", [name for name in SERVED if name in APART])
def test_a_model_end_to_end(name):
    said = []
    rows = run_tiny(
        model=name,
        config=CONFIG,
        steps=14,
        sparsity=(0.2,),
        density=(0.4,),
        arms=("eager", "graphs"),
        dense_compiled=False,
        rounds=1,
        say=said.append,
    )
    check_rows(rows, {"20% sparse", "density 0.4", "as chosen"}, 14)
    assert "not measured: graphs: no GPU" in said
    runs = {r["case"]["level"]: r for r in rows if r["case"]["what"] == "run"}
    assert runs["20% sparse"]["density"] == pytest.approx(0.8, abs=0.06)  # whole blocks of 5
    assert runs["density 0.4"]["density"] < runs["20% sparse"]["density"]


@pytest.mark.parametrize("name", ["flux-dev", "hunyuanvideo", "wan-14b"])
def test_compiled_arms(name):
    """No eager arm is needed: classes are of the first that there is."""
    torch.compiler.reset()
    said = []
    rows = run_tiny(
        model=name,
        config=replace(CONFIG, policy="drift") if name == "wan-14b" else CONFIG,
        steps=14,
        sparsity=(0.2,),
        follow=True,
        chosen=name == "wan-14b",
        arms=("compiled", "compiled graphs"),
        backend="eager",
        rounds=1,
        say=said.append,
    )
    wanted = {"20% sparse", "20% sparse, rows follow"}
    check_rows(rows, wanted | ({"as chosen"} if name == "wan-14b" else set()), 14)
    assert rows[0]["not_measured"] == {"compiled graphs": "no GPU"}
    runs = {r["case"]["level"]: r for r in rows if r["case"]["what"] == "run"}
    assert {r["case"]["arm"] for r in rows} == {
        "dense eager sdpa",
        "dense compiled sdpa",
        "flashomni compiled",
    }
    plain, follows = (runs[level] for level in sorted(wanted))
    assert plain["density"] == follows["density"] and plain["tiles"] == follows["tiles"] < 1
    assert follows["bound"] > plain["bound"] > 1
    assert follows["held_gib"] > plain["held_gib"], "what feed-forwards gave is kept"
    if name == "wan-14b":
        assert runs["as chosen"]["tiles"] < 1, "without text, what changes least is cached"


def test_compilers_that_fail_lose_no_other_arm():
    def fail(graph, inputs):
        raise RuntimeError("no such compiler")

    rows = run_tiny(
        model="flux-dev",
        config=CONFIG,
        steps=8,
        sparsity=(),
        density=(0.6,),
        chosen=False,
        arms=("eager", "compiled"),
        backend=fail,
        rounds=1,
    )
    assert set(rows[0]["not_measured"]) == {"dense compiled", "compiled, density 0.6"}
    assert all("no such compiler" in reason for reason in rows[0]["not_measured"].values())
    assert {r["case"]["arm"] for r in rows} == {"dense eager sdpa", "flashomni eager"}


def test_nothing_is_left_of_compilation():
    transformer, call = built("hunyuanvideo")
    want = call(0.5)
    with dense.compiled(transformer, "eager"):
        flashomni.enable(transformer, CONFIG, policy=levels.LevelPolicy(0.5)).begin(14)
        call(0.5)
        flashomni.disable(transformer)
    assert all(module._compiled_call_impl is None for module in transformer.modules())
    before = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert torch.equal(call(0.5), want)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == before


def test_a_whole_run_measures_every_step(monkeypatch):
    rows = run_tiny(
        model="flux-dev",
        config=CONFIG,
        steps=9,
        sparsity=(),
        density=(0.6,),
        chosen=False,
        arms=("eager",),
        dense_compiled=False,
        rounds=1,
        whole=True,
    )
    check_rows(rows, {"density 0.6"}, 9)
    (ours,) = [r for r in rows if r["case"]["what"] == "run" and r["case"]["level"] != "dense"]
    assert not ours["composed"] and len(ours["by_key"]) == 9
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    lines = importlib.import_module("gpu_page").end_to_end_lines(json.loads(json.dumps(rows)))
    table = [line.split("|") for line in lines if line.startswith("|")]
    assert len(table) == 4 and len({len(cells) for cells in table}) == 1
    assert table[3][2].strip() == "density 0.6" and table[3][4].strip() == f"{ours['ratio']:.2f}"


@pytest.mark.parametrize("compiled", [False, True])
def test_measured_steps_of_the_graphs_arm_are_all_replayed(monkeypatch, compiled):
    model = models.model_of("flux-dev")
    here = e2e_model.Run("flux-dev", model.tiny_size, 32, "cpu", torch.float32, True)
    stand_ins, enable = [], flashomni.enable

    def enable_with_stand_in(*arguments, **options):
        stand_ins.append(StandIn(monkeypatch, enable(*arguments, **options)))
        return stand_ins[0].engine

    monkeypatch.setattr(flashomni, "enable", enable_with_stand_in)
    level, plans = e2e_model.Level("", levels.LevelPolicy(0.5)), schedule.plan(14, CONFIG)
    blocks = dense.compiled(here.transformer, "eager") if compiled else nullcontext()
    arm = "compiled graphs" if compiled else "graphs"
    with blocks:
        ours = e2e_model._measure(here, CONFIG, level, arm, plans, 1, False, False)
    (stand_in,) = stand_ins
    sample = levels.Sample(plans, CONFIG.max_order)
    assert stand_in.captures == 5  # Full with and without history, two Updates, Dispatch
    # All that is measured and the warm-up's last run; the run before captures its second Dispatch step.
    assert stand_in.replays == len(sample.measured()) + len(sample.shortest()) + 1
    assert not ours.notes and 0.4 < min(ours.density) < 0.6


def test_composed_density_is_that_of_a_whole_run():
    transformer, call = built("flux-dev")
    engine = flashomni.enable(transformer, CONFIG, policy=levels.LevelPolicy(0.6))
    try:
        plans = schedule.plan(14, CONFIG)
        engine.begin(14)
        for i in range(14):
            call(1 - i / 14)
            engine.step()
        whole = flashomni.stats(transformer)
        shares = [e2e_model._shares(engine, i) for i in range(14)]
        assert whole.density == pytest.approx(sum(d for d, _ in shares) / 14)
        assert whole.cache_density == pytest.approx(sum(t for _, t in shares) / 14)
        sample = levels.Sample(plans, CONFIG.max_order)
        for i, key in enumerate(sample.keys):
            first = sample.keys.index(key)
            assert shares[i] == pytest.approx(shares[first])
    finally:
        flashomni.disable(transformer)


@pytest.mark.skipif(len(SERVED) == len(models.MODELS), reason="every model is served")
def test_a_model_that_is_not_served_says_so():
    name = next(name for name in models.MODELS if name not in SERVED)
    with pytest.raises(NotImplementedError, match="transformer: expected one of"):
        e2e_model.run(
            model=name,
            config=CONFIG,
            steps=14,
            device="cpu",
            dtype=torch.float32,
            tiny=True,
            say=lambda text: None,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", SERVED)
def test_every_arm_on_a_gpu(name):
    config = replace(CONFIG, protect_conditions=False)  # else most of tiny Kontext is always computed
    backend = (
        "inductor" if name == "flux-dev" else "aot_eager"
    )  # which takes seconds where that takes a minute
    rows = e2e_model.run(
        model=name,
        config=config,
        steps=14,
        sparsity=(0.2,),
        follow=True,
        rounds=1,
        tiny=True,
        backend=backend,
    )
    check_rows(rows, {"20% sparse", "20% sparse, rows follow", "as chosen"}, 14)
    dense_run = next(r for r in rows if r["case"]["level"] == "dense")
    assert not dense_run["not_measured"]
    assert {r["case"]["arm"] for r in rows} >= {f"flashomni {arm}" for arm in e2e_model.ARMS}
