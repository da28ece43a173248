"""Endless training pictures, drawn where they are used."""

from __future__ import annotations

import torch

from flashomni.tiny_flux.draw import draw
from flashomni.tiny_flux.scene import sample_scenes, scene_words

POOL = 32768  # scenes sampled at a time: the held-out filter waits for the device once a pool


class Stream:
    """Batches of (pictures [B, 3, S, S] in [-1, 1], word ids [B, 16]) without held-out combinations."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.at = 0
        self.scenes = None

    def batch(self, size: int, side: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`dropout`: share of captions emptied, which teaches the unconditional model."""
        if self.scenes is None or self.at + size > len(self.scenes):
            self.scenes = sample_scenes(max(POOL, 2 * size), self.generator, held_out=False)
            self.words = scene_words(self.scenes)
            self.at = 0
        rows = slice(self.at, self.at + size)
        self.at += size
        keep = torch.rand(size, 1, generator=self.generator, device=self.generator.device) >= dropout
        return draw(self.scenes[rows], side) * 2 - 1, self.words[rows] * keep
