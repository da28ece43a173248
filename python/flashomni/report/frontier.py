"""The quality sweep on paper: a plot of speed-up against PSNR, and the table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashomni.report import metrics

INK, SOFT, LINE = "#1c2128", "#59636e", "#d8dee4"
GROUPS = {
    "sweep": ("#8cb4f0", "o", "sweep"),
    "paper": ("#d4761c", "D", "the paper's settings"),
    "floor": ("#2da28f", "s", "dense: other kernels, other type"),
}


def plot(rows: Sequence[dict], best: Sequence[dict], floor: float, path: Path) -> None:
    """Writes the frontier as a PNG: one point a setting, the settings that nothing beats joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=160)
    sparse = [row["psnr"] for row in rows if row["group"] in ("sweep", "paper")]
    top = max(
        [floor + 10, *(value + 4 for value in sparse)]
    )  # dense arms far above it are pinned to the edge
    for group, (colour, marker, label) in GROUPS.items():
        points = [row for row in rows if row["group"] == group and row["psnr"] is not None]
        if not points:
            continue
        x, y = [p["speed_up"] for p in points], [p["psnr"] for p in points]
        for pinned, i in enumerate(i for i, value in enumerate(y) if value > top):
            y[i] = top - 1.5 * pinned
        low = [max(shown - p["worst_psnr"], 0.0) for p, shown in zip(points, y, strict=True)]
        axes.errorbar(
            x, y, yerr=[low, [0.0] * len(low)], fmt="none", ecolor=colour, alpha=0.45, lw=1, zorder=1
        )
        axes.scatter(x, y, s=34, c=colour, marker=marker, label=label, zorder=3, edgecolors="white", lw=0.6)
        for point, shown in zip(points, y, strict=True):
            if point["psnr"] > top:
                note = f"  {point['name'].removeprefix('dense, ')}: {psnr_cell(point['psnr'])} ↑"
                axes.text(point["speed_up"], shown, note, color=colour, va="center", fontsize=8.5)
    if best:
        x, y = [row["speed_up"] for row in best], [row["psnr"] for row in best]
        axes.plot(x, y, color="#1f6feb", lw=1.8, zorder=2, drawstyle="steps-pre", label="frontier")
    axes.axhline(floor, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=0)
    axes.text(
        1.0,
        floor,
        f" {floor:g} dB",
        color=SOFT,
        va="bottom",
        fontsize=9,
        transform=axes.get_yaxis_transform(),
    )
    axes.set_xlabel("speed-up over dense torch, end to end", color=INK)
    axes.set_ylabel("PSNR against dense torch, dB", color=INK)
    axes.set_title(
        "tiny_flux: mean over the prompts, whiskers to the worst", loc="left", fontsize=11, color=INK
    )
    axes.grid(color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def psnr_cell(value: float | None) -> str:
    if value is None:
        return "–"
    return "equal" if value >= metrics.PSNR_OF_EQUAL else f"{value:.1f}"


def table_row(row: dict, mark: bool) -> str:
    name = f"**{row['name']}**" if mark else row["name"]
    ssim = "–" if row["ssim"] is None else f"{row['ssim']:.3f}"
    cells = [
        name,
        f"{row['density']:.0%}",
        f"{row['seconds']:.1f}",
        f"{row['speed_up']:.2f}",
        psnr_cell(row["psnr"]),
        psnr_cell(row["worst_psnr"]),
        ssim,
        f"{row['shows_prompt']} of {row['pictures']}",
        row["worst_prompt"] or "–",
    ]
    return "| " + " | ".join(cells) + " |"


def markdown(content: dict, best: Sequence[dict], floor: float) -> str:
    """The whole of docs/quality.md."""
    rows, host, count = content["rows"], content["machine"], len(content["prompts"])
    fast = [row for row in best if row["psnr"] >= floor]
    verdict = (
        f"The fastest setting with a mean PSNR of {floor:g} dB or more: `{fast[-1]['name']}`, "
        f"{fast[-1]['speed_up']:.2f}x at {fast[-1]['psnr']:.1f} dB."
        if fast
        else f"No setting of this sweep keeps a mean PSNR of {floor:g} dB."
    )
    on_frontier = {row["name"] for row in best}
    order = {"reference": 0, "floor": 1, "paper": 2, "sweep": 3}
    ranked = sorted(rows, key=lambda r: (order[r["group"]], r["speed_up"]))
    lines = [
        "# Quality of the engine on tiny_flux",
        "",
        f"Made by `flashomni quality --prompts {count} --steps {content['steps']}` on {host['cpu']}, "
        f"{host['threads']} threads, {host['isa']}, torch {host['torch']}. {count} held-out "
        f"prompt{'s' if count != 1 else ''}, one seed each, "
        f"{content['steps']} steps, 256 x 256 pixels (4,096 image and 16 text tokens).",
        "",
        "![Speed-up against PSNR](images/frontier.png)",
        "",
        verdict,
        "",
        "| setting | attention computed | s a picture | speed-up | PSNR, dB | worst | SSIM | shows the "
        "prompt "
        "| worst prompt |",
        "|---|---|---|---|---|---|---|---|---|",
        *(table_row(row, row["name"] in on_frontier) for row in ranked),
        "",
        "How to read it:",
        "",
        "- Every picture is held against dense torch of the same prompt and seed, in float32. PSNR and SSIM "
        "are means "
        "over the prompts; “worst” is the lowest PSNR and the prompt it belongs to.",
        "- The floor is what does not come from sparsity: the same dense computation in this library's "
        "kernels (other "
        "order of rounding), and in torch with bfloat16.",
        "- “Attention computed” is the share of (query block, key block) pairs over all steps, heads and "
        "layers; dense "
        "steps count 100%. N: steps from one Update to the next; D: order of the forecast; τq, τkv: shares "
        "that may be "
        "cached and skipped; ramp: power of the growth of both over the run, 0 = none; warm-up: dense steps "
        "at the "
        "start (the paper's 8 of 50 become 6 of 40). Settings in bold are on the frontier: no other is both "
        "faster and "
        "closer.",
        "- Speed-up is end to end on this machine: dense torch seconds over this setting's, same prompts.",
        "- tiny_flux is a small model on a small machine: these figures say little about FLUX.1's.",
        "",
    ]
    return "\n".join(lines)
