"""Figures of the report as inline SVG strings and PNG data URIs.

Colours are CSS variables of the page (page.py), so one figure serves light and dark and prints well. Every
figure
says its values as text too (titles that appear on hover), so that none depends on colour alone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH = 920  # user units; the page scales figures to its own width


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{html.escape(str(content))}</text>'


def rect(x: float, y: float, w: float, h: float, fill: str, title: str = "", more: str = "") -> str:
    tip = f"<title>{html.escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}"'
    return f'<rect {place} fill="{fill}" {more}>{tip}</rect>'


def svg(height: float, body: Sequence[str], label: str, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def legend(items: Sequence[tuple[str, str]]) -> str:
    """HTML legend: (CSS colour, label)."""
    spans = (
        f'<span><i style="background:{colour}"></i>{html.escape(label)}</span>' for colour, label in items
    )
    return '<p class="legend">' + "".join(spans) + "</p>"


def nice_step(largest: float, ticks: int = 5) -> float:
    """A round tick distance that gives about `ticks` ticks up to `largest`."""
    if largest <= 0:
        return 1.0
    raw = largest / ticks
    power = 10.0 ** np.floor(np.log10(raw))
    return float(power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999))


def seconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} s"


def stacked_bars(rows: Sequence[tuple[str, dict[str, float]]], colours: dict[str, str]) -> str:
    """One horizontal bar a row, cut by what its seconds went into; zero-based, one scale for all rows."""
    left, right, bar, gap, top = 190, 70, 34, 20, 6
    largest = max((sum(parts.values()) for _, parts in rows), default=0) or 1.0
    scale = (WIDTH - left - right) / largest
    bottom = top + len(rows) * (bar + gap)
    body = []
    step = nice_step(largest)
    for i in range(int(largest / step + 1e-9) + 1):
        x = left + i * step * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" class="grid"/>')
        body.append(text(x, bottom + 16, f"{i * step:g} s", "axis", "middle"))
    for r, (name, parts) in enumerate(rows):
        y = top + r * (bar + gap)
        body.append(text(left - 12, y + bar / 2 + 5, name, "label", "end"))
        x = float(left)
        for what, value in parts.items():
            if value <= 0:
                continue
            w = value * scale
            body.append(rect(x, y, max(w - 1, 0.4), bar, colours[what], f"{name}: {what} {seconds(value)}"))
            if w > 52:
                body.append(text(x + w / 2, y + bar / 2 + 5, seconds(value), "inbar", "middle"))
            x += w
        body.append(text(x + 8, y + bar / 2 + 5, seconds(sum(parts.values())), "strong"))
    return svg(bottom + 24, body, "Seconds a picture by what they went into")


def step_columns(kinds: Sequence[str], values: Sequence[float], reference: Sequence[float]) -> str:
    """Seconds of each denoising step as columns coloured by the step's kind, over the reference's as a
    line.
    """
    left, top, height = 52, 10, 150
    n = max(len(values), 1)
    w = (WIDTH - left - 8) / n
    largest = max([*values, *reference, 1e-9]) * 1.08
    step = nice_step(largest, 4)
    body = []
    for i in range(int(largest / step) + 1):
        y = top + height - i * step / largest * height
        body.append(f'<line x1="{left}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 8, y + 4, f"{i * step:g} s", "axis", "end"))
    for i, value in enumerate(values):
        h = value / largest * height
        tip = f"step {i} ({kinds[i]}): {seconds(value)}"
        body.append(
            rect(left + i * w + 1.5, top + height - h, w - 3, h, f"var(--{kinds[i]})", tip, 'rx="1.5"')
        )
    for i, value in enumerate(reference):
        y = top + height - value / largest * height
        tip = f"<title>{html.escape(f'step {i}, dense: {seconds(value)}')}</title>"
        place = f'x1="{left + i * w:.1f}" x2="{left + (i + 1) * w:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        body.append(f'<line {place} class="ref">{tip}</line>')
    every = 1 if n <= 30 else 5
    for i in range(0, n, every):
        body.append(text(left + (i + 0.5) * w, top + height + 16, i, "axis", "middle"))
    return svg(top + height + 22, body, "Seconds of each step by kind, with the dense run as a line")


def heat_map(values: np.ndarray, layers: Sequence[str], kinds: Sequence[str], what: str) -> str:
    """Shares in 0..1, [step, layer, head], as one row a (layer, head) and one column a step; 1 = full
    colour.
    """
    steps, n_layers, heads = values.shape
    left, top, gap = 120, 18, 7
    cell = max(7.0, min(15.0, 300 / (n_layers * heads)))
    w = (WIDTH - left - 8) / steps
    body = [
        rect(left + s * w + 0.5, 0, w - 1, 9, f"var(--{kinds[s]})", f"step {s}: {kinds[s]}")
        for s in range(steps)
    ]
    y = float(top)
    for layer in range(n_layers):
        body.append(text(left - 12, y + heads * cell / 2 + 4, layers[layer], "label", "end"))
        for head in range(heads):
            for s in range(steps):
                share = float(values[s, layer, head])
                tip = f"step {s} ({kinds[s]}), {layers[layer]}, head {head}: {share:.0%} {what}"
                more = f'fill-opacity="{0.05 + 0.95 * share:.3f}"'
                body.append(rect(left + s * w + 0.5, y, w - 1, cell - 1, "var(--heat)", tip, more))
            y += cell
        y += gap
    every = 1 if steps <= 30 else 5
    for s in range(0, steps, every):
        body.append(text(left + (s + 0.5) * w, y + 10, s, "axis", "middle"))
    return svg(y + 16, body, f"Share {what} by step, layer and head")


def png_uri(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# Masks are pictures of bits, the same in light and dark: computed, skipped, cached.
MASK_COLOURS = {"computed": (31, 111, 235), "skipped": (208, 215, 222), "cached": (246, 178, 107)}


def mask_image(selected: np.ndarray, active: np.ndarray) -> str:
    """One pixel a block pair, data URI. selected bool [rows, columns]; active bool [rows]: S_c's bit of each
    row.
    """
    picture = np.where(selected[..., None], MASK_COLOURS["computed"], MASK_COLOURS["skipped"])
    picture = np.where(active[:, None, None], picture, MASK_COLOURS["cached"])
    return png_uri(picture.astype(np.uint8))
