"""Wan: self-attention without text, norms over all heads, one expert or two."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from family_checks import (
    ROUNDING,
    OddRows,
    check_cross_attention_follows,
    check_nothing_reused_is_dense,
    check_rows_left_out,
    check_sparse_runs,
    config,
    error,
    quiet,
)
from wan_models import TINY, draw, stirred

import flashomni
from flashomni import ops
from flashomni.diffusers.api import transformers_of
from flashomni.engine.state import Summary
from flashomni.policies import Choice, RandomPolicy


def transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return stirred(WanTransformer3DModel(**(TINY | changes)))


def pipeline(scheduler=None, **parts) -> WanPipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae")) | {"transformer": transformer()} | parts
    return quiet(WanPipeline(scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), **parts))


def experts(**changes) -> WanPipeline:
    """`transformer_2` takes over at half of the noise: of 12 steps, after 6."""
    return pipeline(transformer_2=transformer(1), boundary_ratio=0.5, **changes)


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_reused_is_dense(batch: int) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, batch))


def test_guidance_and_another_scheduler() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 16


def test_drift() -> None:
    """What is cached is cached in all heads; more of it with a greater tau_q; none without a difference."""
    pipe, shares = pipeline(), []
    want = draw(pipe, 8)
    for tau_q in (0.4, 0.8):
        flashomni.enable(pipe, config(policy="drift", tau_q=tau_q, tau_kv=0.0, ramp_power=0))
        assert 1e-5 < error(draw(pipe, 8), want) < 0.2
        stats = flashomni.stats(pipe)
        for symbols in stats.symbols.values():
            cache, _ = symbols.masks()
            assert torch.equal(cache.any(1), cache.all(1))
        shares.append(stats.cache_density)
        flashomni.disable(pipe)
    assert 1 > shares[0] > shares[1] > 0.3
    with pytest.raises(ValueError, match="policy 'drift': expected max_order >= 1"):
        flashomni.enable(pipe, config(policy="drift", max_order=0))


def test_rows_cached_in_some_heads_are_projected_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of an active tile needs the row's other heads: skipping their rows' GEMM-Q changes nothing."""

    def run() -> torch.Tensor:
        pipe = pipeline()
        flashomni.enable(pipe, config(), policy=RandomPolicy(0.3, 1.0, seed=1))
        return draw(pipe, 6)

    skipped = []
    measure = Summary.measure

    def watched(summary: Summary) -> None:
        measure(summary)
        skipped.append(not bool(summary.rows.masks()[0].all()))

    def all_rows(summary: Summary) -> None:
        measure(summary)
        summary.rows.cache.fill_(255)

    monkeypatch.setattr(Summary, "measure", watched)
    got = run()
    assert any(skipped)
    monkeypatch.setattr(Summary, "measure", all_rows)
    assert error(got, run()) < 1e-6


def test_the_papers_policy_skips_and_caches_nothing() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config(tau_kv=0.5, ramp_power=0))
    draw(pipe, 8)
    stats = flashomni.stats(pipe)
    assert stats.cache_density == 1.0 > stats.density


@pytest.mark.parametrize("policy", ["flashomni", "drift"])
def test_memory(policy: str) -> None:
    """Where nothing can be cached, nothing is kept between steps."""
    pipe, settings = experts(), config(policy=policy, mlp="follow", tau_kv=0.5, ramp_power=0)
    said = flashomni.memory(settings, pipe, image_tokens=168, text_tokens=0)
    flashomni.enable(pipe, settings)
    draw(pipe, 12)
    assert said.by_kind == flashomni.stats(pipe).bytes_held
    assert (said.by_kind["cached"] + said.by_kind["history"] > 0) == (policy == "drift")
    assert said.layers[2].name == "transformer_2.blocks.0"


def test_two_experts_on_one_clock() -> None:
    pipe = experts()
    want = draw(pipe, 12, guided=True)
    flashomni.enable(pipe, config(policy="dense", strict=True))
    assert error(draw(pipe, 12, guided=True), want) < ROUNDING
    stats = flashomni.stats(pipe)
    assert (stats.num_steps, stats.steps_done, stats.passes) == (12, 12, 24)
    assert len(stats.density_by_layer) == 4 and len(stats.density_by_step) == 12
    flashomni.disable(pipe)
    assert torch.equal(draw(pipe, 12, guided=True), want)


def test_two_experts_keep_their_own_state() -> None:
    """The second begins in the middle of the run: dense until the next Update, then sparse."""
    pipe = experts()
    want = draw(pipe, 12)
    flashomni.enable(pipe, config(), policy=RandomPolicy(0.6, 0.6))
    got = draw(pipe, 12)
    assert 1e-4 < error(got, want) < 0.5
    parts = [flashomni.stats(each) for each in (pipe.transformer, pipe.transformer_2)]
    assert [part.passes for part in parts] == [6, 6] and all(part.density < 1 for part in parts)
    assert parts[1].notes == {"dispatch without an update: dense": 4}  # steps 6 and 7, in 2 layers
    both = flashomni.stats(pipe)
    assert {layer for _, layer in both.symbols} == {0, 1, 2, 3}
    # Step 7 entered the history of the Update at step 8.
    second = transformers_of(pipe)[1][1].__dict__["_flashomni"].engine
    assert {state.orders for state in second.contexts.states()} == {2}
    assert both.density == pytest.approx((parts[0].density + parts[1].density) / 2)
    with flashomni.disabled(pipe):
        assert torch.equal(draw(pipe, 12), want)
    with pytest.raises(RuntimeError, match="enabled already"):
        flashomni.enable(pipe)


def test_one_expert_alone_is_refused_whole() -> None:
    """Nothing is left behind if the second cannot be served."""
    pipe = experts()
    for block in pipe.transformer_2.blocks:
        block.attn1.set_processor(lambda *args, **kwargs: None)
    with pytest.raises(
        NotImplementedError, match=r"transformer_2\.blocks\.0: its own code: has the processor"
    ):
        flashomni.enable(pipe, config())
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_image_to_video() -> None:
    """Image tokens are in the cross-attention, which is left alone."""
    model = transformer(in_channels=12, image_dim=8, added_kv_proj_dim=128)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "image_encoder", "image_processor"))

    def passes(model, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        x, condition, text, image = (
            torch.randn(shape, generator=generator)
            for shape in ((2, 4, 3, 14, 16), (2, 8, 3, 14, 16), (2, 512, 16), (2, 5, 8))
        )
        scheduler = pipe.scheduler
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            y = model(torch.cat([x, condition], 1), t.expand(2), text, image, return_dict=False)[0]
            x = scheduler.step(y, t, x, return_dict=False)[0]
        return x

    pipe = quiet(
        WanImageToVideoPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )
    run = torch.no_grad()(lambda pipe, steps: passes(pipe.transformer, steps))
    check_nothing_reused_is_dense(pipe, run)
    check_sparse_runs(pipe, run)


def test_vace() -> None:
    """The control branch has attentions of its own, before the model's."""
    torch.manual_seed(0)
    model = stirred(WanVACETransformer3DModel(**TINY, vace_layers=[0], vace_in_channels=6))
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipe = quiet(WanVACEPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))

    def run(pipe, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        x, control, text = (
            torch.randn(shape, generator=generator)
            for shape in ((2, 4, 3, 14, 16), (2, 6, 3, 14, 16), (2, 20, 16))
        )
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            y = pipe.transformer(x, t.expand(2), text, control_hidden_states=control, return_dict=False)[0]
            x = pipe.scheduler.step(y, t, x, return_dict=False)[0]
        return x

    check_nothing_reused_is_dense(pipe, run)
    check_sparse_runs(pipe, run)
    names = [row.name for row in flashomni.explain(pipe).rows]
    assert names == ["vace_blocks.0", "blocks.0", "blocks.1"]


def test_timesteps_of_their_own_for_tokens() -> None:
    """Wan 2.2 TI2V."""
    pipe = pipeline(expand_timesteps=True)
    check_nothing_reused_is_dense(pipe, draw)
    check_sparse_runs(pipe, draw)


def test_norms_over_all_heads_are_one_call(monkeypatch) -> None:
    """With RoPE, of queries and keys; at Updates of each."""
    pipe, calls = pipeline(), []
    engine = flashomni.enable(pipe, config(policy="drift"))
    norm_rope = ops.norm_rope

    def watch(x, weight, cos, sin, **options):
        assert weight.shape == (128,) and cos is not None
        kind = engine.plan.kind
        calls.append(kind)
        assert (options.get("keys") is None) == (kind == "update")
        assert (options["symbols"] is not None) == (kind == "dispatch")
        return norm_rope(x, weight, cos, sin, **options)

    monkeypatch.setattr(ops, "norm_rope", watch)
    draw(pipe, 6)
    assert {kind: calls.count(kind) for kind in set(calls)} == {"full": 6, "update": 4, "dispatch": 4}


def test_other_norms_over_all_heads_are_called() -> None:
    pipe = pipeline()
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.register_forward_hook(lambda module, args, out: 2 * out)
    rows = flashomni.explain(pipe, config()).rows
    assert all(row.notes == ("norm_q has hooks on its forward: called as a module",) for row in rows)
    want = draw(pipe, 6)
    flashomni.enable(pipe, config(policy="dense", strict=False))
    assert error(draw(pipe, 6), want) < ROUNDING


def test_explain() -> None:
    pipe = experts()
    answer = flashomni.explain(pipe, "balanced")
    assert [row.name for row in answer.rows][1:3] == ["blocks.1", "transformer_2.blocks.0"]
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", "rows", "sparse") for r in answer.rows)
    for text in ("Query and key norms run over all heads", "criterion for S_c is undefined", "not measured"):
        assert text in str(answer)
    answer = flashomni.explain(pipe, "quality")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", "dense", "dense") for r in answer.rows)


def test_parts_that_stay_in_float32_are_no_obstacle() -> None:
    """Checkpoints in bfloat16 keep modulation and norms in float32."""
    model = transformer().to(torch.bfloat16)
    for block in model.blocks:
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    assert not any(row.notes for row in flashomni.explain(model).rows)


class Sizes(NamedTuple):
    """What OddRows looks at of a Layout."""

    batch: int
    heads: int


@pytest.mark.parametrize("order, cache_dtype", [(0, "model"), (1, "model"), (2, "model"), (1, "float8_e4m3")])
def test_cross_attention_follows(order: int, cache_dtype: str) -> None:
    pipe = pipeline()
    check_cross_attention_follows(pipe, draw, pipe.transformer.blocks[0].attn2, order, cache_dtype)


def test_cross_attention_follows_in_all_runs() -> None:
    """Guidance, batches, experts, compiled blocks, memory; and it can be undone."""
    for make in (pipeline, experts):
        pipe = make()
        want = draw(pipe, 8)
        settings = config(cross_attention="follow", policy="dense")
        flashomni.enable(pipe, settings)
        assert error(draw(pipe, 8), want) < ROUNDING
        flashomni.disable(pipe)
        assert torch.equal(draw(pipe, 8), want)
    pipe, settings = pipeline(), config(cross_attention="follow", mlp="follow", policy="drift")
    said = flashomni.memory(settings, pipe, image_tokens=168, text_tokens=20)
    flashomni.enable(pipe, settings)
    first = draw(pipe, 9)
    assert said.by_kind == flashomni.stats(pipe).bytes_held
    draw(pipe, 9, batch=2, guided=True)
    assert torch.equal(draw(pipe, 9), first)
    assert "forecast in 2 of 2 layers" in str(flashomni.explain(pipe, settings)).split("Cross-attention")[1]
    assert "dense in every step" in str(flashomni.explain(pipeline())).split("Cross-attention")[1]
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(draw(pipe, 9), first)
    torch.compiler.reset()


@pytest.mark.parametrize("cache_dtype", ["model", "float8_e4m3"])
def test_rows_of_cross_attention_that_are_computed_are_not_forecast(cache_dtype: str, monkeypatch) -> None:
    pipe = pipeline()

    def run() -> torch.Tensor:
        settings = config(cross_attention="follow", mlp="follow", cache_dtype=cache_dtype)
        flashomni.enable(pipe, settings, policy=OddRows())
        latents = draw(pipe, 9)
        flashomni.disable(pipe)
        return latents

    check_rows_left_out(monkeypatch, run)


def test_memory_of_a_model_without_memory_counts_what_follows() -> None:
    pipe, shape = pipeline(), {"image_tokens": 168, "text_tokens": 20}
    settings = config(cross_attention="follow", mlp="follow", policy="drift")
    want = flashomni.memory(settings, pipe, **shape)
    dense = flashomni.memory(config(mlp="follow", policy="drift"), pipe, **shape)
    assert want.total > dense.total
    pipe.transformer.to("meta")
    assert flashomni.memory(settings, pipe, **shape) == want


def test_cross_attention_to_a_picture_follows() -> None:
    """Image to video: keys of the picture stand before those of 512 tokens of text."""
    model = transformer(in_channels=12, image_dim=8, added_kv_proj_dim=128)
    x, text = (torch.randn(2, rows, 128) for rows in (168, 512 + 7))
    attention = model.blocks[0].attn2
    with torch.no_grad():
        want = attention(x, text)
    engine = flashomni.enable(model, config(cross_attention="follow", max_order=0), policy=OddRows())
    processor = attention.processor
    with torch.no_grad():
        state = engine.contexts.layer(
            engine.context, 0, (2, 168, 2, 64, x.dtype, x.device), *(engine.config.block_q,) * 2
        )
        OddRows().select(None, Sizes(2, 2), None, {}, Choice(state.symbols))
        state.summarize(0, spread=True)
        out = processor._attend(attention, x, text, state.rows, torch.full_like(x, float("nan")))
    active = state.symbols.masks()[0].any(1)[:, torch.arange(168) // 64]
    assert error(out[active].double(), want[active].double()) < 1e-5
    assert 0 < int(active.sum()) < active.numel() and bool(out[~active].isnan().all())
