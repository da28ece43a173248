"""Allegro: video without text in self-attention, head_dim 96, a third of a head for each axis."""

from __future__ import annotations

import pytest
import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, EulerAncestralDiscreteScheduler
from family_checks import (
    ROUNDING,
    check_drift_follows,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    config,
    denoise,
    error,
    lively,
    quiet,
)
from torch._dynamo.exc import TorchDynamoException

import flashomni


def transformer() -> AllegroTransformer3DModel:
    torch.manual_seed(0)
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=96,
        num_layers=2,
        cross_attention_dim=192,
        sample_height=14,
        sample_width=16,
        sample_frames=3,
        caption_channels=16,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.mul_(8)
    return lively(model)


def pipeline() -> AllegroPipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        AllegroPipeline(transformer=transformer(), scheduler=EulerAncestralDiscreteScheduler(), **parts)
    )


def case() -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): two videos of 3 frames of 7 x 8 tokens."""
    generator, pipe = torch.Generator().manual_seed(2), pipeline()
    inputs = {
        "encoder_hidden_states": torch.randn(2, 1, 20, 16, generator=generator),
        "encoder_attention_mask": torch.arange(20) < torch.tensor([[13], [6]]),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(2, 112, 128, 3, torch.device("cpu")),
    }
    return pipe.transformer, torch.randn(2, 4, 3, 14, 16, generator=generator), inputs


def draw(pipe, steps: int, valid: tuple[int, ...] = (20,), guided: bool = False) -> torch.Tensor:
    """3 frames of 7 x 8 tokens, 20 of text in the cross-attention, `valid` of which are not padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "prompt_attention_mask": mask,
        "latents": noise(batch, 4, 3, 14, 16),
        "negative_prompt": None,
        "generator": generator,
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_attention_mask": mask.flip(0),
        }
    sizes = {"height": 112, "width": 128, "num_frames": 12, "num_inference_steps": steps}
    return pipe(**inputs, **sizes, guidance_scale=7.5 if guided else 1.0, output_type="latent").frames


@pytest.mark.parametrize("valid", [(20,), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, valid))


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, (13, 6), guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 8
    assert {(symbols.batch, symbols.q_tokens) for symbols in stats.symbols.values()} == {(4, 168)}


def test_rotations_matter_and_are_the_models_own_where_it_is_disabled() -> None:
    model, x, inputs = case()
    want = denoise(model, x, inputs, 2)[-1]
    assert error(denoise(model, x, inputs | {"image_rotary_emb": None}, 2)[-1], want) > 1e-3
    engine = flashomni.enable(model, config(policy="dense"))
    with flashomni.disabled(model):
        assert torch.equal(denoise(model, x, inputs, 2)[-1], want)
    assert error(denoise(model, x, inputs, 2, engine)[-1], want) < ROUNDING


def test_drift_reuses_and_what_follows_too() -> None:
    check_drift_follows(pipeline(), draw)


def test_what_is_refused() -> None:
    model, x, inputs = case()
    engine = flashomni.enable(model, config())
    with pytest.raises(NotImplementedError, match="attention_mask: expected None in transformer_blocks.0"):
        denoise(model, x, inputs | {"attention_mask": torch.ones(2, 3, 14, 16)}, 2, engine)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    with pytest.raises(TorchDynamoException, match="image_rotary_emb: expected tensors in a compiled block"):
        denoise(model, x, inputs, 2, engine)
    torch.compiler.reset()


@pytest.mark.parametrize("preset", ["quality", "balanced"])
def test_explain(preset: str) -> None:
    answer = flashomni.explain(pipeline(), preset)
    gemms = "sparse" if preset == "balanced" else "dense"
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", gemms, gemms) for r in answer.rows)
    assert not any(row.notes for row in answer.rows) and "criterion for S_c is undefined" in str(answer)
