"""PixArt, DiT and Latte: self-attention over an image or a frame, head_dim 72, cross-attention left alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from family_checks import (
    check_drift_follows,
    check_memory,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    config,
    error,
    lively,
    quiet,
)

import flashomni

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 72, "in_channels": 4, "num_layers": 2}


def pixart() -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **SHAPE,
        out_channels=8,
        cross_attention_dim=144,
        sample_size=32,
        caption_channels=16,
        use_additional_conditions=False,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.mul_(8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        PixArtAlphaPipeline(transformer=lively(model), scheduler=DPMSolverMultistepScheduler(), **parts)
    )


def draw(pipe, steps: int, valid: tuple[int, ...] = (20,), guided: bool = False, **options) -> torch.Tensor:
    """12 x 14 tokens, 20 of text in the cross-attention, `valid` of which are not padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "prompt_attention_mask": mask,
        "latents": noise(batch, 4, 24, 28),
        "negative_prompt": None,
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_attention_mask": mask.flip(0),
        }
    sizes = {"height": 192, "width": 224, "num_inference_steps": steps, "use_resolution_binning": False}
    scale = 4.5 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").images


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE, out_channels=8, sample_size=28, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    return quiet(DiTPipeline(transformer=lively(model), scheduler=DDIMScheduler(), vae=vae.eval()))


def draw_classes(pipe, steps: int) -> torch.Tensor:
    """14 x 14 tokens, two pictures and their guidance in one batch."""
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
    return pipe(class_labels=[3, 7], **options).images


def latte_transformer(out_channels: int = 8) -> LatteTransformer3DModel:
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        **SHAPE,
        out_channels=out_channels,
        patch_size=2,
        cross_attention_dim=144,
        sample_size=28,
        caption_channels=16,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        attention_bias=True,
        video_length=3,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.mul_(8)
    return lively(model)


def latte() -> LattePipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(LattePipeline(transformer=latte_transformer(), scheduler=DDIMScheduler(), **parts))


def latte_case() -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): two videos of 3 frames of 12 x 14 tokens."""
    generator = torch.Generator().manual_seed(2)
    inputs = {"encoder_hidden_states": torch.randn(2, 20, 16, generator=generator)}
    return latte_transformer(out_channels=4), torch.randn(2, 4, 3, 24, 28, generator=generator), inputs


def draw_video(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """3 frames of 12 x 14 tokens."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "latents": noise(batch, 4, 3, 24, 28),
        "negative_prompt": None,
        "mask_feature": False,  # its mask is the tokenizer's
    }
    if guided:
        inputs["negative_prompt_embeds"] = noise(batch, 20, 16)
    sizes = {"height": 192, "width": 224, "video_length": 3, "num_inference_steps": steps}
    scale = 3.0 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").frames


@pytest.mark.parametrize("valid", [(20,), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pixart(), lambda pipe, steps: draw(pipe, steps, valid))


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, (13, 6), guided=True)

    pipe = pixart()
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 8


def test_classes() -> None:
    check_nothing_reused_is_dense(dit(), draw_classes)
    check_sparse_runs(dit(), draw_classes)


@pytest.mark.parametrize("over_time", [True, False])
def test_videos(over_time: bool) -> None:
    """Blocks over a frame are ours, those over time between them are the model's own."""

    def run(pipe, steps: int) -> torch.Tensor:
        return draw_video(pipe, steps, enable_temporal_attentions=over_time)

    check_nothing_reused_is_dense(latte(), run)
    stats = check_sparse_runs(latte(), run)
    shapes = {(layer, s.batch, s.q_tokens) for (_, layer), s in stats.symbols.items()}
    assert shapes == {(0, 3, 168), (1, 3, 168)}


def test_guidance_of_videos() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw_video(pipe, steps, batch=2, guided=True)

    pipe = latte()
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 8


def test_videos_follow() -> None:
    check_drift_follows(latte(), draw_video, tau_q=0.3, batch=3)


def test_drift_lets_gemm_q_skip() -> None:
    pipe = pixart()
    want = draw(pipe, 8)
    flashomni.enable(pipe, config(policy="drift", tau_q=0.8, ramp_power=0))
    assert 1e-5 < error(draw(pipe, 8), want) < 0.5
    assert flashomni.stats(pipe).cache_density < 1


def test_memory() -> None:
    check_memory(pixart(), draw, text_tokens=20)


def test_what_processors_cannot_do_is_refused() -> None:
    model = pixart().transformer
    engine = flashomni.enable(model, config())
    engine.begin(1)
    x, text = torch.randn(1, 4, 24, 28), torch.randn(1, 20, 16)
    inputs = {"encoder_hidden_states": text, "timestep": torch.ones(1), "added_cond_kwargs": {}}
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="cross_attention_kwargs: expected nothing but scale"):
            model(x, **inputs, cross_attention_kwargs={"gligen": {}})
        with pytest.raises(NotImplementedError, match="attention_mask: expected None"):
            model(x, **inputs, attention_mask=torch.ones(1, 168))
        assert model(x, **inputs)[0].isfinite().all()


@pytest.mark.parametrize("make", [pixart, dit, latte])
def test_explain(make) -> None:
    answer = flashomni.explain(make(), "balanced")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert "criterion for S_c is undefined" in str(answer)
