"""AuraFlow: text and image apart, then together; tokens of the model's own before the text."""

from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from family_checks import (
    check_compiled_blocks,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    config,
    lively,
    quiet,
)

import flashomni


def transformer() -> AuraFlowTransformer2DModel:
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        num_attention_heads=2,
        attention_head_dim=256,
        joint_attention_dim=16,
        caption_projection_dim=512,
        pos_embed_max_size=256,
    )
    with torch.no_grad():
        model.register_tokens.normal_()
    return lively(model)


def pipeline() -> AuraFlowPipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        AuraFlowPipeline(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def case() -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): two pictures of 12 x 14 tokens, 20 of text."""
    generator = torch.Generator().manual_seed(2)
    inputs = {"encoder_hidden_states": torch.randn(2, 20, 16, generator=generator)}
    return transformer(), torch.randn(2, 4, 24, 28, generator=generator), inputs


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """12 x 14 tokens with 20 of text, of which the second half is padding, which the model sees."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(20) < 10).expand(batch, -1)
    inputs = {
        "prompt_embeds": noise(batch, 20, 16) * mask[..., None],
        "prompt_attention_mask": mask,
        "latents": noise(batch, 4, 24, 28),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_attention_mask": mask,
        }
    sizes = {"height": 192, "width": 224, "num_inference_steps": steps}
    scale = 3.5 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").images


def test_nothing_reused_is_dense() -> None:
    check_nothing_reused_is_dense(pipeline(), draw)


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    said = flashomni.memory(config(), pipe, image_tokens=168, text_tokens=28, batch=4)
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 8 and stats.bytes_held == said.by_kind
    assert {(layer, s.batch, s.q_tokens) for (_, layer), s in stats.symbols.items()} == {
        (layer, 4, 196) for layer in range(3)
    }


def test_the_models_own_tokens_are_protected_with_the_text() -> None:
    """8 tokens and the text: with 57 of text they end in the second block of 64 rows."""
    pipe = pipeline()
    flashomni.enable(pipe, config(tau_q=0.9, tau_kv=0.5, ramp_power=0))
    generator = torch.Generator().manual_seed(1)
    for text, protected in ((20, 1), (56, 1), (57, 2)):
        given = {
            "prompt_embeds": torch.randn(1, text, 16, generator=generator),
            "prompt_attention_mask": torch.ones(1, text),
            "latents": torch.randn(1, 4, 24, 28, generator=generator),
        }
        sizes = {"height": 192, "width": 224, "num_inference_steps": 8}
        pipe(**given, **sizes, guidance_scale=1.0, output_type="latent")
        for symbols in flashomni.stats(pipe).symbols.values():
            cache, skip = symbols.masks()
            assert bool(cache[:, :, :protected].all()) and not bool(cache[:, :, protected:].all())
            assert bool(skip[..., :protected][cache].all())


def test_compiled_blocks() -> None:
    check_compiled_blocks(pipeline(), draw, "joint_transformer_blocks", "single_transformer_blocks")


def test_what_is_refused() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config())
    with pytest.raises(NotImplementedError, match="attention_kwargs: expected nothing but scale, got mask"):
        draw(pipe, 2, attention_kwargs={"mask": 1})
    flashomni.disable(pipe)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match="has the processor FusedAuraFlowAttnProcessor2_0"):
        flashomni.enable(pipe, config())


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    names = ["joint_transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert [row.name for row in answer.rows] == names
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert "SwiGLU and the model's own" in str(answer)
