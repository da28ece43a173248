"""Classical image analysis of a picture: its objects by chroma, their colours and shapes, and its
background."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from .draw import GRAYS, PALETTE, PERIODS, TEXTURE_BRIGHT, TEXTURE_DARK, textures
from .shapes import EXTENT, atlas, atlas_kinds
from .vocabulary import COLOURS, KINDS, TEXTURES

SIDE = 256  # pictures are analysed at this size
CHROMA = 0.2  # max - min over RGB that makes a pixel colourful; backgrounds are gray
SMALLEST = 100  # pixels; the smallest object drawn covers about 450
CROP = 40  # side of the square that shapes are compared in
COLOUR_PURITY = 0.8  # share of an object's inner pixels that must be nearest to its colour
FLAT = 0.06  # greatest standard deviation of a plain background
TEXTURE_FIT = 0.5  # least share of a background's variance that its texture must explain


@dataclasses.dataclass(frozen=True)
class Found:
    """An object seen in a picture."""

    colour: str | None  # None: no one colour
    kind: str
    overlap: float  # IoU with the best template of `kind`
    x: float  # centre of the bounding box, in units of the side
    y: float
    radius: float  # half the longer side of the bounding box


def as_array(image) -> np.ndarray:
    """RGB [256, 256, 3] float32 in [0, 1] from a PIL image, an array or a tensor [3, H, W]."""
    if isinstance(image, torch.Tensor):
        tensor = image.detach().float().cpu()
    else:
        array = np.asarray(image)
        scale = 255.0 if array.dtype == np.uint8 else 1.0
        tensor = torch.from_numpy(array.astype(np.float32) / scale).permute(2, 0, 1)
    if tensor.shape[-2:] != (SIDE, SIDE):
        tensor = torch.nn.functional.interpolate(
            tensor[None], size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
        )[0]
    return tensor.clamp(0, 1).permute(1, 2, 0).numpy()


def _square_crop(mask: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """The bounding box of a mask, padded to a square and resampled to [CROP, CROP] in [0, 1]."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = mask[rows, cols]
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(square)[None, None], size=(CROP, CROP), mode="bilinear", antialias=True
    )
    return resized[0, 0].numpy()


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Square crops [T, CROP * CROP] of everything in the atlas, and the kind of each."""
    side = int(70 * EXTENT)  # pixels: about a medium object
    fields = torch.nn.functional.interpolate(atlas()[:, None], size=(side, side), mode="bilinear")[:, 0]
    crops = []
    for mask in (fields < 0).numpy():
        rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        crops.append(_square_crop(mask, slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)).ravel())
    return np.stack(crops), np.array(atlas_kinds())


def _classify(crop: np.ndarray) -> tuple[str, float]:
    """Best kind for a square crop by soft intersection over union, and that overlap."""
    templates, kinds = _templates()
    flat = crop.ravel()[None]
    overlap = np.minimum(templates, flat).sum(1) / np.maximum(templates, flat).sum(1)
    best = int(overlap.argmax())
    return KINDS[kinds[best]], float(overlap[best])


def _colour(pixels: np.ndarray) -> str | None:
    """The colour most pixels [n, 3] are nearest to, or None if they disagree."""
    nearest = ((pixels[:, None] - np.array(PALETTE, np.float32)) ** 2).sum(-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(COLOURS))
    return COLOURS[int(votes.argmax())] if votes.max() >= COLOUR_PURITY * len(pixels) else None


def find_objects(picture: np.ndarray) -> tuple[list[Found], np.ndarray]:
    """Objects of a picture [256, 256, 3], the largest first, and the mask of colourful pixels."""
    from scipy import ndimage

    chroma = picture.max(-1) - picture.min(-1)
    colourful = chroma > CHROMA
    labels, _ = ndimage.label(colourful, np.ones((3, 3)))
    found = []
    for index, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[rows, cols] == index
        if component.sum() < SMALLEST:
            continue
        patch, patch_chroma = picture[rows, cols], chroma[rows, cols]
        # Half the object's own chroma is where an antialiased edge is half covered.
        full = np.median(patch_chroma[component])
        mask = component & (patch_chroma > 0.5 * full)
        inner = ndimage.binary_erosion(mask)
        colour = _colour(patch[inner if inner.sum() >= SMALLEST // 4 else mask])
        ys, xs = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
        kind, overlap = _classify(_square_crop(mask, *box))
        x = (cols.start + (xs[0] + xs[-1] + 1) / 2) / SIDE
        y = (rows.start + (ys[0] + ys[-1] + 1) / 2) / SIDE
        radius = max(len(range(*box[0].indices(SIDE))), len(range(*box[1].indices(SIDE)))) / 2 / SIDE
        found.append((int(mask.sum()), Found(colour, kind, overlap, x, y, radius)))
    found.sort(key=lambda item: -item[0])
    return [item for _, item in found], colourful


@functools.cache
def _texture_cells() -> np.ndarray:
    """FFT of one period of each texture, zero mean, [4, P, P]."""
    period = SIDE // PERIODS
    bright = textures(torch.zeros(1, 2), SIDE)[0, :, :period, :period].numpy()
    cells = TEXTURE_DARK + (TEXTURE_BRIGHT - TEXTURE_DARK) * bright
    return np.fft.fft2(cells - cells.mean((1, 2), keepdims=True))


def find_background(picture: np.ndarray, colourful: np.ndarray) -> tuple[str | None, float]:
    """Name of the background of a picture [256, 256, 3] outside `colourful`, and how well it fits in [0, 1].

    A texture is recognised at any shift: the picture is folded into one period and correlated with each
    texture's own.
    """
    from scipy import ndimage

    outside = ~ndimage.binary_dilation(colourful, iterations=3)
    if outside.mean() < 0.2:
        return None, 0.0
    gray = picture.mean(-1)
    level, spread = float(gray[outside].mean()), float(gray[outside].std())
    if spread < FLAT:
        name = min(GRAYS, key=lambda plain: abs(GRAYS[plain] - level))
        return (name, 1.0) if abs(GRAYS[name] - level) < 0.15 else (None, 0.0)
    period = SIDE // PERIODS
    fold = (PERIODS, period, PERIODS, period)
    weight = outside.reshape(fold).sum((0, 2))
    total = np.where(outside, gray - level, 0).reshape(fold).sum((0, 2))
    cell = total / np.maximum(weight, 1)
    spectra = _texture_cells()
    match = np.fft.ifft2(np.fft.fft2(cell) * spectra.conj()).real.max((1, 2))  # best shift
    energy = (np.abs(spectra) ** 2).mean((1, 2))  # of a cell, by Parseval
    # Share of all variance (not only of the folded cell) that the shifted texture explains.
    explained = np.maximum(match, 0) ** 2 / (energy * period**2 * spread**2)
    best = int(explained.argmax())
    fit = float(min(explained[best], 1.0))
    return (TEXTURES[best], fit) if fit >= TEXTURE_FIT else (None, fit)
