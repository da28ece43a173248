"""How far two pictures are apart: PSNR, SSIM, and a difference that the eye can see."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

SSIM_WINDOW = 7
# A run whose picture is equal to the last bit has no finite PSNR; JSON has no infinity.
PSNR_OF_EQUAL = 99.0


def as_array(picture) -> np.ndarray:
    """A PIL image or an array as uint8 [height, width, 3]. Raises ValueError for any other shape or type."""
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"picture: expected uint8 [height, width, 3], got {array.dtype} {list(array.shape)}")
    return array


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = as_array(a), as_array(b)
    if a.shape != b.shape:
        raise ValueError(f"pictures differ in shape: {list(a.shape)} and {list(b.shape)}")
    return a, b


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB, peak 255, over all pixels and channels; PSNR_OF_EQUAL if they are
    equal.
    """
    a, b = _pair(a, b)
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    if error == 0:
        return PSNR_OF_EQUAL
    return 10 * math.log10(255.0**2 / error)


def ssim(a, b) -> float:
    """Structural similarity (Wang et al. 2004), mean over channels; 7 x 7 uniform window, sample covariance.

    Borders narrower than half a window are left out, as scikit-image does by default.
    """
    a, b = _pair(a, b)
    if min(a.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"pictures: expected at least {SSIM_WINDOW} pixels a side, got {list(a.shape)}")
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[None] for p in (a, b))
    n = SSIM_WINDOW * SSIM_WINDOW

    def mean(t: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(t, SSIM_WINDOW, stride=1)

    mx, my = mean(x), mean(y)
    unbiased = n / (n - 1)
    vx, vy = (mean(x * x) - mx * mx) * unbiased, (mean(y * y) - my * my) * unbiased
    cxy = (mean(x * y) - mx * my) * unbiased
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(index.mean())


def amplified_difference(a, b, gain: int = 8) -> np.ndarray:
    """|a - b| * gain, clipped to 255: uint8 [height, width, 3]; black where the pictures agree."""
    a, b = _pair(a, b)
    return np.clip(np.abs(a.astype(np.int32) - b.astype(np.int32)) * gain, 0, 255).astype(np.uint8)
