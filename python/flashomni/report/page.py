"""Puts a run together as one self-contained HTML page: no script, no network, nothing beside the file."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image

from . import data, figures, metrics
from .style import CSS

GAIN = 8  # how much differences are amplified, so that they can be seen
TIME_COLOURS = {
    "attention": "var(--c1)",
    "projections": "var(--c2)",
    "MLP": "var(--c3)",
    "selection and forecast": "var(--c4)",
    "other": "var(--c5)",
}
# Slowest over fastest dense step (a tenth at either end left out) from which times are not to be trusted.
BUSY = 1.5
KIND_LABELS = {
    "full": "Full: dense, nothing kept",
    "update": "Update: dense, symbols chosen, caches refreshed",
    "dispatch": "Dispatch: only what the symbols say",
}


def escape(value) -> str:
    return html.escape(str(value))


def number(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else format(value, form)


def psnr_text(value: float | None) -> str:
    if value is None:
        return "–"
    return "equal" if value >= metrics.PSNR_OF_EQUAL else f"{value:.1f} dB"


def shows_text(run: data.Run, arm: str) -> str:
    values = run.values(arm, "shows_prompt")
    return f"{sum(values)} of {len(values)}" if values else "–"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table; cells are HTML already."""
    thead = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    rows_html = f"<thead><tr>{thead}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{rows_html}</table></div>'


def disturbance(run: data.Run) -> str:
    """A sentence if dense torch steps, which all do the same work, took very different times; else ""."""
    spread = run.dense_step_spread()
    if spread is None or spread[1] < BUSY * spread[0]:
        return ""
    low, high = (figures.seconds(value) for value in spread)
    return (
        "This machine was busy with something else: dense torch steps, which all do the same work, took "
        f"{low} to {high}. Do not trust the times of this run."
    )


def headline(run: data.Run) -> str:
    """The few numbers that the run comes to."""
    arm = run.json["arms"][-1]["key"]
    drawn = len(run.values(arm, "seconds"))
    cards = [
        (f"{run.speed_up(arm):.2f}×", "end-to-end speed-up over dense torch"),
        (
            " → ".join(figures.seconds(run.mean(key, "seconds")) for key in (run.reference, arm)),
            "a picture",
        ),
        (
            psnr_text(run.mean(arm, "psnr")),
            f"PSNR against dense, SSIM {number(run.mean(arm, 'ssim'), '.3f')}",
        ),
        (shows_text(run, arm), f"picture{'s' if drawn > 1 else ''} showing what the prompt says"),
    ]
    boxes = "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards)
    warning = disturbance(run)
    return f'<div class="cards">{boxes}</div>' + (
        f'<p class="warning">{escape(warning)}</p>' if warning else ""
    )


def results(run: data.Run) -> str:
    rows = []
    for arm in run.json["arms"]:
        key = arm["key"]
        reference = key == run.reference
        rows.append(
            [
                f"{escape(arm['title'])}<small>{escape(arm['note'])}</small>",
                figures.seconds(run.mean(key, "seconds")),
                f"{run.speed_up(key):.2f}×",
                number(run.mean(key, "density"), ".0%"),
                "reference" if reference else psnr_text(run.mean(key, "psnr")),
                "reference" if reference else number(run.mean(key, "ssim"), ".4f"),
                shows_text(run, key),
            ]
        )
    head = ["", "seconds a picture", "speed-up", "attention computed", "PSNR", "SSIM", "shows the prompt"]
    return table(head, rows, "results")


def comparison(run: data.Run, index: int) -> str:
    """Pictures of one prompt side by side, and under each what differs from the reference."""
    picture = run.json["pictures"][index]
    reference = Image.open(run.picture(index, run.reference)).convert("RGB")
    cells = []
    for arm in run.json["arms"]:
        key = arm["key"]
        if key not in picture["arms"]:
            continue
        result = picture["arms"][key]
        path = run.picture(index, key)
        if key == run.reference:
            below = '<div class="blank">reference</div>'
        else:
            difference = metrics.amplified_difference(reference, Image.open(path).convert("RGB"), GAIN)
            below = f'<img src="{figures.png_uri(difference)}" alt="difference times {GAIN}">'
        verdict = {True: "shows the prompt", False: "does not show the prompt", None: ""}[
            result.get("shows_prompt")
        ]
        quality = "" if key == run.reference else f" · {psnr_text(result['psnr'])}"
        cells.append(
            f"<figure><figcaption><b>{escape(arm['title'])}</b></figcaption>"
            f'<img src="{figures.file_uri(path)}" alt="{escape(picture["prompt"])}, {escape(arm["title"])}">'
            f"{below}<figcaption>{figures.seconds(result['seconds'])}{quality}<br>{verdict}</figcaption></figure>"
        )
    return (
        f"<h3>“{escape(picture['prompt'])}” <small>seed {picture['seed']}</small></h3>"
        f'<div class="pictures">{"".join(cells)}</div>'
    )


def time_section(run: data.Run) -> str:
    rows = [(arm["title"], arm["time"]) for arm in run.json["arms"] if arm.get("time")]
    if not rows:
        return ""
    used = [what for what in TIME_COLOURS if any(parts.get(what) for _, parts in rows)]
    ordered = [(name, {what: parts.get(what, 0.0) for what in used}) for name, parts in rows]
    return (
        "<section><h2>Where the time went</h2>"
        + figures.stacked_bars(ordered, TIME_COLOURS)
        + figures.legend([(TIME_COLOURS[what], what) for what in used])
        + "<p>Mean seconds of one picture, measured inside the runs above. “Projections” are the linear "
        "layers around "
        "attention (queries, keys, values, output), which the two sparse GEMMs thin out; “other” is what is "
        "left of "
        "the wall clock: norms, rotary embedding, modulation, the scheduler, Python.</p></section>"
    )


def steps_section(run: data.Run) -> str:
    kinds = [step["kind"] for step in run.json["schedule"]]
    arm = run.json["arms"][-1]["key"]
    first = run.json["pictures"][0]["arms"]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KIND_LABELS if kind in kinds)
    return (
        f"<section><h2>Step by step</h2><p>{len(kinds)} steps: {counts}. Columns: FlashOmni; the line: dense "
        f"torch, "
        "same prompt and seed. The first picture.</p>"
        + figures.step_columns(kinds, first[arm]["step_seconds"], first[run.reference]["step_seconds"])
        + figures.legend([(f"var(--{kind})", label) for kind, label in KIND_LABELS.items() if kind in kinds])
        + "</section>"
    )


def density_section(run: data.Run) -> str:
    density = run.json.get("density")
    if not density:
        return ""
    kinds = [step["kind"] for step in run.json["schedule"]]
    layers = run.json["model"]["layers"]
    pairs, tiles = (np.array(density[name], dtype=float) for name in ("pairs", "tiles"))
    return (
        "<section><h2>What was computed, by step, layer and head</h2>"
        "<h3>Attention: block pairs</h3>"
        + figures.heat_map(pairs, layers, kinds, "of block pairs computed")
        + "<h3>Query and output projections: tiles (a block of tokens in one head)</h3>"
        + figures.heat_map(tiles, layers, kinds, "of tiles computed")
        + "<p>One line a head, full colour = all of it, faint = none; the strip on top is the step's kind. "
        "Attention falls twice: a cached tile needs none of its pairs, and an active one skips those of "
        "little mass.</p></section>"
    )


def masks_section(run: data.Run) -> str:
    masks = run.json.get("masks")
    if not masks:
        return ""
    cells = []
    for mask in masks:
        selected = data.unpack_mask(mask["bits"], mask["rows"], mask["columns"])
        active = data.unpack_mask(mask["active"], mask["rows"], 1)[:, 0]
        cells.append(
            f'<figure><img class="mask" src="{figures.mask_image(selected, active)}" '
            f'alt="mask of {escape(mask["layer"])}, head '
            f'{mask["head"]}"><figcaption>{escape(mask["layer"])}, head '
            f"{mask['head']}, step {mask['step']}<br>{selected.mean():.0%} of pairs, {active.mean():.0%} of "
            f"tiles"
            "</figcaption></figure>"
        )
    size = (masks[0]["rows"], masks[0]["columns"])
    colours = [(f"rgb{rgb}", what) for what, rgb in figures.MASK_COLOURS.items()]
    labels = {
        "computed": "computed",
        "skipped": "skipped: this query block leaves this key block out",
        "cached": "cached: the whole tile is forecast, not computed",
    }
    return (
        "<section><h2>Masks</h2>"
        f"<p>One pixel is one pair of blocks: {size[0]} query blocks down, {size[1]} key blocks across; the "
        f"first block "
        "holds the text and is never cached nor skipped. Chosen at an Update, obeyed until the next.</p>"
        f'<div class="masks">{"".join(cells)}</div>'
        + figures.legend([(colour, labels[what]) for colour, what in colours])
        + "</section>"
    )


def facts(title: str, pairs: dict) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items())
    return f"<div><h2>{title}</h2><dl>{rows}</dl></div>"


def facts_section(run: data.Run) -> str:
    content = run.json
    model = {**content["model"], "layers": ", ".join(content["model"]["layers"]), "steps": content["steps"]}
    machine = {k: v for k, v in content["machine"].items() if not isinstance(v, (dict, list))}
    return (
        '<section class="facts">'
        + facts("Configuration", content["config"])
        + facts("Model", model)
        + facts("Machine", machine)
        + "</section>"
    )


def render(run: data.Run) -> str:
    """The whole page as a string."""
    content = run.json
    prompts = "; ".join(picture["prompt"] for picture in content["pictures"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
initial-scale=1">
<meta name="color-scheme" content="light dark"><title>FlashOmni:
{escape(prompts)}</title><style>{CSS}</style></head>
<body><main>
<header><h1>FlashOmni</h1><p>{escape(content["model"]["name"])}, {content["steps"]} steps,
{escape(content["model"]["dtype"])}, {escape(content["machine"].get("cpu", ""))}
({content["machine"].get("threads", "?")} threads), {escape(content["created"])}</p></header>
{headline(run)}
<section><h2>The pictures</h2>
{"".join(comparison(run, i) for i in range(len(content["pictures"])))}
<p>Below each picture: its difference from the reference, amplified {GAIN} times; black is equal.</p>
{results(run)}
<p>All from the same seed and the same noise. The first row is what diffusers does today. The second is this
library with every block computed: it shows what its kernels give by themselves and, in its PSNR, how far
rounding
alone moves a picture. The third adds sparsity; its speed-up over the second is what sparsity gives.
“Attention
computed” is the share of block pairs over all steps. tiny_flux is a small model and this is one machine:
neither
says what a larger model gains.</p></section>
{time_section(run)}
{steps_section(run)}
{density_section(run)}
{masks_section(run)}
{facts_section(run)}
<footer><p>Drawn by <code>{escape(content["command"])}</code>. The numbers are in <code>run.json</code>
beside this page;
<code>flashomni report</code> draws it anew from them.</p></footer>
</main></body></html>
"""


def write(run: data.Run, path: Path | None = None) -> Path:
    """Writes report.html beside the run's data (or to `path`) and gives its path."""
    path = path or run.folder / "report.html"
    path.write_text(render(run), encoding="utf-8")
    return path
