"""HunyuanVideo 1.5: three conditions in one stream, valid tokens first."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from family_checks import check_passes, lively


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


@pytest.mark.parametrize("picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("valid", [(13,), (20,), (13, 6)], ids=str)
def test_passes(valid: tuple[int, ...], picture: bool) -> None:
    """3 frames of 8 x 8 tokens, 20 of text, 6 of glyphs, 9 of a picture."""
    generator = torch.Generator().manual_seed(2)
    batch = len(valid)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {
        "encoder_hidden_states": noise(20, 16),
        "encoder_attention_mask": (torch.arange(20) < torch.tensor(valid)[:, None]).long(),
        "encoder_hidden_states_2": noise(6, 8),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6])[:batch],
        "image_embeds": noise(9, 12) * picture,
    }
    stats = check_passes(model(), noise(4, 3, 8, 8), inputs)
    condition = max(valid) + 2 + (9 if picture else 1)
    assert {symbols.q_tokens for symbols in stats.symbols.values()} == {192 + condition}
