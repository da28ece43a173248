"""How times are taken and reported: arms take turns in one run, medians after a warm-up, one row a case."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

import torch

from flashomni.symbols import SparseSymbols

WARM_UP = 2
SHORTEST = 2e-3  # seconds that one timing should last at least: shorter arms are repeated within it


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm. Arms take turns: a machine that drifts does so for all."""
    repeats = {}
    for name, arm in arms.items():
        for _ in range(WARM_UP):
            start = perf_counter()
            arm()
            once = perf_counter() - start
        repeats[name] = max(1, min(1000, round(SHORTEST / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = perf_counter()
            for _ in range(repeats[name]):
                arm()
            times[name].append((perf_counter() - start) / repeats[name])
    return {name: median(values) * 1e3 for name, values in times.items()}


def row(
    suite: str, case: dict, ms: float, flops: float | None, baseline: tuple[str, float, float | None]
) -> dict:
    """One result. flops: of the selected work. baseline: (name, ms, flops). ratio = baseline ms / ms."""
    name, base_ms, base_flops = baseline

    def rate(work: float | None, duration: float) -> float | None:
        return None if work is None else work / duration / 1e6

    return {
        "suite": suite,
        "case": case,
        "ms": ms,
        "gflops": rate(flops, ms),
        "baseline": {"name": name, "ms": base_ms, "gflops": rate(base_flops, base_ms)},
        "ratio": base_ms / ms,
    }


def record(rows: Sequence[dict]) -> dict:
    """Rows with the machine that they were measured on."""
    from flashomni import doctor

    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "machine": doctor.machine(), "benchmarks": list(rows)}


def short(error: BaseException) -> str:
    """Kind and first two lines (a compiler names the cause in the second), for what was not measured."""
    return f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:2])}"[:200]


def rows_table(rows: Sequence[dict]):
    """The rows as a rich table. What all cases have in common stands in the title."""
    from rich import box
    from rich.table import Table

    def show(key: str, value: object) -> str:
        if key in ("pattern", "what", "arm"):
            return str(value)
        return f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}"

    cases = [found["case"] for found in rows]
    common = {k: v for k, v in cases[0].items() if all(case.get(k) == v for case in cases)}
    title = ", ".join(show(key, value) for key, value in common.items())
    table = Table(
        "suite", "case", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("ms", "GFLOP/s", "baseline", "ms", "GFLOP/s", "ratio"):
        table.add_column(name, justify="left" if name == "baseline" else "right", no_wrap=True)
    for found in rows:
        base = found["baseline"]
        case = " ".join(show(key, value) for key, value in found["case"].items() if key not in common)
        rates = ["–" if rate is None else f"{rate:.0f}" for rate in (found["gflops"], base["gflops"])]
        times = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (found["ms"], base["ms"])]
        ratio = f"{found['ratio']:.2f}"
        table.add_row(found["suite"], case, times[0], rates[0], base["name"], times[1], rates[1], ratio)
    return table


def equal_count(density: float, blocks: int) -> int:
    """Blocks of `blocks` that a density stands for: at least one."""
    return max(1, min(blocks, round(density * blocks)))


def skip_mask(
    pattern: str, density: float, heads: int, q_blocks: int, kv_blocks: int, seed: int = 0
) -> torch.Tensor:
    """bool [1, H, q_blocks, kv_blocks] with the same count in every row.

    "random": seeded, any blocks; "clustered": a run of neighbours about the diagonal, clamped at the borders.
    """
    count = equal_count(density, kv_blocks)
    mask = torch.zeros(1, heads, q_blocks, kv_blocks, dtype=torch.bool)
    if pattern == "random":
        scores = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
        return mask.scatter_(-1, scores.topk(count, dim=-1).indices, True)
    if pattern == "clustered":
        centre = torch.arange(q_blocks) * kv_blocks // q_blocks
        start = (centre - count // 2).clamp(0, kv_blocks - count)
        column = torch.arange(kv_blocks)
        inside = (column >= start[:, None]) & (column < start[:, None] + count)
        return mask | inside
    raise ValueError(f"pattern: expected random or clustered, got {pattern!r}")


def cache_mask(pattern: str, density: float, heads: int, q_blocks: int, seed: int = 0) -> torch.Tensor:
    """bool [1, H, q_blocks]: as many active tiles in every head, random or a run of neighbours."""
    return skip_mask(pattern, density, heads, 1, q_blocks, seed)[:, :, 0]


def block_lengths(tokens: int, block: int) -> torch.Tensor:
    """Tokens of each block: float64 [blocks]; the last may be short."""
    blocks = -(-tokens // block)
    lengths = torch.full((blocks,), float(block), dtype=torch.float64)
    lengths[-1] = tokens - (blocks - 1) * block
    return lengths


def attention_flops(symbols: SparseSymbols, head_dim: int) -> float:
    """4 * head_dim a selected (query, key) pair of tokens."""
    cache, skip = symbols.masks()
    selected = (cache.unsqueeze(-1) & skip).cpu().double()
    rows = block_lengths(symbols.q_tokens, symbols.block_q)
    columns = block_lengths(symbols.kv_tokens, symbols.block_kv)
    return 4.0 * head_dim * float(torch.einsum("bhij,i,j->", selected, rows, columns))
