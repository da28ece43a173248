"""Mochi: guidance in one batch whose texts differ in length, an angle a head."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, lively, quiet

import flashomni


def pipeline() -> MochiPipeline:
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=20,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        MochiPipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int) -> torch.Tensor:
    """3 frames of 8 x 8 tokens; 13 and 6 of 20 text tokens are not padding."""
    generator = torch.Generator().manual_seed(1)

    def mask(valid: int) -> torch.Tensor:
        return (torch.arange(20) < valid)[None]

    return pipe(
        prompt_embeds=torch.randn(1, 20, 16, generator=generator),
        prompt_attention_mask=mask(13),
        negative_prompt_embeds=torch.randn(1, 20, 16, generator=generator),
        negative_prompt_attention_mask=mask(6),
        latents=torch.randn(1, 4, 3, 16, 16, generator=generator),
        height=128,
        width=128,
        num_frames=13,
        guidance_scale=3.0,
        num_inference_steps=steps,
        output_type="latent",
    ).frames


def test_nothing_reused_is_dense() -> None:
    check_nothing_reused_is_dense(pipeline(), draw)


def test_sparse_runs() -> None:
    stats = check_sparse_runs(pipeline(), draw)
    assert stats.passes == 8
    assert {(symbols.batch, symbols.q_tokens) for symbols in stats.symbols.values()} == {(2, 192 + 13)}


def test_explain() -> None:
    answer = flashomni.explain(pipeline())
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
