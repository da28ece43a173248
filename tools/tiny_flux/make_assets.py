"""Prepares the two small assets of flashomni.tiny_flux: digits.npz and held_out.txt.

    PYTHONPATH=python python tools/tiny_flux/make_assets.py

digits.npz: for each of scikit-learn's ten digits, the few examples nearest to the class mean that are one
connected stroke and that their nearest neighbours agree on, as signed distance fields (int8).
held_out.txt: the prompts that quality is measured on; the hash rule keeps them out of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parents[2] / "python" / "flashomni" / "tiny_flux"
FIELD_SIZE = 48
FINE = 12  # cubic upsampling of the 8x8 scans before they are thresholded


def distance_field(scan: np.ndarray, extent: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Signed distance field [48, 48] of an 8x8 scan, its longer side scaled to 1.9 local units, and its mask.

    None if the digit is not one connected stroke.
    """
    from scipy import ndimage

    fine = ndimage.zoom(np.pad(scan / 16.0, 2), FINE, order=3)
    mask = ndimage.gaussian_filter(fine, FINE * 0.33) > 0.42
    if ndimage.label(mask, np.ones((3, 3)))[1] != 1:
        return None
    sd = ndimage.distance_transform_edt(~mask) - ndimage.distance_transform_edt(mask)
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    centre = np.array([rows[0] + rows[-1], cols[0] + cols[-1]]) / 2
    pixels_per_unit = max(rows[-1] - rows[0], cols[-1] - cols[0]) / 1.9
    axis = ((np.arange(FIELD_SIZE) + 0.5) / FIELD_SIZE * 2 - 1) * extent
    y, x = np.meshgrid(axis, axis, indexing="ij")
    where = [centre[0] + y * pixels_per_unit, centre[1] + x * pixels_per_unit]
    return ndimage.map_coordinates(sd, where, order=1, mode="nearest") / pixels_per_unit, mask


def pick_digits(variants: int, extent: float) -> np.ndarray:
    """int8 [10, variants, 48, 48]: distance / extent * 127 of the chosen examples."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestNeighbors

    data = load_digits()
    flat = data.data / 16.0
    neighbours = NearestNeighbors(n_neighbors=16).fit(flat).kneighbors(flat, return_distance=False)[:, 1:]
    agreed = (data.target[neighbours] == data.target[:, None]).all(1)
    chosen = []
    for digit in range(10):
        mine = np.nonzero((data.target == digit) & agreed)[0]
        spread = np.linalg.norm(flat[mine] - flat[mine].mean(0), axis=1)
        fields = []
        for i in mine[np.argsort(spread)]:
            found = distance_field(data.images[i], extent)
            if found is not None and holes(found[1]) == HOLES[digit]:
                fields.append(found[0])
            if len(fields) == variants:
                break
        if len(fields) < variants:
            raise SystemExit(f"only {len(fields)} clean examples of digit {digit}")
        chosen.append(fields)
    return np.clip(np.round(np.array(chosen) / extent * 127), -127, 127).astype(np.int8)


HOLES = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)  # a digit (an open four); topology weeds out smudged examples
SMALLEST_HOLE = 80  # fine pixels


def holes(mask: np.ndarray) -> int:
    """Number of background regions enclosed by the stroke."""
    from scipy import ndimage

    labels, found = ndimage.label(np.pad(~mask, 1))
    return sum((labels == i).sum() >= SMALLEST_HOLE for i in range(1, found + 1)) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=6, help="handwritten examples a digit")
    parser.add_argument("--prompts", type=int, default=120, help="held-out prompts")
    args = parser.parse_args()
    from flashomni.tiny_flux.shapes import EXTENT

    np.savez_compressed(ASSETS / "digits.npz", distance=pick_digits(args.variants, EXTENT))
    from flashomni.tiny_flux.scene import sample_held_out_prompts

    (ASSETS / "held_out.txt").write_text("\n".join(sample_held_out_prompts(args.prompts, seed=7)) + "\n")


if __name__ == "__main__":
    main()
