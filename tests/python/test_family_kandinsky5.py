"""Kandinsky 5: self-attention without text, RoPE by matrices, float32 around modules of the model's type."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky import fractal_flatten
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
from graph_stand_in import StandIn

import flashomni
from flashomni import Config
from flashomni.diffusers import rope
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.families import family_of
from flashomni.engine import Engine
from flashomni.policies import DensePolicy

TINY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "model_dim": 128,
    "ff_dim": 160,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
}


def transformer(**changes) -> Kandinsky5Transformer3DModel:
    """With a modulation, which a new model has none of, and values scaled up.

    Rotated queries and keys are rounded to bfloat16, where a difference in the last bit of a float32 can
    become one of 2^-8: the modulation is strong enough for the steps after not to amplify that.
    """
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(**(TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation.out_layer" in name:
                parameter.copy_(0.7 * torch.randn_like(parameter))
            elif "self_attention.to_value" in name or "self_attention.out_layer" in name:
                parameter.mul_(3)
            elif "to_query" in name or "to_key" in name:
                parameter.mul_(0.02)  # an eps of bfloat16 would count
            elif "query_norm" in name or "key_norm" in name:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
    return model.eval()


def of_type(model: Kandinsky5Transformer3DModel, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
    """As from_pretrained(torch_dtype=dtype) loads it: embeddings of time and modulations stay in float32."""
    model = model.to(dtype)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in model._keep_in_fp32_modules:
            module.float()
    return model


def pipeline(cls=Kandinsky5T2VPipeline, **changes):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(cls(transformer=transformer(**changes), scheduler=scheduler, **parts))


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **sizes) -> torch.Tensor:
    """3 frames of 7 x 8 tokens; 20 of text in the cross-attention."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def text(prefix: str) -> dict[str, torch.Tensor]:
        ends = torch.arange(0, 20 * batch + 1, 20, dtype=torch.int32)
        return {
            f"{prefix}prompt_embeds_qwen": noise(batch, 20, 16),
            f"{prefix}prompt_embeds_clip": noise(batch, 8),
            f"{prefix}prompt_cu_seqlens": ends,
        }

    sizes = sizes or {"height": 112, "width": 128, "num_frames": 9}
    frames = sizes.get("num_frames", 1) // 4 + 1
    inputs = text("") | {"latents": noise(batch, frames, sizes["height"] // 8, sizes["width"] // 8, 4)}
    if guided:
        inputs |= text("negative_")
    options = {"num_inference_steps": steps, "guidance_scale": 4.0 if guided else 1.0}
    return pipe(**inputs, **sizes, **options, output_type="latent", return_dict=False)[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_reused_is_dense(batch: int) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, batch))


def test_guidance() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 16


def test_pictures() -> None:
    """One frame of 12 x 13 tokens."""
    pipe = pipeline(Kandinsky5T2IPipeline)
    pipe.resolutions = [(208, 192)]

    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, height=192, width=208)

    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.symbols[0, 0].q_tokens == 156


def test_image_to_video() -> None:
    """The first frame is given, once more in channels of its own."""
    pipe = pipeline(Kandinsky5I2VPipeline, visual_cond=True)

    @torch.no_grad()
    def run(pipe, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        x, text, pooled = (
            torch.randn(shape, generator=generator) for shape in ((2, 3, 14, 16, 9), (2, 20, 16), (2, 8))
        )
        places = [torch.arange(count) for count in (3, 7, 8)]
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            y = pipe.transformer(x, text, t.expand(2), pooled, places, torch.arange(20)).sample
            x[:, 1:, ..., :4] = pipe.scheduler.step(y[:, 1:], t, x[:, 1:, ..., :4], return_dict=False)[0]
        return x[..., :4]

    check_nothing_reused_is_dense(pipe, run)
    check_sparse_runs(pipe, run)


def test_bfloat16_is_as_near_to_exact_as_the_models_own() -> None:
    pipe = pipeline()
    pipe.transformer = of_type(pipe.transformer, torch.bfloat16)
    rounded = pipeline()
    rounded.transformer = copy.deepcopy(pipe.transformer).float()
    exact = draw(rounded, 6).double()
    theirs = error(draw(pipe, 6), exact)
    assert not any(row.notes for row in flashomni.explain(pipe).rows)
    for follow in ("dense", "follow"):
        settings = config(policy="dense", mlp=follow, cross_attention=follow, strict=True)
        flashomni.enable(pipe, settings)
        assert error(draw(pipe, 6), exact) < 1.5 * theirs
        flashomni.disable(pipe)


@pytest.mark.parametrize("name", ["self_attention", "cross_attention"])
def test_norms_in_bfloat16_have_the_eps_of_float32(name: str) -> None:
    pipe = pipeline()
    pipe.transformer = of_type(pipe.transformer, torch.bfloat16)
    flashomni.enable(pipe, config(policy="dense", cross_attention="follow"))
    attention, errors = getattr(pipe.transformer.visual_transformer_blocks[0], name), []
    ours = attention.processor
    assert ours.flashomni
    own = type(ours.original)()

    def watched(*args, **kwargs) -> torch.Tensor:
        out = ours(*args, **kwargs)
        errors.append(error(out, own(*args, **kwargs)))
        return out

    attention.processor = watched
    draw(pipe, 6)
    assert len(errors) == 6 and max(errors) < 0.004


def test_matrices_of_rotation_are_tables() -> None:
    """diffusers' matrices, multiplied one by one in float64, in the order of the model's tokens."""
    model = transformer()
    places = [torch.tensor([0, 2]), torch.tensor([0, 5, 7]), torch.arange(4)]
    matrices = model.visual_rope_embeddings((2, 2, 3, 4), places, (1.0, 2.0, 3.16))
    x = torch.randn(2, 24, 3, 64)
    x, matrices = fractal_flatten(x.view(2, 2, 3, 4, 3, 64), matrices, (2, 2, 3, 4))
    want = (matrices.double() @ x.double().unflatten(-1, (32, 2, 1))).flatten(-3)
    joint = Call(Engine(Config(), 1, DensePolicy()), True).lay_out_whole(24)
    got = flashomni.norm_rope(x[:, 6:].clone(), None, *rope.pair_matrices(matrices, joint), row_offset=6)
    torch.testing.assert_close(got.double(), want[:, 6:], rtol=1e-5, atol=1e-5)
    rotate = rope.rounded(rope.pair_matrices(matrices, joint), torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        half = x.to(dtype)
        own = (matrices * half.float().unflatten(-1, (32, 1, 2))).sum(-1).flatten(-2).bfloat16()
        rotated = half[:, 6:].clone()
        rotate(rotated, 6)
        assert rotated.dtype == dtype and torch.equal(rotated, rotated.bfloat16().to(dtype))
        torch.testing.assert_close(rotated, own[:, 6:].to(dtype), rtol=2**-7, atol=1e-6)


def test_drift() -> None:
    pipe = pipeline()
    want = draw(pipe, 8)
    follow = {"mlp": "follow", "cross_attention": "follow"}
    flashomni.enable(pipe, config(policy="drift", tau_q=0.8, tau_kv=0.0, ramp_power=0, **follow))
    assert 1e-5 < error(draw(pipe, 8), want) < 0.3
    assert flashomni.stats(pipe).cache_density < 1


@pytest.mark.parametrize("order, cache_dtype", [(0, "model"), (1, "model"), (2, "model"), (1, "float8_e4m3")])
def test_cross_attention_follows(order: int, cache_dtype: str) -> None:
    pipe = pipeline()
    cross = pipe.transformer.visual_transformer_blocks[0].cross_attention
    check_cross_attention_follows(pipe, draw, cross, order, cache_dtype)


def test_what_follows_with_all_rows_active_is_dense() -> None:
    pipe = pipeline()
    want = draw(pipe, 8, batch=2, guided=True)
    flashomni.enable(pipe, config(policy="dense", mlp="follow", cross_attention="follow", strict=True))
    assert error(draw(pipe, 8, batch=2, guided=True), want) < ROUNDING
    flashomni.disable(pipe)
    assert torch.equal(draw(pipe, 8, batch=2, guided=True), want)


def test_rows_that_are_computed_are_not_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()

    def run() -> torch.Tensor:
        flashomni.enable(pipe, config(cross_attention="follow", mlp="follow"), policy=OddRows())
        latents = draw(pipe, 9)
        flashomni.disable(pipe)
        return latents

    check_rows_left_out(monkeypatch, run)


def test_graphs_give_the_bits_of_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places come as a list of tensors, scales as numbers; two passes a step."""
    pipe, follow = pipeline(), {"mlp": "follow", "cross_attention": "follow"}
    settings = {"policy": "drift", "tau_q": 0.8, **follow}
    flashomni.enable(pipe, config(**settings))
    want = draw(pipe, 11, guided=True)
    flashomni.disable(pipe)
    stand_in = StandIn(monkeypatch, flashomni.enable(pipe, config(cuda_graphs=True, **settings)))
    assert torch.equal(draw(pipe, 11, guided=True), want)
    assert stand_in.replays >= 10


def test_compiled_blocks_make_the_rotation_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is given another object for the same matrices."""
    pipe, made, rounded = pipeline(), [], rope.rounded

    def counted(*args):
        made.append(1)
        return rounded(*args)

    monkeypatch.setattr("flashomni.diffusers.blocks.base.rounded", counted)
    flashomni.enable(pipe, config())
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    draw(pipe, 4)
    assert len(made) == 4
    torch.compiler.reset()


@pytest.mark.parametrize("policy", ["flashomni", "drift"])
def test_memory(policy: str) -> None:
    pipe, shape = pipeline(), {"image_tokens": 168, "text_tokens": 20}
    follow = {"mlp": "follow", "cross_attention": "follow"}
    settings = config(policy=policy, tau_kv=0.5, ramp_power=0, **follow)
    said = flashomni.memory(settings, pipe, **shape)
    flashomni.enable(pipe, settings)
    draw(pipe, 12)
    assert said.by_kind == flashomni.stats(pipe).bytes_held
    assert (said.by_kind["cached"] + said.by_kind["history"] > 0) == (policy == "drift")
    flashomni.disable(pipe)
    pipe.transformer.to("meta")
    assert flashomni.memory(settings, pipe, **shape) == said


def test_explain() -> None:
    pipe = pipeline()
    answer = flashomni.explain(pipe, Config(policy="drift", mlp="follow", cross_attention="follow"))
    assert [row.name for row in answer.rows] == [f"visual_transformer_blocks.{i}" for i in range(2)]
    for row in answer.rows:
        assert (row.attention, row.gemm_q, row.gemm_o) == ("sparse",) * 3 and not row.notes
        assert (row.mlp, row.cross_attention) == ("follow", "follow")
    for text in ("criterion for S_c is undefined", "NABLA (sparse_params) is refused"):
        assert text in str(answer)
    pipe.transformer.visual_transformer_blocks[1].cross_attention.to_query.register_forward_hook(print)
    pipe.transformer.visual_transformer_blocks[1].feed_forward.activation = torch.nn.SiLU()
    rows = flashomni.explain(pipe, answer.config).rows
    assert [(row.mlp, row.cross_attention) for row in rows] == [("follow",) * 2, ("dense",) * 2]
    assert rows[1].notes == (
        "feed_forward is Kandinsky5FeedForward of another make than Linear, GELU, Linear: called as a module",
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_nabla_is_refused() -> None:
    """Inside disabled() the model's own code gets it."""
    nabla = {f"attention_w{axis}": 3 for axis in "THW"} | {"attention_P": 0.9}
    pipe = pipeline(attention_type="nabla", **nabla)
    pipe.transformer.set_attention_backend("flex")
    sizes = {"height": 128, "width": 128, "num_frames": 5}
    want = draw(pipe, 1, **sizes)
    flashomni.enable(pipe, config())
    with pytest.raises(NotImplementedError, match="sparse_params: expected None, got NABLA's"):
        draw(pipe, 1, **sizes)
    with flashomni.disabled(pipe):
        assert torch.equal(draw(pipe, 1, **sizes), want)
    attention = pipe.transformer.visual_transformer_blocks[0].self_attention
    with pytest.raises(NotImplementedError, match="sparse_params: expected None in visual_transformer_blo"):
        attention(torch.randn(1, 64, 128), sparse_params={"P": 0.9})


def test_frequencies_of_time_lie_where_the_model_runs() -> None:
    """They are no buffer: a model on a GPU would copy them there in every step, which no graph can hold."""
    model = transformer()
    x = torch.empty(1, 1, 2, 2, 4, device="meta")
    family_of(model).prepare(Inputs(model, (x,), {}), None)
    assert model.time_embeddings.freqs.device == x.device
