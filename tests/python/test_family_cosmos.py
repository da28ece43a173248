"""Cosmos: video without text in self-attention; pipelines whose scheduler steps once or twice a step."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from family_checks import (
    ROUNDING,
    check_compiled_blocks,
    check_drift_follows,
    check_nothing_reused_is_dense,
    check_passes,
    check_sparse_runs,
    config,
    error,
    lively,
    quiet,
)

import flashomni


class NoChecker:
    """Stands for the pipelines' guard of prompts and videos, which latents do not pass."""

    def to(self, device: torch.device) -> None:
        pass


def transformer(**changes) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 8,
        "max_size": (4, 32, 32),
        "concat_padding_mask": False,  # needs torchvision
    }
    model = CosmosTransformer3DModel(**(settings | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("learnable_pos_embed"):
                parameter.normal_()
    return lively(model)


def pipeline(cls=CosmosTextToWorldPipeline, scheduler=None):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    parts |= {"scheduler": scheduler or EDMEulerScheduler(), "safety_checker": NoChecker()}
    return quiet(cls(transformer=transformer(), **parts))


def case() -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """(model, x, inputs): two videos of 3 frames of 7 x 8 tokens."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 20, 16, generator=generator),
        "attention_mask": torch.arange(20) < torch.tensor([[13], [6]]),  # of the cross-attention
    }
    model = transformer(extra_pos_embed_type=None)  # as Predict2 has it
    return model, torch.randn(2, 4, 3, 14, 16, generator=generator), inputs


def draw(pipe, steps: int, batch: int = 1, guided: bool = False) -> torch.Tensor:
    """3 frames of 7 x 8 tokens; of a picture, 14 x 12."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    picture = isinstance(pipe, Cosmos2TextToImagePipeline)
    shape, sizes = (3, 14, 16), {"height": 112, "width": 128, "num_frames": 9}
    if picture:
        shape, sizes = (1, 28, 24), {"height": 224, "width": 192}
    inputs = {"prompt_embeds": noise(batch, 20, 16), "latents": noise(batch, 4, *shape)}
    if guided:
        inputs["negative_prompt_embeds"] = noise(batch, 20, 16)
    options = {"guidance_scale": 5.0 if guided else 1.0, "num_inference_steps": steps}
    return pipe(**inputs, **sizes, **options, output_type="latent", return_dict=False)[0]


def test_nothing_reused_is_dense() -> None:
    """The scheduler's step() is called twice a step; the clock hears one."""
    check_nothing_reused_is_dense(pipeline(), draw)


def test_guidance_in_two_passes() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, batch=2, guided=True)

    pipe = pipeline()
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert stats.passes == 16 and {context for context, _ in stats.symbols} == {0, 1}


def test_pictures() -> None:
    pipe = pipeline(Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    check_nothing_reused_is_dense(pipe, draw)
    stats = check_sparse_runs(pipe, draw)
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {168}


def test_drift_reuses_and_what_follows_too() -> None:
    check_drift_follows(pipeline(), draw)


def test_conditions() -> None:
    """Frames with times of their own, a picture in the cross-attention, residuals of a ControlNet."""
    model = transformer(
        in_channels=5,
        controlnet_block_every_n=2,
        img_context_dim_in=8,
        img_context_num_tokens=6,
        img_context_dim_out=128,
    )
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = torch.zeros(2, 1, 3, 14, 16)
    given[:, :, 0] = 1
    x, inputs = (
        noise(2, 4, 3, 14, 16),
        {
            "encoder_hidden_states": (noise(2, 20, 16), noise(2, 6, 8)),
            "block_controlnet_hidden_states": [noise(2, 168, 128)],
            "condition_mask": given,
        },
    )

    def outputs(engine=None) -> list[torch.Tensor]:
        """Of 3 steps; frame 0 is given, at time 0."""
        results = []
        for t in (900.0, 700.0, 500.0):
            times = torch.tensor([0.0, t, t]).expand(2, -1).reshape(2, 1, 3, 1, 1)
            results.append(model(x, times, return_dict=False, **inputs)[0])
            if engine is not None:
                engine.step()
        return results

    want = outputs()
    engine = flashomni.enable(model, config(policy="dense", strict=True, disable_cache_before_step=0))
    engine.begin(3)
    for got, exact in zip(outputs(engine), want, strict=True):
        assert error(got, exact) < ROUNDING
    assert engine.run_stats().steps["dispatch"] > 0


def test_passes() -> None:
    model, x, inputs = case()
    stats = check_passes(model, x, inputs)
    assert {(symbols.batch, symbols.q_tokens) for symbols in stats.symbols.values()} == {(2, 168)}


def test_compiled_blocks() -> None:
    check_compiled_blocks(pipeline(), draw, "transformer_blocks")


@pytest.mark.parametrize("preset", ["quality", "balanced"])
def test_explain(preset: str) -> None:
    answer = flashomni.explain(pipeline(), preset)
    gemms = "sparse" if preset == "balanced" else "dense"
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse", gemms, gemms) for r in answer.rows)
    assert not any(row.notes for row in answer.rows) and "criterion for S_c is undefined" in str(answer)
