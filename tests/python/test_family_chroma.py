"""Chroma: padded text in front, single blocks that are given the joint sequence whole."""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, error, lively, quiet

import flashomni


def pipeline() -> ChromaPipeline:
    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(16, 24, 24),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    with torch.no_grad():
        model.distilled_guidance_layer.out_proj.weight.mul_(8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        ChromaPipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int, valid: int = 13, batch: int = 1, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """14 x 16 tokens with 20 of text, `valid` of which are not padding; guided by two passes."""
    generator = torch.Generator().manual_seed(1)

    def mask(length: int) -> torch.Tensor:
        return (torch.arange(20) < length).expand(batch, -1).to(dtype)

    return pipe(
        prompt_embeds=torch.randn(batch, 20, 32, generator=generator),
        prompt_attention_mask=mask(valid),
        negative_prompt_embeds=torch.randn(batch, 20, 32, generator=generator),
        negative_prompt_attention_mask=mask(7),
        latents=torch.randn(batch, 224, 4, generator=generator),
        height=224,
        width=256,
        guidance_scale=3.0,
        num_inference_steps=steps,
        output_type="latent",
    ).images


@pytest.mark.parametrize(("valid", "batch"), [(13, 1), (20, 1), (13, 2)])
def test_nothing_reused_is_dense(valid: int, batch: int) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, valid, batch))


def test_sparse_runs() -> None:
    stats = check_sparse_runs(pipeline(), draw)
    assert stats.passes == 16  # no cache context: passes are told apart by their number
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {224 + 13, 224 + 7}


def test_float_masks_are_taken_as_masks_and_that_is_said() -> None:
    pipe = pipeline()
    want = draw(pipe, 6)
    flashomni.enable(pipe, config(policy="dense"))
    with pytest.warns(UserWarning, match="attention_mask: expected bool, got a float mask"):
        assert error(draw(pipe, 6, dtype=torch.float32), want) < 1e-5
    flashomni.disable(pipe)
    flashomni.enable(pipe, config(strict=True))
    with pytest.raises(NotImplementedError, match="expected bool, got a float mask"):
        draw(pipe, 6, dtype=torch.float32)


def test_texts_of_several_lengths_are_refused() -> None:
    pipe = pipeline()
    engine = flashomni.enable(pipe, config())
    engine.begin(4)
    mask = torch.ones(2, 84, dtype=torch.bool)
    mask[0, 13:20] = False
    with pytest.raises(NotImplementedError, match=r"as many valid text tokens .* got \[13, 20\]"):
        pipe.transformer(
            hidden_states=torch.randn(2, 64, 4),
            encoder_hidden_states=torch.randn(2, 20, 32),
            timestep=torch.ones(2),
            img_ids=torch.zeros(64, 3),
            txt_ids=torch.zeros(20, 3),
            attention_mask=mask,
        )
