"""Lumina-Image 2.0: one stream, grouped heads of 96, padding that the model leaves out itself."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from family_checks import (
    check_compiled_blocks,
    check_memory,
    check_nothing_reused_is_dense,
    check_passes,
    check_sparse_runs,
    check_text_is_never_cached,
    config,
    denoise,
    lively,
    quiet,
)

import flashomni


def transformer(kv_heads: int = 2) -> Lumina2Transformer2DModel:
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=32,
        in_channels=4,
        hidden_size=384,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=kv_heads,
        multiple_of=32,
        axes_dim_rope=(32, 32, 32),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    return lively(model)


def pipeline() -> Lumina2Pipeline:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        Lumina2Pipeline(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def padding(*valid: int) -> torch.Tensor:
    """A mask of texts with 20 tokens, of which `valid` are not padding."""
    return (torch.arange(20) < torch.tensor(valid)[:, None]).long()


def case(*valid: int, kv_heads: int = 2) -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): pictures of 12 x 14 tokens, one for each text; without any, two with 13 tokens."""
    generator, mask = torch.Generator().manual_seed(2), padding(*(valid or (13, 13)))
    inputs = {
        "encoder_hidden_states": torch.randn(len(mask), 20, 16, generator=generator),
        "encoder_attention_mask": mask,
    }
    return transformer(kv_heads), torch.randn(len(mask), 4, 24, 28, generator=generator), inputs


def draw(pipe, steps: int, batch: int = 1, guided: bool = False, **options) -> torch.Tensor:
    """12 x 14 tokens with 13 of text, 6 in the pass that guides; padding up to 20."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "prompt_attention_mask": padding(*[13] * batch),
        "latents": noise(batch, 4, 24, 28),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_attention_mask": padding(*[6] * batch),
        }
    sizes = {"height": 192, "width": 224, "num_inference_steps": steps}
    scale = 4.0 if guided else 1.0
    return pipe(**inputs, **sizes, **options, guidance_scale=scale, output_type="latent").images


def test_nothing_reused_is_dense() -> None:
    check_nothing_reused_is_dense(pipeline(), draw)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_of_keys(kv_heads: int) -> None:
    stats = check_passes(*case(kv_heads=kv_heads))
    assert {(symbols.batch, symbols.heads) for symbols in stats.symbols.values()} == {(2, 4)}


def test_guidance_in_two_passes() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 16
    tokens = {(context, symbols.q_tokens) for (context, _), symbols in stats.symbols.items()}
    assert tokens == {(0, 181), (1, 174)}


def test_guidance_that_ends_early() -> None:
    stats = check_sparse_runs(
        pipeline(), lambda pipe, steps: draw(pipe, steps, guided=True, cfg_trunc_ratio=0.5)
    )
    assert stats.passes == 12


def test_the_papers_policy_caches_images_and_never_text() -> None:
    check_text_is_never_cached(pipeline(), draw)


def test_memory() -> None:
    check_memory(pipeline(), draw, text_tokens=13)


def test_compiled_blocks() -> None:
    check_compiled_blocks(pipeline(), draw, "layers")


def test_what_is_refused() -> None:
    model, x, inputs = case(13, 6)
    engine = flashomni.enable(model, config())
    expected = r"encoder_attention_mask: expected as many valid text tokens .* got \[6, 13\]"
    with pytest.raises(NotImplementedError, match=expected):
        denoise(model, x, inputs, 2, engine)
    with pytest.raises(ValueError, match="expected valid tokens first"):
        denoise(model, x, inputs | {"encoder_attention_mask": padding(13, 13).flip(1)}, 2, engine)
    with pytest.raises(NotImplementedError, match="attention_kwargs: expected nothing but scale, got mask"):
        denoise(model, x, inputs | {"attention_kwargs": {"mask": 1}}, 2, engine)
    with flashomni.disabled(model):
        denoise(model, x, inputs, 2)


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "balanced")
    assert [row.name for row in answer.rows] == ["layers.0", "layers.1"]
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert "Heads of keys and values are repeated" in str(answer)
