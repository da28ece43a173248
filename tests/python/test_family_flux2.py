"""FLUX.2: one product for queries, keys, values and MLP in its single blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from family_checks import check_nothing_reused_is_dense, check_sparse_runs, config, error, lively, quiet

import flashomni


def pipeline() -> Flux2Pipeline:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        axes_dims_rope=(16, 16, 16, 16),
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
    )
    with torch.no_grad():
        for layer in model.double_stream_modulation_img, model.single_stream_modulation:
            layer.linear.weight.mul_(4)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    return quiet(
        Flux2Pipeline(transformer=lively(model), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    )


def draw(pipe, steps: int, batch: int = 1) -> torch.Tensor:
    """14 x 16 tokens with 20 of text."""
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=torch.randn(batch, 20, 32, generator=generator),
        latents=torch.randn(batch, 16, 14, 16, generator=generator),
        height=224,
        width=256,
        num_inference_steps=steps,
        output_type="latent",
    ).images


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_reused_is_dense(batch: int) -> None:
    check_nothing_reused_is_dense(pipeline(), lambda pipe, steps: draw(pipe, steps, batch))


def test_sparse_runs_and_their_memory() -> None:
    pipe = pipeline()
    said = flashomni.memory(config(), pipe, image_tokens=224, text_tokens=20)
    assert check_sparse_runs(pipe, draw).bytes_held == said.by_kind


def passes(model, after_step=None) -> list[torch.Tensor]:
    """By hand, with a picture of 90 tokens to edit after the 192 that are drawn."""
    generator = torch.Generator().manual_seed(3)
    where = {"device": model.device, "dtype": model.dtype}
    x, picture = (torch.randn(1, n, 16, generator=generator).to(**where) for n in (192, 90))
    text = torch.randn(1, 20, 32, generator=generator).to(**where)
    image_ids, text_ids = torch.zeros(1, 282, 4), torch.zeros(1, 20, 4)
    image_ids[0, :, 1], image_ids[0, :, 2] = torch.arange(282) // 12, torch.arange(282) % 12
    image_ids[0, 192:, 0] = 10
    text_ids[0, :, 3] = torch.arange(20)
    inputs = {"img_ids": image_ids.to(model.device), "txt_ids": text_ids.to(model.device)}
    outputs = []
    for i in range(6):
        y = model(
            hidden_states=torch.cat([x, picture], dim=1),
            encoder_hidden_states=text,
            timestep=torch.full((1,), 1 - i / 6, **where),
            guidance=torch.full((1,), 2.5, **where),
            return_dict=False,
            **inputs,
        )[0]
        outputs.append(y)
        x = x - y[:, :192] / 6
        if after_step is not None:
            after_step()
    return outputs


def test_pictures_to_edit_are_protected() -> None:
    model = pipeline().transformer
    want = passes(model)
    engine = flashomni.enable(model, config(policy="dense"))
    engine.begin(6)
    for a, b in zip(passes(model, engine.step), want, strict=True):
        assert error(a, b) < 1e-5
    flashomni.disable(model)
    engine = flashomni.enable(model, config(tau_q=0.9, tau_kv=0.9, ramp_power=0))
    engine.begin(6)
    passes(model, engine.step)
    for layer in range(3):
        cache, skip = flashomni.stats(model).symbols[0, layer].masks()
        # Tokens 212..301 of [text, image, picture]: blocks 3 and 4 of 64.
        assert bool(cache[:, :, 3:].all()) and not bool(cache[:, :, 1:3].all())
        assert bool(skip[:, :, 3:].all()) and bool(skip[:, :, :, 3:].all())


def test_projections_that_are_no_plain_linear_layers() -> None:
    """Quantized layers, LoRA: one call of the module gives all four parts; attention stays sparse."""

    class Wrapped(torch.nn.Linear):
        pass

    pipe = pipeline()
    want = draw(pipe, 6)
    attention = pipe.transformer.single_transformer_blocks[0].attn
    for name in ("to_qkv_mlp_proj", "to_out"):
        plain = getattr(attention, name)
        wrapped = Wrapped(plain.in_features, plain.out_features, bias=False)
        wrapped.load_state_dict(plain.state_dict())
        setattr(attention, name, wrapped)
    row = flashomni.explain(pipe).rows[1]
    assert (row.attention, row.gemm_q, row.gemm_o) == ("sparse", "dense", "dense")
    flashomni.enable(pipe, config(policy="dense"))
    assert error(draw(pipe, 6), want) < 1e-5


def test_explain() -> None:
    answer = flashomni.explain(pipeline())
    assert all((r.attention, r.gemm_q, r.gemm_o) == ("sparse",) * 3 and not r.notes for r in answer.rows)
