"""CogView4: one set of projections, one feed-forward called for the image and then for the text."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from family_checks import (
    ROUNDING,
    OddRows,
    check_compiled_blocks,
    check_forecast_rows,
    check_memory,
    check_nothing_reused_is_dense,
    check_sparse_runs,
    check_text_is_never_cached,
    config,
    denoise,
    error,
    lively,
    quiet,
)

import flashomni


def transformer() -> CogView4Transformer2DModel:
    torch.manual_seed(0)
    model = CogView4Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=32,
    )
    return lively(model)


def pipeline() -> CogView4Pipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(CogView4Pipeline(transformer=transformer(), scheduler=scheduler, **parts))


def case(text: int = 20) -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): two pictures of 12 x 14 tokens."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(2, text, 16, generator=generator),
        "original_size": torch.tensor([[192.0, 224.0]] * 2),
        "target_size": torch.tensor([[192.0, 224.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }
    return transformer(), torch.randn(2, 4, 24, 28, generator=generator), inputs


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """12 x 14 tokens with 20 of text; 13 for the pass that guides."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {"prompt_embeds": noise(batch, 20, 16), "latents": noise(batch, 4, 24, 28)}
    if guided:
        inputs["negative_prompt_embeds"] = noise(batch, 13, 16)
    sizes = {"height": 192, "width": 224, "num_inference_steps": steps}
    scale = 5.0 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").images


def test_nothing_reused_is_dense() -> None:
    check_nothing_reused_is_dense(pipeline(), draw)


def test_guidance_in_two_passes() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 16
    tokens = {(context, symbols.q_tokens) for (context, _), symbols in stats.symbols.items()}
    assert tokens == {("cond", 188), ("uncond", 181)}


def test_the_papers_policy_caches_images_and_never_text() -> None:
    check_text_is_never_cached(pipeline(), draw)


@pytest.mark.parametrize("mlp", ["dense", "follow"])
def test_memory(mlp: str) -> None:
    check_memory(pipeline(), draw, text_tokens=20, mlp=mlp)


def test_images_rows_follow_and_texts_do_not() -> None:
    pipe = pipeline()
    engine = flashomni.enable(pipe, config(disable_cache_before_step=3, mlp="follow"), policy=OddRows())
    module = pipe.transformer.transformer_blocks[0].ff
    ours, of_image, texts = module.forward, [], 0

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal texts
        out, exact = ours(x), type(module).forward(module, x)
        if x.shape[1] == 168:
            of_image.append((engine.plan, exact.double(), out.double()))
        else:
            texts += 1
            assert x.shape[1] == 20 and error(out, exact) < ROUNDING
        return out

    module.forward = watched
    draw(pipe, 11)
    assert texts == 11
    cache, _ = engine.contexts.get(engine.context, 0).symbols.masks()
    active = cache.any(1)[:, (torch.arange(168) + 20) // 64].unsqueeze(-1)
    assert 0 < int(active.sum()) < active.numel()
    check_forecast_rows(of_image, active, 1, 1e-5)


def test_streams_that_cannot_be_told_apart_are_refused() -> None:
    model, x, inputs = case(text=168)
    engine = flashomni.enable(model, config(mlp="follow"))
    with pytest.raises(NotImplementedError, match="mlp: expected 'dense' where the text has as many tokens"):
        denoise(model, x, inputs, 2, engine)
    flashomni.disable(model)
    want = denoise(model, x, inputs, 6)[-1]
    engine = flashomni.enable(model, config(policy="dense"))
    assert error(denoise(model, x, inputs, 6, engine)[-1], want) < ROUNDING


def test_masks_and_options_are_refused() -> None:
    model, x, inputs = case()
    engine = flashomni.enable(model, config())
    with pytest.raises(NotImplementedError, match="attention_mask: expected None in transformer_blocks.0"):
        denoise(model, x, inputs | {"attention_mask": torch.ones(2, 20)}, 2, engine)
    with pytest.raises(NotImplementedError, match="attention_kwargs: expected nothing but scale, got mask"):
        denoise(model, x, inputs | {"attention_kwargs": {"mask": 1}}, 2, engine)


def test_compiled_blocks() -> None:
    check_compiled_blocks(pipeline(), draw, "transformer_blocks")


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), config(mlp="follow"))
    assert all((r.attention, r.gemm_q, r.gemm_o, r.mlp) == (*("sparse",) * 3, "follow") for r in answer.rows)
    assert not any(row.notes for row in answer.rows) and "RoPE (pairs of the halves" in str(answer)
