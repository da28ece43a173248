"""Z-Image: one stream, guidance in one batch whose texts differ in length."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, lively, quiet

import flashomni


def pipeline() -> ZImagePipeline:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=128,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        n_refiner_layers=1,
        in_channels=4,
        cap_feat_dim=16,
        axes_dims=[16, 24, 24],
        axes_lens=[256, 64, 64],
    )
    with torch.no_grad():
        model.x_pad_token.normal_()
        model.cap_pad_token.normal_()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        ZImagePipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int, texts: tuple[int, ...] = (20,), negatives: tuple[int, ...] = ()) -> torch.Tensor:
    """14 x 15 tokens, with texts of some lengths."""
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=[torch.randn(n, 16, generator=generator) for n in texts],
        negative_prompt_embeds=[torch.randn(n, 16, generator=generator) for n in negatives],
        latents=torch.randn(len(texts), 4, 28, 30, generator=generator),
        height=224,
        width=240,
        guidance_scale=3.0 if negatives else 0.0,
        num_inference_steps=steps,
        output_type="latent",
    ).images


CASES = [((20,), ()), ((20, 25), ()), ((20,), (40,)), ((20, 70), (33, 5))]


@pytest.mark.parametrize(("texts", "negatives"), CASES, ids=str)
def test_nothing_reused_is_dense(texts: tuple[int, ...], negatives: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, texts, negatives))


def test_sparse_runs() -> None:
    pipe = pipeline()
    said = flashomni.memory(config(), pipe, image_tokens=224, text_tokens=64, batch=2)
    stats = check_sparse_runs(pipe, lambda pipe, steps: draw(pipe, steps, (20,), (40,)))
    assert stats.bytes_held == said.by_kind
    assert stats.passes == 8  # both passes of guidance are one batch
    assert {symbols.batch for symbols in stats.symbols.values()} == {2}


def test_explain_and_what_is_refused() -> None:
    pipe = pipeline()
    answer = flashomni.explain(pipe)
    assert [(r.name, r.attention, r.gemm_q, r.gemm_o) for r in answer.rows] == [
        (f"layers.{i}", "sparse", "sparse", "sparse") for i in range(2)
    ]
    engine = flashomni.enable(pipe, config())
    engine.begin(4)
    with pytest.raises(NotImplementedError, match="x: expected pictures of one size"):
        pipe.transformer(
            [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 10)], torch.ones(2), [torch.randn(5, 16)] * 2
        )
