"""The data of one demo run as plain JSON. Measuring writes it, rendering reads it; neither knows the other.

format     "flashomni-run/1"
created    ISO 8601, UTC
command    what was typed
machine    doctor.machine()
model      {name, dtype, parameters, tokens, text_tokens, layers: [name], heads}
config     fields of flashomni.Config, by name
steps      denoising steps a picture
schedule   one {kind: full|update|dispatch, ramp, since_update} a step
arms       [{key, title, note, time: {what: seconds a picture}}], the reference first
pictures   [{prompt, seed, arms: {key: {file, seconds, step_seconds, psnr, ssim, shows_prompt, density}}}];
           files are PNGs beside the JSON; psnr, ssim are absent for the reference
density    {pairs, tiles: [step][layer][head], shares of what a dense step computes}
masks      [{step, layer, head, rows, columns, bits, text_blocks}], bits = base64 of packed little-endian rows
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np

FORMAT = "flashomni-run/1"
REQUIRED = ("created", "command", "machine", "model", "config", "steps", "schedule", "arms", "pictures")


@dataclasses.dataclass
class Run:
    """A run's JSON and the folder that its picture files are relative to."""

    json: dict
    folder: Path

    @property
    def reference(self) -> str:
        return self.json["arms"][0]["key"]

    def picture(self, index: int, arm: str) -> Path:
        return self.folder / self.json["pictures"][index]["arms"][arm]["file"]

    def values(self, arm: str, field: str) -> list:
        """`field` of each picture of one arm; pictures without it are left out."""
        rows = (picture["arms"][arm] for picture in self.json["pictures"] if arm in picture["arms"])
        return [row[field] for row in rows if row.get(field) is not None]

    def mean(self, arm: str, field: str) -> float | None:
        values = self.values(arm, field)
        return sum(values) / len(values) if values else None

    def speed_up(self, arm: str) -> float | None:
        """Reference seconds / this arm's seconds, over the pictures that both drew."""
        pairs = [
            (p["arms"][self.reference]["seconds"], p["arms"][arm]["seconds"])
            for p in self.json["pictures"]
            if arm in p["arms"] and self.reference in p["arms"]
        ]
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None

    def dense_step_spread(self) -> tuple[float, float] | None:
        """The 10th and 90th percentile of the reference's step seconds; None with fewer than five steps."""
        steps = sorted(s for values in self.values(self.reference, "step_seconds") for s in values)
        return None if len(steps) < 5 else (steps[len(steps) // 10], steps[-1 - len(steps) // 10])


def load(path: str | Path) -> Run:
    """Reads a run. `path`: its JSON file, or the folder that holds run.json. Raises ValueError if it is no
    run.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "run.json"
    if not path.is_file():
        raise ValueError(f"run: no file {path}; `flashomni demo --out DIR` writes DIR/run.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"run: {path} is not JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"run: {path} has format {found!r}, expected {FORMAT!r}")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise ValueError(f"run: {path} lacks {', '.join(missing)}")
    return Run(content, path.parent)


def save(content: dict, folder: Path) -> Path:
    """Writes run.json into `folder` and gives its path."""
    path = folder / "run.json"
    path.write_text(
        json.dumps({"format": FORMAT, **content}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    return path


def pack_mask(mask: np.ndarray) -> str:
    """A bool matrix as base64 of its bits, row after row, 8 to a byte, little-endian (as the symbols
    themselves).
    """
    return base64.b64encode(np.packbits(np.asarray(mask, dtype=bool).ravel(), bitorder="little")).decode()


def unpack_mask(bits: str, rows: int, columns: int) -> np.ndarray:
    """The inverse of pack_mask: bool [rows, columns]. Raises ValueError if there are too few bits."""
    flat = np.unpackbits(np.frombuffer(base64.b64decode(bits), dtype=np.uint8), bitorder="little")
    if flat.size < rows * columns:
        raise ValueError(f"mask: {rows} x {columns} needs {rows * columns} bits, got {flat.size}")
    return flat[: rows * columns].reshape(rows, columns).astype(bool)
