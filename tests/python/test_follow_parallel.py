"""Config(mlp="follow") in parallel blocks: the projection of attention and MLP is forecast by rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import test_family_chroma as chroma
import test_family_flux2 as flux2
import test_family_hunyuan_video as hunyuan
import torch
from family_checks import (
    ROUNDING,
    check_forecast_rows,
    check_rows_left_out,
    config,
    denoise,
    error,
    lively,
)
from flux_models import draw as draw_flux
from flux_models import tiny_pipeline
from graph_stand_in import StandIn
from test_family_flux_kin import ids, ovis
from test_follow import OddRows
from torch import nn
from torch._dynamo.utils import counters

import flashomni


def ovis_pipeline() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(transformer=lively(ovis()))


def draw_ovis(pipe: SimpleNamespace, steps: int) -> torch.Tensor:
    """Without a pipeline: 12 x 16 tokens with 20 of text."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 20, 32, generator=generator),
        "img_ids": ids(16, 3, first=1),
        "txt_ids": torch.zeros(20, 3),
    }
    x = torch.randn(2, 192, 4, generator=generator)
    return denoise(pipe.transformer, x, inputs, steps, getattr(pipe, "engine", None))[-1]


def enable(pipe, settings: flashomni.Config, **options):
    """Of a pipeline, or of the model alone, whose clock the engine then is."""
    if not isinstance(pipe, SimpleNamespace):
        return flashomni.enable(pipe, settings, **options)
    pipe.engine = flashomni.enable(pipe.transformer, settings, **options)
    return pipe.engine


def model_of(pipe):
    return pipe.transformer if isinstance(pipe, SimpleNamespace) else pipe


# (pipeline, draw, (image tokens, text tokens, batch, passes a step))
MODELS = {
    "text first": (tiny_pipeline, draw_flux, (323, 16, 1, 1)),
    "padded": (hunyuan.pipeline, partial(hunyuan.draw, valid=(13, 6)), (168, 13, 2, 1)),
    "two passes": (chroma.pipeline, partial(chroma.draw, valid=7), (224, 7, 1, 2)),
    "gated": (ovis_pipeline, draw_ovis, (192, 20, 2, 1)),
    "one product": (flux2.pipeline, flux2.draw, (224, 20, 1, 1)),
}


@contextmanager
def projected(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What `module` gives meanwhile, in float64."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, given, out: found.append(out.double()))
    yield found
    hook.remove()


def watch(engine, block: nn.Module) -> list[tuple]:
    """(plan, what the block's own code projects, what ours does) of each call to come, in its first pass."""
    steps: list[tuple] = []
    if hasattr(block, "proj_out"):
        ours = block.forward
        branches = ours._branches

        def forward(*args, **kwargs):
            with projected(block.proj_out) as exact:
                type(block).forward(block, *args, **kwargs)
            ours._branches = lambda *given: note(exact[0], branches(*given))
            return ours(*args, **kwargs)

        block.forward = forward
    else:  # the attention does it all

        def after(attention, args, kwargs, out):
            exact = attention.processor.original(attention, *args, **kwargs)
            note(exact.double(), out)

        block.attn.register_forward_hook(after, with_kwargs=True)

    def note(exact: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if engine.context == engine.contexts.names()[0]:
            steps.append((engine.plan, exact, out.double()))
        return out

    return steps


def active_rows(engine, tokens: int) -> torch.Tensor:
    """bool [B, tokens, 1], of the first parallel block in the first pass of a step."""
    cache, _ = engine.contexts.get(engine.contexts.names()[0], 1).symbols.masks()
    block = engine.config.block_q
    active = cache.any(1)[:, torch.arange(tokens, device=cache.device) // block].unsqueeze(-1)
    assert 0 < int(active.sum()) < active.numel()
    return active


@pytest.mark.parametrize("name", MODELS)
def test_with_all_rows_active_it_is_dense(name: str) -> None:
    make, draw, _ = MODELS[name]
    pipe = make()
    want = draw(pipe, 8)
    enable(pipe, config(policy="dense", mlp="follow", strict=True))
    assert error(draw(pipe, 8), want) < ROUNDING


@pytest.mark.parametrize(
    "name, order, kept",
    [(name, order, {}) for name in MODELS for order in (0, 1, 2)]
    + [("padded", 1, {"history": "host"}), ("one product", 2, {"history": "host"})]
    + [(name, 1, {"cache_dtype": "float8_e4m3"}) for name in ("text first", "one product")],
    ids=str,
)
def test_cached_rows_are_forecast_and_others_computed(name: str, order: int, kept: dict) -> None:
    make, draw, _ = MODELS[name]
    pipe = make()
    settings = config(disable_cache_before_step=3, max_order=order, mlp="follow", **kept)
    engine = enable(pipe, settings, policy=OddRows(whole=True))
    steps = watch(engine, pipe.transformer.single_transformer_blocks[0])
    draw(pipe, 11)
    active = active_rows(engine, steps[0][1].shape[1])
    check_forecast_rows(steps, active, order, 0.1 if "cache_dtype" in kept else 1e-5)


@pytest.mark.parametrize("kept", [{}, {"cache_dtype": "float8_e4m3"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_computed_are_not_forecast(name: str, kept: dict, monkeypatch) -> None:
    """Nor are the projection's caches in e4m3 read in rows that are."""
    make, draw, _ = MODELS[name]
    pipe = make()

    def run() -> torch.Tensor:
        enable(pipe, config(mlp="follow", **kept), policy=OddRows())
        latents = draw(pipe, 9)
        flashomni.disable(model_of(pipe))
        return latents

    check_rows_left_out(monkeypatch, run)


def test_rows_that_are_forecast_are_not_multiplied() -> None:
    pipe = tiny_pipeline()
    engine = flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    forward, seen = pipe.transformer.single_transformer_blocks[0].forward, []
    mlp = forward._mlp

    def watched(x: torch.Tensor, rows) -> torch.Tensor:
        engine.buffers.take("past", (*x.shape[:2], 512), x).fill_(float("nan"))
        out = mlp(x, rows)
        seen.append((engine.plan.kind, out.isnan().all(-1, keepdim=True)))
        assert out.isnan().any(-1, keepdim=True).equal(seen[-1][1])
        return out

    forward._mlp = watched
    assert draw_flux(pipe, 8).isfinite().all()
    active = active_rows(engine, 339)
    for kind, missing in seen:
        assert torch.equal(missing, ~active) if kind == "dispatch" else not missing.any()
    assert [kind for kind, _ in seen].count("dispatch") == 3


def test_an_update_caches_nothing_of_rows_that_follow() -> None:
    pipe = tiny_pipeline()
    engine = flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    draw_flux(pipe, 8)
    state = engine.contexts.get(engine.contexts.names()[0], 1)
    active = active_rows(engine, 339).squeeze(-1)
    for kept in state.cached[0]:
        (product,) = kept.parts
        assert not product[~active].any()  # as it was made
    assert state.cached[0][0].parts[0][active].any(-1).all()


def test_an_update_that_fails_after_its_attention_leaves_dense_steps(monkeypatch) -> None:
    """What rows that follow would need was not kept, so that there is nothing to dispatch from."""
    module, steps = sys.modules["flashomni.engine.follow"], []
    record, settings = module._record, config(mlp="follow", disable_cache_before_step=3)
    model = lively(ovis())
    engine = flashomni.enable(model, settings, policy=OddRows(whole=True))

    def fail_at_updates(engine, *arguments) -> None:
        if engine.plan.kind == "update":
            raise MemoryError
        record(engine, *arguments)

    monkeypatch.setattr(module, "_record", fail_at_updates)
    generator = torch.Generator().manual_seed(2)
    inputs = {"img_ids": ids(16, 3, first=1), "txt_ids": torch.zeros(20, 3), "timestep": torch.ones(1)}
    inputs["encoder_hidden_states"] = torch.randn(1, 20, 32, generator=generator)
    x = torch.randn(1, 192, 4, generator=generator)
    engine.begin(8)
    with torch.no_grad():
        for _ in range(8):
            try:
                out = model(hidden_states=x, return_dict=False, **inputs)[0]
            except MemoryError:
                assert engine.plan.kind == "update"
            else:
                steps.append(engine.plan.kind)
                assert out.isfinite().all()
                if engine.plan.kind == "dispatch":
                    with flashomni.disabled(model):
                        exact = model(hidden_states=x, return_dict=False, **inputs)[0]
                    torch.testing.assert_close(out, exact, rtol=2e-5, atol=2e-5)
                    break
            engine.step()
    assert steps[-1] == "dispatch" and "update" not in steps


@pytest.mark.parametrize("kept", [{}, {"cache_dtype": "float8_e4m3"}, {"history": "host"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_memory(name: str, kept: dict) -> None:
    make, draw, (image, text, batch, contexts) = MODELS[name]
    pipe, settings = make(), config(policy="drift", mlp="follow", **kept)
    shape = {"image_tokens": image, "text_tokens": text, "batch": batch, "contexts": contexts}
    said = flashomni.memory(settings, model_of(pipe), **shape)
    enable(pipe, settings)
    draw(pipe, 9)
    assert said.by_kind == flashomni.stats(model_of(pipe)).bytes_held
    assert said.total > flashomni.memory(config(policy="drift", **kept), model_of(pipe), **shape).total
    pipe.transformer.to("meta")
    assert flashomni.memory(settings, model_of(pipe), **shape) == said


@pytest.mark.parametrize("name", ["text first", "padded", "one product"])
def test_replayed_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, draw, _ = MODELS[name]
    pipe = make()
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    want = draw(pipe, 11)
    assert torch.equal(draw(pipe, 11), want)
    flashomni.disable(pipe)
    stand_in = StandIn(
        monkeypatch, flashomni.enable(pipe, config(mlp="follow", cuda_graphs=True), policy=OddRows())
    )
    for _ in range(2):
        assert torch.equal(draw(pipe, 11), want)
    assert stand_in.replays > stand_in.captures > 2


@pytest.mark.parametrize("name", ["text first", "padded", "one product"])
def test_compiled_blocks(name: str) -> None:
    torch.compiler.reset()
    make, draw, _ = MODELS[name]
    pipe = make()
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    want = draw(pipe, 8)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(draw(pipe, 8), want)
    made = counters["stats"]["unique_graphs"]
    assert torch.equal(draw(pipe, 8), want) and counters["stats"]["unique_graphs"] == made
    torch.compiler.reset()


class Wrapped(nn.Linear):
    """Stands for LoRA and quantized layers."""


@pytest.mark.parametrize("name, out", [("text first", "proj_out"), ("one product", "attn.to_out")])
def test_where_o_is_kept_the_mlp_stays_dense(name: str, out: str) -> None:
    make, draw, (image, text, _, _) = MODELS[name]
    pipe = make()
    for block in pipe.transformer.single_transformer_blocks:
        block.get_submodule(out).__class__ = Wrapped
    settings = config(mlp="follow")
    answer = flashomni.explain(pipe, settings)
    double = "follow" if name == "text first" else "dense"
    assert [row.mlp for row in answer.rows] == [double, "dense", "dense"]
    assert "O is forecast instead of its projection" in str(answer)
    said = flashomni.memory(settings, pipe, image_tokens=image, text_tokens=text)
    engine = flashomni.enable(pipe, settings, policy=OddRows(whole=True))
    block, asked = pipe.transformer.single_transformer_blocks[0], []
    ours = block.forward if name == "text first" else block.attn.processor
    mlp = ours._mlp

    def watched(*given) -> torch.Tensor:
        asked.append(given[-1])
        return mlp(*given)

    ours._mlp = watched
    draw(pipe, 11)
    assert asked == [None] * 11, "for all rows"
    assert said.by_kind == engine.bytes_held()


def test_an_mlp_that_is_called_as_a_module_follows() -> None:
    pipe = tiny_pipeline()
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    want = draw_flux(pipe, 8)
    flashomni.disable(pipe)
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_mlp.__class__ = Wrapped
    assert [row.mlp for row in flashomni.explain(pipe, config(mlp="follow")).rows] == ["follow"] * 3
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    assert error(draw_flux(pipe, 8), want) < ROUNDING


def test_layers_left_dense_and_runs_of_other_shapes_need_nothing() -> None:
    pipe = tiny_pipeline()
    engine = flashomni.enable(pipe, config(mlp="follow", dense_layers=(1,)), policy=OddRows())
    want = draw_flux(pipe, 8), draw_flux(pipe, 5, batch=2, guided=True)
    for name in engine.contexts.names():
        kept = [engine.contexts.get(name, layer).followed["output"].kept for layer in (1, 2)]
        assert [len(each) for each in kept] == [0, 2]
    assert torch.equal(draw_flux(pipe, 8), want[0])
    assert torch.equal(draw_flux(pipe, 5, batch=2, guided=True), want[1])


def test_explain() -> None:
    pipe = tiny_pipeline()
    answer = flashomni.explain(pipe, config(mlp="follow"))
    assert [row.mlp for row in answer.rows] == ["follow"] * 3
    assert "rows cached in all heads are forecast in 3 of 3 layers" in str(answer)
    answer = flashomni.explain(flux2.pipeline(), config(mlp="follow"))
    assert [row.mlp for row in answer.rows] == ["dense", "follow", "follow"]
