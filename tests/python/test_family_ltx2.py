"""LTX-2: the video's self-attention, beside sound; a rotation a head in two forms."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, lively

import flashomni


@dataclass
class Pipe:
    """What enable() needs of a pipeline; diffusers' own wants connectors, two VAEs and a vocoder."""

    transformer: LTX2VideoTransformer3DModel
    scheduler: FlowMatchEulerDiscreteScheduler


def pipeline(**changes) -> Pipe:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=128,
        caption_channels=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        rope_double_precision=False,
        **changes,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.mul_(8)
    return Pipe(lively(model), FlowMatchEulerDiscreteScheduler())


def draw(pipe, steps: int, batch: int = 2) -> torch.Tensor:
    """3 frames of 7 x 8 tokens and 9 of sound, with a scheduler each, as diffusers' pipelines have it."""
    generator = torch.Generator().manual_seed(1)
    video, audio, text, sound_text = (
        torch.randn(shape, generator=generator)
        for shape in ((batch, 168, 4), (batch, 9, 4), (batch, 20, 16), (batch, 20, 16))
    )
    audio_scheduler = copy.deepcopy(pipe.scheduler)
    audio_scheduler.set_timesteps(steps)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        of_video, of_audio = pipe.transformer(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=text,
            audio_encoder_hidden_states=sound_text,
            timestep=t.expand(batch),
            num_frames=3,
            height=7,
            width=8,
            audio_num_frames=9,
            return_dict=False,
        )
        video = pipe.scheduler.step(of_video, t, video, return_dict=False)[0]
        audio = audio_scheduler.step(of_audio, t, audio, return_dict=False)[0]
    return torch.cat([video.flatten(1), audio.flatten(1)], dim=1)


@pytest.mark.parametrize("form", ["interleaved", "split"])
def test_nothing_reused_is_dense(form: str) -> None:
    pipe = pipeline(rope_type=form)
    check_nothing_reused_is_dense(pipe, draw)
    check_sparse_runs(pipe, draw)


def test_gated_heads_are_left_dense() -> None:
    pipe = pipeline(gated_attn=True)
    with pytest.raises(NotImplementedError, match="no layer can be sparse:\n.*gates its heads"):
        flashomni.enable(pipe, config())


def test_deep_copies_of_a_scheduler_drive_nobody() -> None:
    pipe = pipeline()
    engine = flashomni.enable(pipe, config())
    clone = copy.deepcopy(pipe.scheduler)
    clone.set_timesteps(7)
    assert engine._pending is None and len(clone.timesteps) == 7
    assert type(clone) is FlowMatchEulerDiscreteScheduler and clone.config == pipe.scheduler.config
    assert not any("flashomni" in name for name in clone.__dict__)
    flashomni.disable(pipe)
    assert not {"step", "set_timesteps", "__deepcopy__"} & set(pipe.scheduler.__dict__)


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", "rows", "sparse") for r in answer.rows)
    assert "Outside of FlashOmni: the sound's" in str(answer) and not any(row.notes for row in answer.rows)
