"""HunyuanVideo 1.5: three conditions in one stream, valid tokens first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from family_checks import check_nothing_reused_is_dense, check_passes, check_sparse_runs, lively, quiet


def model(in_channels: int = 4) -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return lively(
        HunyuanVideo15Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=in_channels,
            out_channels=4,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(16, 24, 24),
            text_embed_2_dim=8,
            image_embed_dim=12,
            target_size=16,
            task_type="t2v",
        )
    )


@pytest.mark.parametrize("picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("valid", [(13,), (20,), (13, 6)], ids=str)
def test_passes(valid: tuple[int, ...], picture: bool) -> None:
    """3 frames of 8 x 8 tokens, 20 of text, 6 of glyphs, 9 of a picture."""
    generator = torch.Generator().manual_seed(2)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {
        "encoder_hidden_states": noise(20, 16),
        "encoder_attention_mask": (torch.arange(20) < torch.tensor(valid)[:, None]).long(),
        "encoder_hidden_states_2": noise(6, 8),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6])[:batch],
        "image_embeds": noise(9, 12) * picture,
    }
    stats = check_passes(model(), noise(4, 3, 8, 8), inputs)
    condition = max(valid) + 2 + (9 if picture else 1)
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {192 + condition}


class Vae:
    """What the pipeline asks of one that is never called."""

    config = SimpleNamespace(latent_channels=4)
    temporal_compression_ratio, spatial_compression_ratio = 4, 16


def test_the_pipeline_with_its_guider() -> None:
    """Two passes a step, called by the guider's names; in_channels are latents, condition and mask."""

    def run(pipe, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)

        def embeddings(prefix: str, valid: int) -> dict[str, torch.Tensor]:
            return {
                f"{prefix}prompt_embeds": torch.randn(1, 20, 16, generator=generator),
                f"{prefix}prompt_embeds_mask": (torch.arange(20) < valid)[None].long(),
                f"{prefix}prompt_embeds_2": torch.randn(1, 6, 8, generator=generator),
                f"{prefix}prompt_embeds_mask_2": (torch.arange(6) < valid // 4)[None].long(),
            }

        return pipe(
            **embeddings("", 13),
            **embeddings("negative_", 2),
            latents=torch.randn(1, 4, 3, 8, 8, generator=generator),
            height=128,
            width=128,
            num_frames=9,
            num_inference_steps=steps,
            output_type="latent",
        ).frames

    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = quiet(
        HunyuanVideo15Pipeline(
            transformer=model(in_channels=9),
            vae=Vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            guider=ClassifierFreeGuidance(guidance_scale=3.0),
            **parts,
        )
    )
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 16
    assert {name for name, _ in stats.symbols} == {"pred_cond", "pred_uncond"}
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {192 + 13 + 3 + 1, 192 + 2 + 1 + 1}
