"""FLUX.1's variants: Kontext, whose pictures to edit are protected, and Fill."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, lively, quiet

import flashomni


def pipeline(kind: type, in_channels: int, out_channels: int):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(kind(transformer=lively(model), scheduler=scheduler, **parts))


def edit(pipe, steps: int, batch: int = 1, guided: bool = True) -> torch.Tensor:
    """12 x 16 tokens with 20 of text and a picture of 9 x 10 tokens; guidance without a cache context."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {"prompt_embeds": noise(20, 32), "pooled_prompt_embeds": noise(32)}
    if guided:
        inputs |= {"negative_prompt_embeds": noise(20, 32), "negative_pooled_prompt_embeds": noise(32)}
    return pipe(
        image=noise(16, 18, 20),
        latents=noise(192, 64),
        height=192,
        width=256,
        max_area=192 * 256,
        true_cfg_scale=2.0 if guided else 1.0,
        num_inference_steps=steps,
        output_type="latent",
        **inputs,
    ).images


def test_kontext() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return edit(pipe, steps, batch=2)

    check_nothing_reused_is_dense(pipeline(FluxKontextPipeline, 64, 64), run)
    stats = check_sparse_runs(pipeline(FluxKontextPipeline, 64, 64), run)
    assert stats.passes == 16
    for symbols in stats.symbols.values():
        cache, skip = symbols.masks()
        # Tokens 212..301 of [text, image, picture]: blocks 3 and 4 of 64; the random policy knows text only.
        assert bool(cache[:, :, 3:].all()) and not bool(cache[:, :, 1:3].all())
        assert bool(skip[:, :, 3:].all()) and bool(skip[:, :, :, 3:].all())


def test_kontext_unprotected_and_asleep() -> None:
    pipe = pipeline(FluxKontextPipeline, 64, 64)
    settings = {"tau_q": 0.9, "tau_kv": 0.5, "ramp_power": 0}
    flashomni.enable(pipe, config(protect_conditions=False, **settings))
    edit(pipe, 6)
    caches = [symbols.masks()[0] for symbols in flashomni.stats(pipe).symbols.values()]
    assert not all(bool(cache[:, :, 4].all()) for cache in caches)
    flashomni.disable(pipe)
    # s_q = 1: every layer is reused whole, what is protected too.
    flashomni.enable(pipe, config(s_q=1.0, **settings))
    edit(pipe, 6)
    assert flashomni.stats(pipe).cache_density < 1
    assert not any(bool(symbols.masks()[0].any()) for symbols in flashomni.stats(pipe).symbols.values())


def test_fill() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        # The pipeline prepares a picture even where its latents are given.
        pipe.image_processor.preprocess = lambda *args, **kwargs: torch.zeros(1, 3, 192, 256)
        object.__setattr__(pipe, "vae", SimpleNamespace(config=SimpleNamespace(latent_channels=16)))

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, generator=generator)

        return pipe(
            prompt_embeds=noise(20, 32),
            pooled_prompt_embeds=noise(32),
            latents=noise(192, 64),
            masked_image_latents=noise(192, 320),
            height=192,
            width=256,
            num_inference_steps=steps,
            output_type="latent",
        ).images

    check_nothing_reused_is_dense(pipeline(FluxFillPipeline, 384, 64), run)
    check_sparse_runs(pipeline(FluxFillPipeline, 384, 64), run)
