"""CogVideoX and ConsisID: text first, one set of projections for both streams, LayerNorms of q and k."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
)
from diffusers.schedulers import CogVideoXDPMScheduler
from family_checks import (
    check_memory,
    check_nothing_reused_is_dense,
    check_passes,
    check_sparse_runs,
    check_text_is_never_cached,
    config,
    denoise,
    error,
    lively,
    quiet,
)

import flashomni
from flashomni.policies import RandomPolicy

SIZES = {
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "sample_width": 16,
    "sample_height": 14,
    "sample_frames": 9,
    "max_text_seq_length": 20,
}


def pipeline(scheduler=None, rotary: bool = True) -> CogVideoXPipeline:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        **SIZES,
        use_rotary_positional_embeddings=rotary,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        CogVideoXPipeline(transformer=lively(model), scheduler=scheduler or CogVideoXDDIMScheduler(), **parts)
    )


def consisid() -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): batch 2, 3 frames of 7 x 8 tokens with 20 of text, a face after the first block."""
    torch.manual_seed(0)
    model = ConsisIDTransformer3DModel(
        num_attention_heads=3,
        **SIZES,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=24,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=128,
        LFE_num_scale=2,
    )
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    angles = 3.0 * noise(168, 32)
    inputs = {
        "encoder_hidden_states": noise(2, 20, 16),
        "image_rotary_emb": tuple(table.repeat_interleave(2, -1) for table in (angles.cos(), angles.sin())),
        "id_cond": noise(2, 24),
        "id_vit_hidden": [noise(2, 9, 16) for _ in range(2)],
    }
    return lively(model), noise(2, 3, 4, 14, 16), inputs


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """3 frames of 7 x 8 tokens with 20 of text."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "latents": noise(batch, 3, 4, 14, 16),
        "generator": generator,
    }
    if guided:
        inputs["negative_prompt_embeds"] = noise(batch, 20, 16)
    sizes = {"height": 112, "width": 128, "num_frames": 9, "num_inference_steps": steps}
    scale = 6.0 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").frames


@pytest.mark.parametrize("rotary", [True, False])
def test_nothing_reused_is_dense(rotary: bool) -> None:
    check_nothing_reused_is_dense(pipeline(rotary=rotary), draw)


def test_guidance_in_one_batch() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline(CogVideoXDPMScheduler())
    check_nothing_reused_is_dense(pipe, run)
    assert check_sparse_runs(pipe, run).passes == 8


def test_the_papers_policy_caches_video_and_never_text() -> None:
    check_text_is_never_cached(pipeline(), draw)


def test_memory() -> None:
    check_memory(pipeline(), draw, text_tokens=20)


def test_options_of_processors_are_refused() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config())
    with pytest.raises(NotImplementedError, match="attention_kwargs: expected nothing but scale, got mask"):
        draw(pipe, 2, attention_kwargs={"mask": 1})


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert "LayerNorms: called as modules on all tiles" in str(answer)


def test_consisid() -> None:
    """Attentions to the face, between the blocks, stay the model's own; they matter here."""
    model, x, inputs = consisid()
    said = flashomni.memory(config(), model, image_tokens=168, text_tokens=20, batch=2)
    other = inputs | {"id_cond": -inputs["id_cond"]}
    assert error(denoise(model, x, other, 2)[-1], denoise(model, x, inputs, 2)[-1]) > 1e-3
    stats = check_passes(model, x, inputs)
    assert stats.bytes_held == said.by_kind
    assert {(symbols.batch, symbols.q_tokens) for symbols in stats.symbols.values()} == {(2, 188)}
    answer = flashomni.explain(model, config(mlp="follow"))
    assert all((r.attention, r.gemm_q, r.gemm_o, r.mlp) == (*("sparse",) * 3, "follow") for r in answer.rows)
    assert "the face's extractor" in str(answer)


def test_consisid_follows() -> None:
    model, x, inputs = consisid()
    want = denoise(model, x, inputs, 8)[-1]
    engine = flashomni.enable(model, config(mlp="follow", strict=True), policy=RandomPolicy(0.6, 0.6))
    assert 1e-5 < error(denoise(model, x, inputs, 8, engine)[-1], want) < 0.5


def test_options_of_consisids_processors_are_refused() -> None:
    model, x, inputs = consisid()
    engine = flashomni.enable(model, config())
    with pytest.raises(NotImplementedError, match="attention_kwargs: expected nothing but scale, got mask"):
        denoise(model, x, inputs | {"attention_kwargs": {"mask": 1}}, 2, engine)
