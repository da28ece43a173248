"""Stable Diffusion 3 and 3.5: no RoPE, a second attention over the image, a last block without text."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from family_checks import (
    check_compiled_blocks,
    check_memory,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    config,
    lively,
    quiet,
)

import flashomni


def pipeline(**changes) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "sample_size": 32,
        "joint_attention_dim": 16,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    model = SD3Transformer2DModel(**(settings | changes))
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts = dict.fromkeys((*names, "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(StableDiffusion3Pipeline(transformer=lively(model), scheduler=scheduler, **parts))


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """12 x 14 tokens with 20 of text."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "pooled_prompt_embeds": noise(batch, 16),
        "latents": noise(batch, 4, 24, 28),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_pooled_prompt_embeds": noise(batch, 16),
        }
    sizes = {"height": 192, "width": 224, "num_inference_steps": steps}
    scale = 5.0 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").images


@pytest.mark.parametrize("changes", [{}, {"qk_norm": None, "dual_attention_layers": ()}], ids=["3.5", "3"])
def test_nothing_reused_is_dense(changes: dict) -> None:
    check_nothing_reused_is_dense(pipeline(**changes), draw)


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 8 and {layer for _, layer in stats.symbols} == {0, 1, 2}


def test_guidance_by_skipped_layers() -> None:
    """A third pass in the middle of the run, without some layers: its own context, dense until an Update."""
    pipe, options = pipeline(), {"batch": 1, "guided": True, "skip_guidance_layers": [0]}
    want = draw(pipe, 6, **options)
    flashomni.enable(pipe, config(policy="dense"))
    torch.testing.assert_close(draw(pipe, 6, **options), want, rtol=1e-4, atol=1e-4)


def test_compiled_blocks() -> None:
    """Also the last one, without an output for the text."""
    check_compiled_blocks(pipeline(), draw, "transformer_blocks")


def test_memory() -> None:
    check_memory(pipeline(), draw, text_tokens=20)


def test_options_of_processors_are_refused() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config())
    with pytest.raises(NotImplementedError, match="got ip_adapter_image_embeds"):
        draw(pipe, 2, joint_attention_kwargs={"ip_adapter_image_embeds": []})


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    names = ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"]
    assert [row.name for row in answer.rows] == names and not any(row.notes for row in answer.rows)
    assert [row.gemm_q for row in answer.rows] == ["sparse", "dense", "sparse"]
    assert "attn2 (3.5 Medium) is over the image alone" in str(answer)
