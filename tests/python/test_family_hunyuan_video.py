"""HunyuanVideo: text last, padding as a length."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from family_checks import (
    ROUNDING,
    check_nothing_reused_is_dense,
    check_passes,
    check_sparse_runs,
    config,
    error,
    lively,
    quiet,
)
from graph_stand_in import StandIn

import flashomni


def pipeline(**changes) -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(16, 24, 24),
        **changes,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    return quiet(
        HunyuanVideoPipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int, valid: tuple[int, ...] = (13,), guided: bool = False) -> torch.Tensor:
    """3 frames of 7 x 8 tokens with 20 of text, `valid` of which are not padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(20) < torch.tensor(valid)[:, None]
    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "pooled_prompt_embeds": noise(batch, 8),
        "prompt_attention_mask": mask.long(),
        "latents": noise(batch, 4, 3, 14, 16),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_pooled_prompt_embeds": noise(batch, 8),
            "negative_prompt_attention_mask": mask.flip(0).long(),
            "true_cfg_scale": 3.0,
        }
    sizes = {"height": 112, "width": 128, "num_frames": 9, "num_inference_steps": steps}
    return pipe(**inputs, **sizes, output_type="latent").frames


@pytest.mark.parametrize("valid", [(13,), (20,), (13, 13), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, valid))


def test_guidance_and_batches_with_padding() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, (13, 6), guided=True)

    check_nothing_reused_is_dense(pipeline(), run)
    stats = check_sparse_runs(pipeline(), run)
    assert stats.passes == 16
    tokens = {symbols.q_tokens for symbols in stats.symbols.values()}
    assert tokens == {168 + 13}  # the padding that no element needs is gone


def test_padding_is_never_seen() -> None:
    """What stands in padding changes nothing, in Dispatch steps neither."""
    pipe = pipeline()
    flashomni.enable(pipe, config(tau_kv=0.3))
    forward = pipe.transformer.context_embedder.forward

    def poisoned(states, timestep, mask):
        return forward(torch.where(mask[..., None] > 0, states, 1e4), timestep, mask)

    want = draw(pipe, 8, (13, 6))
    pipe.transformer.context_embedder.forward = poisoned
    assert error(draw(pipe, 8, (13, 6)), want) < ROUNDING


def test_batches_are_like_single_videos() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config(tau_q=0.0, tau_kv=0.0))
    both = draw(pipe, 6, (13, 6))
    flashomni.disable(pipe)
    assert error(both, draw(pipe, 6, (13, 6))) < ROUNDING


def test_graphs_follow_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are replayed only for the lengths that they were captured with; the same bits as without."""
    batches = [(13, 6), (6, 13), (13, 6), (13, 13)]
    pipe = pipeline()
    flashomni.enable(pipe, config(tau_kv=0.3))
    want = [draw(pipe, 11, valid) for valid in batches]
    flashomni.disable(pipe)
    stand_in = StandIn(monkeypatch, flashomni.enable(pipe, config(tau_kv=0.3, cuda_graphs=True)))
    for valid, latents in zip(batches, want, strict=True):
        assert torch.equal(draw(pipe, 11, valid), latents)
    assert stand_in.replays >= 12


def test_memory_is_what_a_run_holds() -> None:
    pipe, settings = pipeline(), config(tau_q=0.3)
    said = flashomni.memory(settings, pipe, image_tokens=168, text_tokens=13, batch=2, contexts=2)
    flashomni.enable(pipe, settings)
    draw(pipe, 8, (13, 6), guided=True)
    assert said.by_kind == flashomni.stats(pipe).bytes_held


def test_token_replacement() -> None:
    """Image to video: the first frame's tokens are modulated and gated by themselves."""
    pipe = pipeline(image_condition_type="token_replace")
    names = {type(block).__name__ for block in pipe.transformer.single_transformer_blocks}
    assert names == {"HunyuanVideoTokenReplaceSingleTransformerBlock"}
    check_nothing_reused_is_dense(pipe, draw)
    check_sparse_runs(pipe, draw)


def test_frames_that_are_given() -> None:
    """FramePack: earlier frames come before those that are drawn, and are protected."""
    torch.manual_seed(0)
    model = lively(
        HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(16, 24, 24),
            image_proj_dim=12,
            has_image_proj=True,
            has_clean_x_embedder=True,
        )
    )
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    inputs = {
        "encoder_hidden_states": noise(20, 16),
        "encoder_attention_mask": (torch.arange(20) < torch.tensor([[13], [6]])).long(),
        "pooled_projections": noise(8),
        "image_embeds": noise(7, 12),
        "guidance": torch.full((2,), 6000.0),
        "indices_latents": torch.arange(3, 6),
        "latents_clean": noise(4, 2, 16, 16),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": noise(4, 2, 16, 16),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(4, 4, 16, 16),
        "indices_latents_history_4x": torch.arange(4),
    }
    stats = check_passes(model, noise(4, 3, 16, 16), inputs)
    drawn, text = 3 * 64, 7 + 13
    for symbols in stats.symbols.values():
        given = symbols.q_tokens - drawn - text
        cache, skip = symbols.masks()
        blocks = -(-given // 64)
        assert given > 64 and bool(cache[:, :, :blocks].all()) and bool(skip[..., :blocks].all())
        assert not bool(cache[:, :, blocks:-1].all())


def test_explain_and_presets() -> None:
    pipe = pipeline()
    answer = flashomni.explain(pipe, "balanced")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert (answer.config.tau_kv, answer.config.cache_interval) == (0.05, 6)
    assert "token refiner" in str(answer) and "preset 'balanced': arXiv 2509.25401" in str(answer)
    with pytest.raises(ValueError, match="fastest.*this model's own presets: quality, balanced, fast"):
        flashomni.enable(pipe, "fastest")
