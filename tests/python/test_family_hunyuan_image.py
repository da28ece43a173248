"""HunyuanImage: text and glyphs in one condition stream; glyphs are optional."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel
from family_checks import check_passes, lively


def model(glyphs: bool) -> HunyuanImageTransformer2DModel:
    torch.manual_seed(0)
    return lively(
        HunyuanImageTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=8 if glyphs else None,
            rope_axes_dim=(32, 32),
        )
    )


@pytest.mark.parametrize(
    ("valid", "glyphs"), [((13,), None), ((13,), (0,)), ((20,), (6,)), ((13, 6), (2, 5))], ids=str
)
def test_passes(valid: tuple[int, ...], glyphs: tuple[int, ...] | None) -> None:
    """12 x 16 tokens, 20 of text and 6 of glyphs, of which some are padding."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(len(valid), *shape, generator=generator)

    def mask(lengths: tuple[int, ...], tokens: int) -> torch.Tensor:
        return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()

    inputs = {"encoder_hidden_states": noise(20, 16), "encoder_attention_mask": mask(valid, 20)}
    if glyphs is not None:
        inputs |= {"encoder_hidden_states_2": noise(6, 8), "encoder_attention_mask_2": mask(glyphs, 6)}
    check_passes(model(glyphs is not None), noise(4, 12, 16), inputs)
