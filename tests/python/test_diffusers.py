"""enable, disable, stats, explain on diffusers' own FluxPipeline, with tiny random models."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from flux_models import draw, error, passes, tiny_pipeline, tiny_transformer

import flashomni
from flashomni import Config
from flashomni.policies import RandomPolicy

# Dense against dense in float32: another order of summation in 3 layers, fed back through 8 steps.
ROUNDING = 1e-5


def config(**changes) -> Config:
    settings = {"cache_interval": 3, "disable_cache_before_step": 2, "block_q": 64, "block_kv": 64}
    return Config(**(settings | changes))


def sparse() -> RandomPolicy:
    return RandomPolicy(0.4, 0.5)


@pytest.mark.parametrize("text", [16, 77, 226, 512])
@pytest.mark.parametrize(
    "settings", [{"policy": "dense"}, {"tau_q": 0.0, "tau_kv": 0.0}], ids=["all ones", "tau 0"]
)
def test_nothing_reused_is_the_dense_pipeline(text, settings):
    pipe = tiny_pipeline()
    want = draw(pipe, steps=6, text=text)
    flashomni.enable(pipe, config(**settings, strict=True))
    got = draw(pipe, steps=6, text=text)
    assert error(got, want) < ROUNDING
    stats = flashomni.stats(pipe)
    assert stats.steps == {"full": 3, "update": 1, "dispatch": 2}
    assert stats.density == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_exact_as_diffusers_own(dtype):
    exact = draw(tiny_pipeline(dtype=torch.float64), steps=6, text=77)
    pipe = tiny_pipeline(dtype=dtype)
    theirs = error(draw(pipe, steps=6, text=77), exact)
    assert theirs < 0.1  # the inputs are roundings of the same numbers
    flashomni.enable(pipe, config(policy="dense"))
    ours = error(draw(pipe, steps=6, text=77), exact)
    assert ours < 1.5 * theirs


def test_sparse_runs_differ_from_dense_and_repeat():
    pipe = tiny_pipeline()
    want = draw(pipe)
    flashomni.enable(pipe, config(), policy=sparse())
    first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)
    assert error(first, want) > 1e-3
    stats = flashomni.stats(pipe)
    assert stats.steps == {"full": 3, "update": 2, "dispatch": 3}
    assert 0 < stats.density < 1 and stats.passes == 8


def test_another_number_of_steps_needs_nothing():
    pipe = tiny_pipeline()
    flashomni.enable(pipe, config(), policy=sparse())
    want = draw(pipe, steps=5), draw(pipe, steps=11)
    assert flashomni.stats(pipe).num_steps == 11
    assert torch.equal(draw(pipe, steps=5), want[0])
    assert torch.equal(draw(pipe, steps=11), want[1])


def test_batches_are_like_single_pictures():
    pipe = tiny_pipeline()
    flashomni.enable(pipe, config(tau_kv=0.3))
    generator = torch.Generator().manual_seed(4)
    embeds, pooled = torch.randn(2, 77, 32, generator=generator), torch.randn(2, 32, generator=generator)
    latents = torch.randn(2, 323, 4, generator=generator)

    def run(part: slice) -> torch.Tensor:
        inputs = {
            "prompt_embeds": embeds[part],
            "pooled_prompt_embeds": pooled[part],
            "latents": latents[part],
        }
        return draw(pipe, **inputs)

    both = run(slice(0, 2))
    for i in range(2):
        assert error(both[i], run(slice(i, i + 1))[0]) < ROUNDING


def test_guidance_keeps_its_passes_apart():
    """Two passes a step: each pass gives what it gives when its prompt runs alone over the same latents."""
    pipe = tiny_pipeline()
    dense = draw(pipe, guided=True, text=77)
    engine = flashomni.enable(pipe, config(policy="dense"))
    assert error(draw(pipe, guided=True, text=77), dense) < ROUNDING
    assert engine.contexts.names() == ["cond", "uncond"]
    assert flashomni.stats(pipe).passes == 16
    flashomni.disable(pipe)

    model = tiny_transformer()
    alone = []
    for text in (16, 77):
        engine = flashomni.enable(model, config(), policy=sparse())
        engine.begin(6)
        alone.append(passes(model, 6, text, 1, engine.step))
        flashomni.disable(model)
    engine = flashomni.enable(model, config(), policy=sparse())
    engine.begin(6)
    # Interleaved by two threads that take turns: the first pass of a step is "a", the second "b".
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    got: list = [None, None]

    def run(i: int, text: int) -> None:
        def after_step() -> None:
            if i == 1:
                engine.step()
            turns[1 - i].release()
            turns[i].acquire()

        with torch.no_grad():
            turns[i].acquire()
            got[i] = passes(model, 6, text, 1, after_step)
            turns[1 - i].release()

    threads = [threading.Thread(target=run, args=(i, text)) for i, text in enumerate((16, 77))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The random symbols of context 0 are the same as alone; those of context 1 are its own.
    assert all(torch.equal(a, b) for a, b in zip(got[0], alone[0], strict=True))
    assert all(y.isfinite().all() for y in got[1])
    assert engine.contexts.names() == [0, 1]


def test_an_exception_in_the_middle_leaves_nothing_behind():
    pipe = tiny_pipeline()
    flashomni.enable(pipe, config(), policy=sparse())
    want = draw(pipe)

    def fail(pipe, step, timestep, kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail, batch=2)
    hook = pipe.transformer.single_transformer_blocks[1].proj_mlp.register_forward_hook(
        lambda *args: (_ for _ in ()).throw(ValueError("inside a layer"))
    )
    with pytest.raises(ValueError, match="inside a layer"):
        draw(pipe, steps=4)
    hook.remove()
    assert torch.equal(draw(pipe), want)


def test_two_pipelines_in_two_threads():
    pipes = [tiny_pipeline(seed) for seed in (1, 2)]
    for pipe in pipes:
        flashomni.enable(pipe, config(), policy=sparse())
    want = [draw(pipes[0], steps=7), draw(pipes[1], steps=9, text=77)]
    got = [None, None]

    def run(i: int) -> None:
        with torch.no_grad():
            got[i] = draw(pipes[i], **({"steps": 7}, {"steps": 9, "text": 77})[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_scheduler_may_drive_two_transformers():
    pipes = [tiny_pipeline(seed) for seed in (1, 2)]
    pipes[1].scheduler = pipes[0].scheduler
    want = [draw(pipe) for pipe in pipes]
    for pipe in pipes:
        flashomni.enable(pipe, config(policy="dense"))
    assert [error(draw(pipe), w) < ROUNDING for pipe, w in zip(pipes, want, strict=True)] == [True, True]
    flashomni.disable(pipes[0])
    assert error(draw(pipes[1]), want[1]) < ROUNDING
    flashomni.disable(pipes[1])
    assert "step" not in pipes[0].scheduler.__dict__


def snapshot(pipe) -> list:
    """Everything that enable() may touch, by identity."""
    model, scheduler = pipe.transformer, pipe.scheduler
    modules = [
        (name, id(module), {key: id(value) for key, value in module.__dict__.items() if key == "forward"})
        for name, module in model.named_modules()
    ]
    processors = {name: id(processor) for name, processor in model.attn_processors.items()}
    hooks = (
        len(model._forward_pre_hooks),
        len(model._forward_hooks),
        len(model._forward_hooks_always_called),
    )
    model_keys = sorted(
        model.__dict__.keys() - {"_diffusers_hook"}
    )  # the pipeline's cache_context makes this one
    bound = [key in scheduler.__dict__ for key in ("set_timesteps", "step", "_flashomni_clock")]
    return [modules, processors, hooks, model_keys, bound]


def test_disable_restores_everything():
    pipe = tiny_pipeline()

    class Custom(FluxAttnProcessor):
        pass

    pipe.transformer.single_transformer_blocks[1].attn.set_processor(Custom())
    want, before = draw(pipe), snapshot(pipe)
    flashomni.enable(pipe, config(), policy=sparse())
    assert snapshot(pipe) != before
    assert error(draw(pipe), want) > 1e-3
    flashomni.disable(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(draw(pipe), want)
    flashomni.disable(pipe)  # nothing to do


def test_disabled_for_a_while():
    pipe = tiny_pipeline()
    want = draw(pipe)
    flashomni.enable(pipe, config(), policy=sparse())
    with_symbols = draw(pipe)
    with flashomni.disabled(pipe):
        assert torch.equal(draw(pipe), want)
    assert torch.equal(draw(pipe), with_symbols)


def test_disabled_for_some_steps_of_a_run():
    pipe = tiny_pipeline()
    want = draw(pipe)
    flashomni.enable(pipe, config(), policy=sparse())
    manager = flashomni.disabled(pipe)

    def toggle(pipe, step, timestep, kwargs):
        if step == 1:
            manager.__enter__()  # over the Update at step 2
        if step == 3:
            manager.__exit__(None, None, None)
        return kwargs

    got = draw(pipe, callback_on_step_end=toggle)
    notes = flashomni.stats(pipe).notes
    assert notes == {"dispatch without an update: dense": 3}
    assert got.isfinite().all() and 0 < error(got, want)


def test_processors_of_others_are_left_alone():
    pipe = tiny_pipeline(doubles=2)
    adapter = FluxIPAdapterAttnProcessor(128, 32)
    pipe.transformer.transformer_blocks[1].attn.set_processor(adapter)
    rows = flashomni.explain(pipe, config()).rows
    assert [row.attention for row in rows] == ["sparse", "dense", "sparse", "sparse"]
    assert "FluxIPAdapterAttnProcessor" in rows[1].notes[0]
    with pytest.raises(NotImplementedError, match="strict.*FluxIPAdapterAttnProcessor"):
        flashomni.enable(pipe, config(strict=True))
    flashomni.enable(pipe, config(), policy=sparse())
    assert pipe.transformer.transformer_blocks[1].attn.processor is adapter


def test_a_processor_set_while_enabled_stays():
    pipe = tiny_pipeline()
    flashomni.enable(pipe, config(), policy=sparse())
    mine = FluxAttnProcessor()
    pipe.transformer.transformer_blocks[0].attn.set_processor(mine)
    flashomni.disable(pipe)
    assert pipe.transformer.transformer_blocks[0].attn.processor is mine


def test_the_attention_backend_chosen_while_enabled_stays():
    pipe = tiny_pipeline()
    pipe.transformer.set_attention_backend("native")
    flashomni.enable(pipe, config())
    processors = pipe.transformer.attn_processors
    assert len({str(p._attention_backend) for p in processors.values()}) == 1
    pipe.transformer.set_attention_backend("_native_math")
    flashomni.disable(pipe)
    backends = {p._attention_backend for p in pipe.transformer.attn_processors.values()}
    assert {str(getattr(b, "value", b)) for b in backends} == {"_native_math"}


def test_controlnet_residuals_reach_the_blocks():
    model = tiny_transformer()
    residual = torch.randn(1, 323, 128)
    kwargs = {"controlnet_block_samples": [residual], "controlnet_single_block_samples": [residual, residual]}

    def run(after_step=None):
        original = model.forward
        model.forward = lambda **inputs: original(**inputs, **kwargs)
        try:
            return passes(model, 5, 77, 1, after_step)
        finally:
            del model.forward

    want = run()
    engine = flashomni.enable(model, config(policy="dense"))
    engine.begin(5)
    for a, b in zip(run(engine.step), want, strict=True):
        assert error(a, b) < ROUNDING


def test_a_hook_that_came_later_outlives_disable():
    pipe = tiny_pipeline()
    want = draw(pipe)
    flashomni.enable(pipe, config(), policy=sparse())
    block = pipe.transformer.single_transformer_blocks[0]
    inner, calls = block.forward, []

    def outer(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    block.forward = outer
    flashomni.disable(pipe)
    assert block.forward is outer
    assert torch.equal(draw(pipe), want) and len(calls) == 8
    with pytest.raises(NotImplementedError, match="another hook on its forward"):
        flashomni.enable(pipe, config(strict=True))


def test_image_to_image_begins_in_the_middle():
    """Pipelines that start late set all timesteps, then where they begin: the plan is of those to come."""
    pipe = tiny_pipeline()
    engine = flashomni.enable(pipe, config(policy="dense"))
    pipe.scheduler.set_timesteps(10, mu=0.5)
    pipe.scheduler.set_begin_index(4)
    passes(pipe.transformer, 6, 16, 1, engine.step)
    assert flashomni.stats(pipe).num_steps == 6


def test_clock_errors():
    model = tiny_transformer()
    engine = flashomni.enable(model, config())
    with pytest.raises(RuntimeError, match="no run has begun.*engine.begin"):
        passes(model, 1, 16, 1)
    engine.begin(2)
    with pytest.raises(RuntimeError, match="the run of 2 steps is over"):
        passes(model, 3, 16, 1, engine.step)
    with flashomni.disabled(model):
        passes(model, 1, 16, 1)

    pipe = tiny_pipeline()
    flashomni.enable(pipe, config())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(RuntimeError, match="scheduler was replaced"):
        draw(pipe)


def test_training_autocast_and_masks_are_refused():
    model = tiny_transformer()
    engine = flashomni.enable(model, config())
    engine.begin(3)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="expected inference"):
        passes(model, 1, 16, 1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="expected no autocast"):
        passes(model, 1, 16, 1)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        with pytest.raises(NotImplementedError, match="attention_mask: expected None"):
            block(
                torch.randn(1, 20, 128),
                torch.randn(1, 10, 128),
                torch.randn(1, 128),
                joint_attention_kwargs={"attention_mask": torch.ones(1, 1, 30, 30, dtype=torch.bool)},
            )


def test_what_cannot_be_enabled():
    class NobodysTransformer(torch.nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="one of .*Flux.*, got NobodysTransformer.*docs/engine.md"):
        flashomni.enable(NobodysTransformer())
    with pytest.raises(TypeError, match="target: expected a pipeline"):
        flashomni.enable(object())
    small = FluxTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    with pytest.raises(NotImplementedError, match="no layer can be sparse(.|\n)*head_dim 16 is none of 64"):
        flashomni.enable(small)
    pipe = tiny_pipeline()
    with pytest.raises(RuntimeError, match="not enabled"):
        flashomni.stats(pipe)
    with pytest.raises(TypeError, match="config: expected a flashomni.Config"):
        flashomni.enable(pipe, {"tau_q": 0.5})
    with pytest.raises(ValueError, match=r"dense_layers: expected indices below 3, got \[7\]"):
        flashomni.enable(pipe, config(dense_layers=(0, 7)))
    with pytest.raises(ValueError, match="policy: expected one of"):
        flashomni.enable(pipe, config(policy="unheard of"))
    flashomni.enable(pipe, "exact")
    with pytest.raises(RuntimeError, match="enabled already"):
        flashomni.enable(pipe)
    flashomni.disable(pipe)
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="another cache"):
        flashomni.enable(pipe)


def test_explain_before_and_after():
    pipe = tiny_pipeline()
    answer = flashomni.explain(pipe, config(dense_layers=(2,)), num_inference_steps=8)
    text = str(answer)
    assert not answer.enabled and "2 of 3 attention layers sparse; FlashOmni is not enabled" in text
    assert "steps FFUddUdF" in text
    assert "single_transformer_blocks.1 dense     dense  dense  in dense_layers" in text
    assert answer.rows[0].gemm_q == answer.rows[0].gemm_o == "sparse"
    flashomni.enable(pipe, config(dense_layers=(2,)), policy=sparse())
    assert str(flashomni.explain(pipe)).splitlines()[0].endswith("FlashOmni is enabled")
    assert flashomni.explain(pipe).rows == answer.rows
    draw(pipe)
    stats = flashomni.stats(pipe)
    assert [d < 1 for d in stats.density_by_layer] == [True, True, False]


def test_fused_projections_change_nothing():
    pipe = tiny_pipeline()
    want = draw(pipe, steps=5)
    pipe.transformer.fuse_qkv_projections()
    flashomni.enable(pipe, config(policy="dense"))
    assert error(draw(pipe, steps=5), want) < ROUNDING


def test_blocks_get_contiguous_tokens() -> None:
    """Where diffusers' own patch embedding gives a transposed view, which residuals keep."""
    module = importlib.import_module("test_family_hunyuan_video")
    pipe, strides = module.pipeline(), []
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        block = blocks[0]
        block.register_forward_pre_hook(lambda block, args: strides.append(args[0].stride()[1:]))

    def drawn() -> list[tuple]:
        strides.clear()
        module.draw(pipe, 1)
        return list(strides)

    transposed = drawn()
    assert len(transposed) == 2 and all(token == 1 for token, _ in transposed), "else needed no longer"
    flashomni.enable(pipe, Config())
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    assert drawn() == [(width, 1)] * 2
    with flashomni.disabled(pipe):
        assert drawn() == transposed
    flashomni.disable(pipe)
    assert drawn() == transposed
