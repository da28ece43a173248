"""Patch embeddings as products, and adaptive norms by the operator, against the modules' own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from flashomni.diffusers.blocks.adaptive_norm import intercept_adaptive_norm
from flashomni.diffusers.patches import as_product, lay_out_tokens


class Model(nn.Module):
    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding


@pytest.mark.parametrize(
    "convolution, shape",
    [
        (nn.Conv2d(4, 24, 2, stride=2), (2, 4, 9, 12)),
        (nn.Conv2d(3, 8, (4, 2), stride=(4, 2), bias=False), (1, 3, 8, 6)),
        (nn.Conv3d(5, 16, (1, 2, 2), stride=(1, 2, 2)), (2, 5, 3, 6, 9)),
        (nn.Conv3d(2, 7, (2, 1, 3), stride=(2, 1, 3)), (1, 2, 5, 4, 7)),
    ],
)
def test_a_patch_embedding_gives_contiguous_tokens(convolution: nn.Module, shape: tuple) -> None:
    engine, x = SimpleNamespace(enabled=True), torch.randn(shape)
    with torch.no_grad():
        expected = convolution(x)
        restore = lay_out_tokens(engine, Model(convolution))
        for out in (convolution(x), as_product(convolution, x)):
            assert out.flatten(2).transpose(1, 2).is_contiguous()
            torch.testing.assert_close(out, expected)
        engine.enabled = False
        assert convolution(x).is_contiguous() and torch.equal(convolution(x), expected)
    restore()
    assert "forward" not in convolution.__dict__


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Conv2d(4, 8, 2, stride=2, padding=1),
        nn.Conv2d(4, 8, 2, stride=2, groups=2),
        nn.Conv2d(4, 8, 2, stride=2, dilation=2),
        nn.Conv1d(4, 8, 2, stride=2),
    ],
)
def test_other_convolutions_are_left_alone(other: nn.Module) -> None:
    lay_out_tokens(SimpleNamespace(enabled=True), Model(other))
    assert "forward" not in other.__dict__


def test_an_adaptive_norm_is_the_modules_own() -> None:
    engine, norm = SimpleNamespace(enabled=True), AdaLayerNormZero(96)
    x, emb = torch.randn(2, 20, 96), torch.randn(2, 96)
    with torch.no_grad():
        expected = norm(x, emb=emb)
        restore = intercept_adaptive_norm(engine, norm)
        for a, b in zip(norm(x, emb=emb), expected, strict=True):
            torch.testing.assert_close(a, b)
        engine.enabled = False
        assert torch.equal(norm(x, emb=emb)[0], expected[0])
    restore()
    assert "forward" not in norm.__dict__


def test_other_adaptive_norms_are_left_alone() -> None:
    engine = SimpleNamespace(enabled=True)
    hooked = AdaLayerNormZero(96)
    hooked.register_forward_hook(lambda *_: None)
    for norm in (AdaLayerNormZero(96, num_embeddings=4), nn.LayerNorm(96), hooked):
        assert intercept_adaptive_norm(engine, norm) is None and "forward" not in norm.__dict__
