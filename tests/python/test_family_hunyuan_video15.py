"""HunyuanVideo 1.5: three conditions in one stream, valid tokens first."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
from family_checks import config, error, lively

import flashomni


def model(task: str = "t2v") -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return lively(
        HunyuanVideo15Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(16, 24, 24),
            text_embed_2_dim=8,
            image_embed_dim=12,
            target_size=16,
            task_type=task,
        )
    )


def passes(model, steps: int, valid: tuple[int, ...], picture: bool, engine=None) -> list[torch.Tensor]:
    """3 frames of 8 x 8 tokens, 20 of text, 6 of glyphs, 9 of a picture."""
    generator = torch.Generator().manual_seed(2)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    x, scheduler = noise(4, 3, 8, 8), FlowMatchEulerDiscreteScheduler()
    inputs = {
        "encoder_hidden_states": noise(20, 16),
        "encoder_attention_mask": (torch.arange(20) < torch.tensor(valid)[:, None]).long(),
        "encoder_hidden_states_2": noise(6, 8),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6])[:batch],
        "image_embeds": noise(9, 12) * picture,
    }
    if engine is not None:
        engine.begin(steps)
    scheduler.set_timesteps(steps)
    outputs = []
    for t in scheduler.timesteps:
        y = model(hidden_states=x, timestep=t.expand(batch), return_dict=False, **inputs)[0]
        outputs.append(y)
        x = scheduler.step(y, t, x, return_dict=False)[0]
        if engine is not None:
            engine.step()
    return outputs


@pytest.mark.parametrize("picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("valid", [(13,), (20,), (13, 6)], ids=str)
def test_nothing_reused_is_dense(valid: tuple[int, ...], picture: bool) -> None:
    transformer = model()
    want = passes(transformer, 6, valid, picture)
    for settings in ({"policy": "dense"}, {"tau_q": 0.0, "tau_kv": 0.0}):
        engine = flashomni.enable(transformer, config(strict=True, **settings))
        for a, b in zip(passes(transformer, 6, valid, picture, engine), want, strict=True):
            assert error(a, b) < 1e-5
        assert engine.run_stats().steps == {"full": 3, "update": 1, "dispatch": 2}
        flashomni.disable(transformer)


def test_sparse_runs() -> None:
    from flashomni.policies import RandomPolicy

    transformer = model()
    want = passes(transformer, 8, (13, 6), True)[-1]
    engine = flashomni.enable(transformer, config(), policy=RandomPolicy(0.6, 0.6))
    first = passes(transformer, 8, (13, 6), True, engine)[-1]
    assert torch.equal(passes(transformer, 8, (13, 6), True, engine)[-1], first)
    assert 1e-4 < error(first, want) < 0.5
    stats = engine.run_stats()
    assert stats.density < 1
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {192 + 13 + 2 + 9}
