"""Qwen-Image: complex RoPE a stream, text laid last so that its padding is a length."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, error, lively, quiet
from PIL import Image

import flashomni


def pipeline(seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        num_layers=2,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=16,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        QwenImagePipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int, valid: tuple[int, ...] = (13,), guided: bool = False) -> torch.Tensor:
    """16 x 12 tokens with 20 of text, `valid` of which are not padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    inputs = {
        "prompt_embeds": noise(batch, 20, 16),
        "prompt_embeds_mask": mask,
        "latents": noise(batch, 192, 16),
    }
    if guided:
        inputs |= {
            "negative_prompt_embeds": noise(batch, 20, 16),
            "negative_prompt_embeds_mask": mask.flip(0),
            "true_cfg_scale": 3.0,
        }
    sizes = {"height": 256, "width": 192, "num_inference_steps": steps}
    return pipe(**inputs, **sizes, output_type="latent").images


@pytest.mark.parametrize("valid", [(20,), (13,), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...]) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, valid))


def test_guidance_and_batches_with_padding() -> None:
    def run(pipe, steps: int) -> torch.Tensor:
        return draw(pipe, steps, (13, 6), guided=True)

    check_nothing_reused_is_dense(pipeline(), run)
    assert check_sparse_runs(pipeline(), run).passes == 16


def test_padding_in_between_is_refused() -> None:
    pipe = pipeline()
    flashomni.enable(pipe, config())
    mask = torch.ones(1, 20)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention mask: expected valid tokens first"):
        pipe(
            prompt_embeds=torch.randn(1, 20, 16),
            prompt_embeds_mask=mask,
            height=256,
            width=192,
            output_type="latent",
        )


def test_pictures_to_edit_are_protected() -> None:
    """Pictures to edit follow the one that is drawn: never cached nor skipped, unless the config says so."""
    model = pipeline().transformer
    shapes = [[(1, 16, 12), (1, 10, 9)]]

    def passes(after_step=None) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        x, picture, text = (torch.randn(1, n, 16, generator=generator) for n in (192, 90, 20))
        outputs = []
        for i in range(6):
            y = model(
                hidden_states=torch.cat([x, picture], dim=1),
                encoder_hidden_states=text,
                timestep=torch.full((1,), 1 - i / 6),
                img_shapes=shapes,
                return_dict=False,
            )[0]
            outputs.append(y)
            x = x - y[:, :192].repeat(1, 1, 4)[..., :16] / 6
            if after_step is not None:
                after_step()
        return outputs

    want = passes()
    engine = flashomni.enable(model, config(policy="dense"))
    engine.begin(6)
    for a, b in zip(passes(engine.step), want, strict=True):
        assert error(a, b) < 1e-5
    flashomni.disable(model)
    for protect in (True, False):
        engine = flashomni.enable(
            model, config(tau_q=0.9, tau_kv=0.9, ramp_power=0, s_q=0.0, protect_conditions=protect)
        )
        engine.begin(6)
        passes(engine.step)
        cache, skip = flashomni.stats(model).symbols[0, 1].masks()
        # Tokens 192..281 of [image, picture, text]: blocks 3 and 4 of 64.
        assert bool(cache[:, :, 3:5].all()) is protect
        rows = skip[:, :, :3][cache[:, :, :3]]
        assert len(rows) and (bool(rows[:, 3:5].all()) is protect or not protect)
        assert not bool(cache[:, :, :3].all())
        flashomni.disable(model)


def test_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """QwenImageEditPipeline with a small picture, its latents given: guidance, and the picture protected."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (160, 144, None))

    def run(pipe, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, generator=generator)

        picture = noise(4, 1, 18, 20)
        pipe._encode_vae_image = lambda image, generator: picture
        return pipe(
            image=Image.new("RGB", (160, 144)),
            prompt_embeds=noise(20, 16),
            prompt_embeds_mask=(torch.arange(20) < 13)[None].long(),
            negative_prompt_embeds=noise(20, 16),
            negative_prompt_embeds_mask=(torch.arange(20) < 6)[None].long(),
            latents=noise(192, 16),
            true_cfg_scale=3.0,
            height=256,
            width=192,
            num_inference_steps=steps,
            output_type="latent",
        ).images

    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "processor"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = quiet(QwenImageEditPipeline(transformer=pipeline().transformer, scheduler=scheduler, **parts))
    check_nothing_reused_is_dense(pipe, run)
    stats = check_sparse_runs(pipe, run)
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {192 + 90 + 13, 192 + 90 + 6}
    for symbols in stats.symbols.values():
        cache = symbols.masks()[0]
        assert bool(cache[:, :, 3:].all()) and not bool(cache[:, :, :3].all())


def test_explain() -> None:
    answer = flashomni.explain(pipeline(), "quality")
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
    assert "preset 'quality': " in str(answer)
