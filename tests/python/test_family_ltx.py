"""LTX-Video: norms and RoPE over all heads, cross-attention with padding left alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from family_checks import (
    check_memory,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    config,
    error,
    lively,
    quiet,
)

import flashomni


def pipeline() -> LTXPipeline:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=128,
        caption_channels=16,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.mul_(8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(LTXPipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def draw(pipe, steps: int, valid: tuple[int, ...] = (20,), guided: bool = False) -> torch.Tensor:
    """3 frames of 7 x 8 tokens; 20 of text in the cross-attention, `valid` of which are not padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "prompt_attention_mask": mask,
        "latents": noise(batch, 168, 4),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_attention_mask": mask.flip(0),
        }
    sizes = {"height": 224, "width": 256, "num_frames": 17, "num_inference_steps": steps}
    scale = 3.0 if guided else 1.0
    return pipe(**inputs, **sizes, guidance_scale=scale, output_type="latent").frames


@pytest.mark.parametrize("valid", [(20,), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, valid))


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, (13, 6), guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 8


def test_drift() -> None:
    pipe = pipeline()
    want = draw(pipe, 8)
    flashomni.enable(pipe, config(policy="drift", tau_q=0.8, ramp_power=0))
    assert 1e-5 < error(draw(pipe, 8), want) < 0.5
    assert flashomni.stats(pipe).cache_density < 1


def test_memory() -> None:
    check_memory(pipeline(), draw, text_tokens=0)


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", "rows", "sparse") for r in answer.rows)
    assert not any(row.notes for row in answer.rows)
    assert "Every head has a rotation of its own" in str(answer)
