"""Signed distance fields of everything that can be drawn, as one atlas of small images.

Shapes are analytic; digits come from `digits.npz` (scikit-learn's handwritten digits, a few clean examples a
class, prepared by tools/tiny_flux/make_assets.py). Local coordinates put an object of radius 1 in [-1, 1]^2,
y pointing down; the atlas covers [-EXTENT, EXTENT]^2.
"""

from __future__ import annotations

import functools
import importlib.resources
import math

import numpy as np
import torch

from .vocabulary import DIGITS, KINDS, SHAPES

EXTENT = 1.25
ATLAS_SIZE = 96


def _polygon(p: torch.Tensor, vertices: list[tuple[float, float]]) -> torch.Tensor:
    """Exact signed distance of points `p` [..., 2] to a simple polygon; negative inside."""
    squared = torch.full(p.shape[:-1], math.inf)
    sign = torch.ones(p.shape[:-1])
    for i, (bx, by) in enumerate(vertices):
        ax, ay = vertices[i - 1]
        ex, ey = ax - bx, ay - by
        wx, wy = p[..., 0] - bx, p[..., 1] - by
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        # Each edge that a horizontal ray from p crosses turns inside into outside.
        crosses = ((p[..., 1] >= by) != (p[..., 1] >= ay)) & ((ex * wy > ey * wx) == (ey > 0))
        sign = torch.where(crosses, -sign, sign)
    return sign * squared.sqrt()


def _box(p: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    q = p.abs() - torch.tensor([half_width, half_height])
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def _shape(name: str, p: torch.Tensor) -> torch.Tensor:
    """Signed distance of local points `p` [..., 2] to the shape called `name`."""
    if name == "circle":
        return p.norm(dim=-1) - 0.95
    if name == "square":
        return _box(p, 0.86, 0.86)
    if name == "triangle":
        return _polygon(p, [(0.0, -0.92), (0.98, 0.8), (-0.98, 0.8)])
    if name == "star":
        points = []
        for i in range(10):
            radius, angle = (1.0, 0.44)[i % 2], math.pi * i / 5
            points.append((radius * math.sin(angle), 0.06 - radius * math.cos(angle)))
        return _polygon(p, points)
    if name == "ring":
        return (p.norm(dim=-1) - 0.72).abs() - 0.24
    if name == "cross":
        return torch.minimum(_box(p, 0.3, 0.95), _box(p, 0.95, 0.3))
    if name == "diamond":
        return _polygon(p, [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)])
    if name == "heart":
        points = []
        for i in range(72):
            a = 2 * math.pi * i / 72
            y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            points.append((0.97 * math.sin(a) ** 3, -(y + 2.5) / 16.5))
        return _polygon(p, points)
    raise ValueError(f"unknown shape {name!r}")


def _grid(size: int) -> torch.Tensor:
    axis = (torch.arange(size) + 0.5) / size * 2 * EXTENT - EXTENT
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1)


@functools.cache
def atlas() -> torch.Tensor:
    """Distance fields [entries, 96, 96] in local units: one a shape, then `digit_variants()` a digit."""
    points = _grid(ATLAS_SIZE)
    shapes = torch.stack([_shape(name, points) for name in SHAPES])
    small = torch.from_numpy(_digit_fields().astype(np.float32) / 127 * EXTENT)
    digits = torch.nn.functional.interpolate(
        small.flatten(0, 1)[:, None], size=(ATLAS_SIZE, ATLAS_SIZE), mode="bicubic", align_corners=False
    )[:, 0]
    return torch.cat([shapes, digits])


@functools.cache
def _digit_fields() -> np.ndarray:
    """int8 [10, variants, n, n]: distance / EXTENT * 127."""
    with importlib.resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        return np.load(file)["distance"]


def digit_variants() -> int:
    """How many handwritten examples each digit has."""
    return _digit_fields().shape[1]


def atlas_index(kind: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
    """Atlas entry of each object, from its kind (index into KINDS) and its handwriting (ignored for
    shapes)."""
    n = len(SHAPES)
    return torch.where(kind < n, kind, n + (kind - n) * digit_variants() + variant)


def atlas_kinds() -> list[int]:
    """The kind (index into KINDS) that each atlas entry shows."""
    digits = [len(SHAPES) + d for d in range(len(DIGITS)) for _ in range(digit_variants())]
    assert len(KINDS) == len(SHAPES) + len(DIGITS)
    return list(range(len(SHAPES))) + digits
