"""The drawing program: scenes to antialiased RGB pictures, vectorised in torch on any device."""

from __future__ import annotations

import functools
import math

import torch

from .scene import MAX_OBJECTS, Scenes
from .shapes import EXTENT, atlas, atlas_index
from .vocabulary import BACKGROUNDS, PLAIN_BACKGROUNDS

# Objects are colourful, backgrounds are gray: the checker tells them apart by chroma.
PALETTE = (
    (0.87, 0.16, 0.16),
    (0.16, 0.67, 0.24),
    (0.14, 0.30, 0.87),
    (0.96, 0.84, 0.14),
    (0.56, 0.20, 0.74),
    (0.97, 0.52, 0.10),
    (0.12, 0.78, 0.87),
    (0.98, 0.48, 0.74),
)
GRAYS = {"white": 0.96, "black": 0.05, "gray": 0.5}
TEXTURE_DARK, TEXTURE_BRIGHT = 0.42, 0.76
PERIODS = 8  # of a texture, across the picture
DOT_RADIUS = 0.3  # in periods
WAVE_BEND = 1.2  # radians


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(atlas [E, 96, 96], palette [8, 3], plain grays [4], the first for no background word) on `device`.

    Kept, because each copy to a GPU would wait for the GPU and leave it idle in training.
    """
    grays = [GRAYS["white"]] + [GRAYS[name] for name in PLAIN_BACKGROUNDS]
    return atlas().to(device), torch.tensor(PALETTE, device=device), torch.tensor(grays, device=device)


def _axis(size: int, device: torch.device | str) -> torch.Tensor:
    return (torch.arange(size, device=device) + 0.5) / size


def textures(phase: torch.Tensor, size: int) -> torch.Tensor:
    """Coverage by the bright tone, [B, 4, size, size] in [0, 1], in the order of TEXTURES; phase [B, 2]."""
    axis = _axis(size, phase.device) * PERIODS
    x = (axis + phase[:, :1])[:, None, :]
    y = (axis + phase[:, 1:])[:, :, None]
    pixels = size / PERIODS  # a period's length
    radian = 2 * math.pi / pixels  # phase from one pixel to the next
    ax, ay = 2 * math.pi * x, 2 * math.pi * y
    striped = torch.sin(ax + ay) / (radian * math.sqrt(2))
    away_x, away_y = x - x.round(), y - y.round()
    dotted = (DOT_RADIUS - (away_x**2 + away_y**2).sqrt()) * pixels
    column, row = ((torch.sin(a) / radian).clamp(-0.5, 0.5) for a in (ax, ay))
    checkered = 2 * column * row
    wavy = torch.sin(ay + WAVE_BEND * torch.sin(ax)) / (radian * 1.25)
    shape = torch.broadcast_shapes(striped.shape, dotted.shape, wavy.shape)
    stacked = torch.stack([t.expand(shape) for t in (striped, dotted, checkered, wavy)], dim=1)
    return (0.5 + stacked).clamp(0, 1)


def draw_background(background: torch.Tensor, phase: torch.Tensor, size: int) -> torch.Tensor:
    """Gray pictures [B, 1, size, size] in [0, 1]; background [B] as in Scenes."""
    named = _constants(phase.device)[2]
    first_texture = 1 + len(PLAIN_BACKGROUNDS)
    plain = named[background.clamp(max=first_texture - 1)]
    which = (background - first_texture).clamp(0, len(BACKGROUNDS) - len(PLAIN_BACKGROUNDS) - 1)
    rows = torch.arange(len(background), device=phase.device)
    texture = TEXTURE_DARK + (TEXTURE_BRIGHT - TEXTURE_DARK) * textures(phase, size)[rows, which]
    return torch.where((background < first_texture)[:, None, None], plain[:, None, None], texture)[:, None]


def coverage(scenes: Scenes, size: int) -> torch.Tensor:
    """How much of each pixel each object covers, [B, 3, size, size] in [0, 1]."""
    device = scenes.centre.device
    axis = _axis(size, device)
    entry = atlas_index(scenes.kind, scenes.variant).flatten()
    fields = _constants(device)[0][entry][:, None]
    centre, radius = scenes.centre.flatten(0, 1), scenes.radius.flatten()[:, None]
    x = (axis - centre[:, :1]) / (radius * EXTENT)
    y = (axis - centre[:, 1:]) / (radius * EXTENT)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    distance = torch.nn.functional.grid_sample(fields, grid, padding_mode="border", align_corners=False)
    covered = (0.5 - distance[:, 0] * radius[:, :, None] * size).clamp(0, 1)
    covered = covered.unflatten(0, (-1, MAX_OBJECTS))
    present = torch.arange(MAX_OBJECTS, device=device) < scenes.count[:, None]
    return covered * present[:, :, None, None]


def draw(scenes: Scenes, size: int = 256) -> torch.Tensor:
    """Draws scenes as RGB [B, 3, size, size] in [0, 1]."""
    picture = draw_background(scenes.background, scenes.phase, size).expand(-1, 3, -1, -1)
    covered = coverage(scenes, size)
    colours = _constants(scenes.centre.device)[1][scenes.colour]
    for i in range(MAX_OBJECTS):
        picture = torch.lerp(picture, colours[:, i, :, None, None].expand_as(picture), covered[:, i, None])
    return picture
