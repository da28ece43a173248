"""Models built like Wan: Wan-Animate, SkyReels-V2 and ChronoEdit."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from family_checks import (
    check_nothing_reused_is_dense,
    check_passes,
    check_sparse_runs,
    config,
    error,
    quiet,
)
from wan_models import TINY, draw, stirred

import flashomni

FACES = {
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}
PICTURE = {"in_channels": 12, "latent_channels": 4, "image_dim": 8, "added_kv_proj_dim": 128}


def animate() -> WanAnimatePipeline:
    torch.manual_seed(0)
    model = stirred(WanAnimateTransformer3DModel(**(TINY | PICTURE | FACES)))
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "image_encoder", "image_processor"))
    return quiet(WanAnimatePipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


@torch.no_grad()
def draw_segments(pipe: WanAnimatePipeline, steps: int) -> torch.Tensor:
    """Two segments on one clock, as the pipeline makes long videos: set_timesteps between them."""
    generator, segments = torch.Generator().manual_seed(2), []
    shapes = {
        "latents": (1, 4, 3, 14, 16),
        "condition": (1, 8, 3, 14, 16),
        "text": (1, 512, 16),
        "image": (1, 5, 8),
        "pose": (1, 4, 2, 14, 16),
        "face": (1, 3, 5, 16, 16),
    }
    for _ in range(2):
        x, condition, *rest = (torch.randn(shape, generator=generator) for shape in shapes.values())
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            y = pipe.transformer(torch.cat([x, condition], 1), t.expand(1), *rest, return_dict=False)[0]
            x = pipe.scheduler.step(y, t, x, return_dict=False)[0]
        segments.append(x)
    return torch.cat(segments)


def test_animate() -> None:
    """Attentions to faces, between the blocks, stay the model's own; a segment is a run of its own."""
    pipe = animate()
    check_nothing_reused_is_dense(pipe, draw_segments)
    stats = check_sparse_runs(pipe, draw_segments)
    assert (stats.num_steps, stats.passes) == (8, 8) and stats.steps["full"] > 0
    assert [row.name for row in flashomni.explain(pipe).rows] == ["blocks.0", "blocks.1"]


def skyreels(causal_frames: int = 1) -> SkyReelsV2Pipeline:
    torch.manual_seed(0)
    model = stirred(SkyReelsV2Transformer3DModel(**TINY, num_frame_per_block=causal_frames))
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(SkyReelsV2Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def test_skyreels_v2() -> None:
    pipe = skyreels()
    check_nothing_reused_is_dense(pipe, draw)
    check_sparse_runs(pipe, draw)
    want = draw(pipe, 8)
    follow = {"mlp": "follow", "cross_attention": "follow"}
    flashomni.enable(pipe, config(policy="drift", tau_q=0.8, tau_kv=0.0, ramp_power=0, **follow))
    assert 1e-5 < error(draw(pipe, 8), want) < 0.3
    assert flashomni.stats(pipe).cache_density < 1


def test_skyreels_v2_that_sees_frames_in_order_is_refused() -> None:
    pipe = skyreels(causal_frames=3)
    flashomni.enable(pipe, config())
    with pytest.raises(NotImplementedError, match="attention_mask"):
        draw(pipe, 2)


def test_skyreels_v2_with_diffusion_forcing_is_refused() -> None:
    pipe = skyreels()
    flashomni.enable(pipe, config())
    x, text, steps = torch.randn(1, 4, 3, 14, 16), torch.randn(1, 20, 16), torch.zeros(1, 3)
    arguments = {"encoder_hidden_states": text, "enable_diffusion_forcing": True}
    with pytest.raises(NotImplementedError, match="enable_diffusion_forcing: expected False, got True"):
        pipe.transformer(x, steps, **arguments)
    with flashomni.disabled(pipe), torch.no_grad():
        pipe.transformer(x, steps, **arguments)


@pytest.mark.parametrize("frames", [2, 3])  # two frames stand far apart in time
def test_chrono_edit(frames: int) -> None:
    torch.manual_seed(0)
    model = stirred(ChronoEditTransformer3DModel(**TINY))
    generator = torch.Generator().manual_seed(2)
    inputs = {"encoder_hidden_states": torch.randn(1, 20, 16, generator=generator)}
    x = torch.randn(1, 4, frames, 20, 22, generator=generator)
    stats = check_passes(model, x, inputs)
    assert stats.symbols[0, 0].q_tokens == frames * 110


def test_chrono_edit_goes_on_with_fewer_frames() -> None:
    """Its pipeline drops the frames between the first and the last in the middle of a run."""
    torch.manual_seed(0)
    model = stirred(ChronoEditTransformer3DModel(**TINY))
    engine = flashomni.enable(model, config(tau_kv=0.3))
    generator = torch.Generator().manual_seed(2)
    text, x = (torch.randn(shape, generator=generator) for shape in ((1, 20, 16), (1, 4, 3, 20, 22)))
    engine.begin(8)
    for i in range(8):
        if i == 4:
            x = x[:, :, [0, -1]]
        with torch.no_grad():
            got = model(x, torch.tensor([1000.0 - 100 * i]), text, return_dict=False)[0]
            with flashomni.disabled(model):
                want = model(x, torch.tensor([1000.0 - 100 * i]), text, return_dict=False)[0]
        assert got.shape == want.shape and error(got, want) < 0.3
        engine.step()
    assert {symbols.q_tokens for symbols in flashomni.stats(model).symbols.values()} == {220}
