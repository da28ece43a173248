"""The page of what was measured on GPUs, docs/gpu-results.md, from the records that gpu_record.py keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def page(records: Iterable[dict], today: str, cases: Sequence[str]) -> str:
    """A section a record. today: the digest of the kernels' sources as they are now; parts of others say so.
    cases: the whole models, in their order."""
    lines = [
        "# Measured on GPUs",
        "",
        "Written by `make gpu-record` (tools/gpu_record.py) from bench/results; do not edit. Medians of CUDA",
        "graphs of 20 ms, all arms of a table in one run, every round in another order, the plan included;",
        "TFLOP/s are of selected work.",
        "",
    ]
    for record in records:
        lines += document(record, today, cases)
    return "\n".join(lines).rstrip() + "\n"


def select_lines(rows: list[dict]) -> list[str]:
    """Choosing symbols as a share of dense attention, forecasts as a share of a copy's bandwidth."""
    if not rows:
        return []
    lines = [
        "### Symbols and forecasts, one layer",
        "",
        "| what | tokens | ms | of cuDNN's dense attention | of copy bandwidth |",
        "|---|---|---|---|---|",
    ]
    for found in rows:
        share, copied = "–", "–"
        if found["suite"] == "select":
            share = f"{found['ms'] / found['baseline']['ms']:.2%}"
        else:
            copied = f"{found['copy_share']:.0%}"
        case = found["case"]
        lines.append(f"| {case['what']} | {case['seqlen']} | {found['ms']:.4f} | {share} | {copied} |")
    return [*lines, ""]


def attention_table(rows: list[dict]) -> list[str]:
    """A line a case: selected work a second, and ratios."""
    lines = [
        "| density | pattern | blocks | ms | TFLOP/s | of our dense | over cuDNN | over FA3 | plan, µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        case = found["case"]
        nothing = case["density"] == 0
        rate = "–" if nothing else f"{found['gflops'] / 1e3:.0f}"
        shares = [
            "–" if nothing or found[name] is None else f"{found[name]:.{digits}f}"
            for name, digits in (("share_of_dense", 3), ("ratio", 2), ("ratio_fa3", 2))
        ]
        block = "x".join(map(str, case["block"]))
        cells = [f"{case['density']:g}", case["pattern"], block, f"{found['ms']:.3f}", rate, *shares]
        lines.append(f"| {' | '.join(cells)} | {found['plan_us']:.1f} |")
    return lines


def gemm_sections(rows: list[dict]) -> list[str]:
    """A table a shape of linear layer."""
    from flashomni.bench import gemm_cuda

    by_shape: dict[tuple, list[dict]] = {}
    for found in rows:
        case = found["case"]
        if found["suite"].startswith("gemm"):
            by_shape.setdefault((case["rows"], case["in"], case["out"]), []).append(found)
    lines = []
    for (tokens, width, outputs), found in by_shape.items():
        base = found[0]["baseline"]
        lines += [f"### GEMMs, {tokens} tokens, {width} to {outputs}, {found[0]['case']['dtype']}", ""]
        lines += [f"torch's linear: {base['ms']:.3f} ms ({base['gflops'] / 1e3:.0f} TFLOP/s).", ""]
        lines += [*gemm_cuda.table(found), ""]
    return lines


def end_to_end_lines(rows: list[dict]) -> list[str]:
    """A full-size model: a line an arm."""
    runs = [found for found in rows if found["case"]["what"] in ("run", "picture")]
    case = runs[0]["case"]
    steps = {
        (r["case"]["arm"], r["case"].get("level"), r["case"]["what"].removesuffix(" step")): r["ms"]
        for r in rows
    }
    what = (
        f"{case['model']} {case['resolution']}, {case['tokens']} tokens"
        if "tokens" in case
        else case["model"]
    )
    lines = [f"### End to end: {what}, {case['steps']} steps, {case['dtype']}", ""]
    if rows[0].get("config", {}).get("cache_dtype") == "float8_e4m3":
        lines += ["Caches in e4m3.", ""]
    if runs[0].get("composed"):
        lines += ["Runs are composed of a few measured steps of each kind.", ""]
    columns = (
        "seconds",
        "ratio",
        "Full, ms",
        "Update",
        "Dispatch",
        "pairs",
        "tiles",
        "bound",
        "of it",
        "GiB",
    )
    lines += [f"| arm | level | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for found in runs:
        arm, level = found["case"]["arm"], found["case"].get("level", "")
        kinds = [
            steps.get((arm, found["case"].get("level"), kind)) for kind in ("full", "update", "dispatch")
        ]
        cells = [arm, level, f"{found['ms'] / 1e3:.2f}", f"{found['ratio']:.2f}"]
        cells += ["–" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in kinds]
        shares = [("density", ".2f"), ("tiles", ".2f"), ("bound", ".2f"), ("share_of_bound", ".0%")]
        shares.append(("peak_gib", ".1f"))
        for name, form in shares:
            value = found.get(name, found["case"].get(name))
            cells.append("–" if value is None else format(value, form))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nNot measured: {name}: {why}" for name, why in runs[0].get("not_measured", {}).items()]
    return [*lines, *timeline_lines(runs), ""]


def timeline_lines(runs: list[dict]) -> list[str]:
    """When the GPU was at work and when not, where that was traced."""
    from flashomni.bench import trace

    traced = [found for found in runs if found.get("trace")]
    if not traced:
        return []
    lines = ["", "The GPU's timeline of a picture, drawn without a stop after each step, ms:", ""]
    lines += [f"| arm | {' | '.join(trace.COLUMNS)} |", "|---" * (len(trace.COLUMNS) + 1) + "|"]
    lines += [f"| {found['case']['arm']} | {' | '.join(trace.cells(found['trace']))} |" for found in traced]
    return lines


def document(record: dict, today: str, cases: Sequence[str]) -> list[str]:
    """One GPU's section; of whole models, `cases`."""
    here, lines = record["machine"], []
    lines += [f"## {here['gpu']}", ""]
    lines += [
        f"Driver {here['driver']}, {here['power_limit']}, torch {here['torch']}, sources `{today[:12]}`.",
        "",
    ]
    parts = {name: part for name, part in record.items() if name != "machine" and not name.startswith("e2e-")}
    earlier = [name for name, part in parts.items() if part["sources"] != today]
    lines += [f"Of earlier sources: {', '.join(earlier)}.", ""] if earlier else []
    if "tests" in record:
        t = record["tests"]
        passed = t["tests"] - t["failures"] - t["errors"] - t["skipped"]
        lines += [
            f"Tests: {passed} passed, {t['failures'] + t['errors']} failed, {t['skipped']} skipped; among "
            f"them one of {t['random_problems']} random attention problems against float64.",
            "",
        ]
    if "sanitizer" in record:
        tools = {name: of for name, of in record["sanitizer"].items() if isinstance(of, dict)}
        said = ", ".join(f"{tool} {result['errors']}" for tool, result in tools.items())
        lines += [f"compute-sanitizer, errors: {said}.", ""]
    bench = record.get("benchmarks")
    if bench:
        by_shape: dict[tuple, list[dict]] = {}
        for found in bench["rows"]:
            if found["suite"] == "attention_cuda":
                by_shape.setdefault((found["case"]["seqlen"], found["case"]["head_dim"]), []).append(found)
        for (tokens, head_dim), rows in by_shape.items():
            case, base = rows[0]["case"], rows[0]["baseline"]
            dense = f"cuDNN {base['ms']:.3f} ms ({base['gflops'] / 1e3:.0f} TFLOP/s)"
            if rows[0]["fa3_ms"]:
                rate = base["gflops"] / 1e3 * base["ms"] / rows[0]["fa3_ms"]
                dense += f", FlashAttention-3 {rows[0]['fa3_ms']:.3f} ms ({rate:.0f})"
            lines += [
                f"### Attention, {tokens} tokens, {case['heads']} heads of {head_dim}, {case['dtype']}",
                "",
            ]
            lines += [f"Dense: {dense}.", "", *attention_table(rows), ""]
        lines += gemm_sections(bench["rows"])
        suites = ("select", "norm", "forecast")
        lines += select_lines([found for found in bench["rows"] if found["suite"] in suites])
        host = ", ".join(f"{name} {us:.1f} µs" for name, us in bench["host_us"].items())
        lines += [f"Host time of an eager call: {host}.", ""]
        runs = bench.get("host_us_runs", [])
        sums = [f"{sum(us for name, us in run.items() if not name.startswith('torch')):.0f}" for run in runs]
        lines += [f"All four of a Dispatch layer, minutes apart: {', '.join(sums)} µs.", ""] if sums else []
    for part in (record[f"e2e-{case}"] for case in cases if f"e2e-{case}" in record):
        section = end_to_end_lines(part["rows"])
        if part["sources"] != today:
            section[2:2] = [f"With earlier kernels (sources `{part['sources'][:12]}`).", ""]
        lines += section
    return lines
