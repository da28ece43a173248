"""GEMM-Q and GEMM-O on a GPU beside torch's linear (cuBLAS), in one run.

python -m flashomni.bench.gemm_cuda [--shapes 33280x3072x3072 ...] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from flashomni import ops
from flashomni.bench import cuda, harness
from flashomni.symbols import SparseSymbols, pack

WINDOW = 6  # steps from one Update to the next
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
PATTERNS = ("random", "clustered")
HEAD_DIM, BLOCK = 128, 128


@dataclass(frozen=True)
class Shape:
    """A linear layer: rows of x, columns of x, columns of out."""

    rows: int
    width: int
    outputs: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.width * self.outputs

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.outputs}"


SHAPES = (
    *(Shape(rows, 3072, 3072) for rows in (33280, 16896, 4608)),
    Shape(33280, 3072, 12288),
    Shape(33280, 15360, 3072),
)


@torch.inference_mode()
def run(shape: Shape, *, dtype: torch.dtype = torch.bfloat16, rounds: int = 7, seed: int = 0) -> list[dict]:
    """Rows of suites "gemm_q_cuda", "gemm_q_gelu_cuda", "gemm_o_cuda" (Dispatch, D = 0 and 1),
    "gemm_o_update_cuda" and "gemm_o_window_cuda" (one Update and five Dispatches), all with the plan.

    GEMM-Q has outputs / 128 heads. GEMM-O has 24 heads of 128, or fewer; columns past them are always active.
    ratio: torch's linear over ours; ideal: the same for work alone; efficiency: one over the other.
    """
    torch.manual_seed(seed)
    x = torch.randn(1, shape.rows, shape.width, device="cuda", dtype=dtype)
    weight = (torch.randn(shape.outputs, shape.width, device="cuda") / shape.width**0.5).to(dtype)
    bias = torch.randn(shape.outputs, device="cuda", dtype=dtype)
    slope = torch.randn(1, shape.rows, min(shape.width, 24 * HEAD_DIM), device="cuda", dtype=dtype)
    out = torch.zeros(1, shape.rows, shape.outputs, device="cuda", dtype=dtype)
    cached = [torch.randn_like(out) for _ in range(2)]
    coefficients = torch.tensor([1.0, 2.0], device="cuda")
    q_heads, o_heads = shape.outputs // HEAD_DIM, slope.shape[-1] // HEAD_DIM

    arms: dict[str, Callable[[], object]] = {"linear": lambda: F.linear(x, weight, bias)}
    cases = []
    for sparsity in SPARSITIES:
        for pattern in PATTERNS if sparsity > 0 else PATTERNS[:1]:
            q, o = (_symbols(pattern, sparsity, heads, shape.rows) for heads in (q_heads, o_heads))
            cases.append((pattern, sparsity, q, o))
            calls = {
                "q": lambda s=q: ops.gemm_q(x, weight, bias, s, out=out),
                "q_gelu": lambda s=q: ops.gemm_q(x, weight, bias, s, activation="gelu_tanh", out=out),
            }
            for order in (0, 1):
                orders = slice(order + 1)
                calls[f"o{order}"] = lambda s=o, n=orders: ops.gemm_o_dispatch(
                    x, weight, cached[n], coefficients[n], s, head_dim=HEAD_DIM, out=out
                )
                calls[f"u{order}"] = lambda s=o, n=orders, d=order: ops.gemm_o_update(
                    x, weight, bias, s, head_dim=HEAD_DIM, derivatives=[slope] * d, out=out, cached=cached[n]
                )
            arms |= {f"{name} {pattern} {sparsity}": call for name, call in calls.items()}
    ms = cuda.interleave(arms, rounds)
    linear = ("torch_linear", ms["linear"], shape.flops)
    window_linear = ("torch_linear", WINDOW * ms["linear"], WINDOW * shape.flops)

    rows = []
    for pattern, sparsity, q, o in cases:
        case = {
            "rows": shape.rows,
            "in": shape.width,
            "out": shape.outputs,
            "sparsity": sparsity,
            "pattern": pattern,
            "dtype": str(dtype).removeprefix("torch."),
        }
        q_share, o_share = _share(q, shape.rows), _share(o, shape.rows)
        in_heads = slope.shape[-1] / shape.width
        o_work = 1 - in_heads * (1 - o_share)  # columns past the heads are always active

        def took(name: str, at: str = f"{pattern} {sparsity}") -> float:
            return ms[f"{name} {at}"]

        def add(suite: str, time: float, work: float, base: tuple, case: dict) -> None:
            found = harness.row(f"{suite}_cuda", case, time, base[2] * work, base)
            found["ideal"] = 1 / work if work > 0 else None
            found["efficiency"] = found["ratio"] * work
            rows.append(found)

        add("gemm_q", took("q"), q_share, linear, case)
        add("gemm_q_gelu", took("q_gelu"), q_share, linear, case)
        for order in (0, 1):
            ordered = {**case, "order": order}
            update = 1 + order * in_heads * (1 - o_share)
            add("gemm_o", took(f"o{order}"), o_work, linear, ordered)
            add("gemm_o_update", took(f"u{order}"), update, linear, ordered)
            window = took(f"u{order}") + (WINDOW - 1) * took(f"o{order}")
            work = (update + (WINDOW - 1) * o_work) / WINDOW
            add("gemm_o_window", window, work, window_linear, {**ordered, "interval": WINDOW})
    return rows


def _symbols(pattern: str, sparsity: float, heads: int, rows: int) -> SparseSymbols:
    """As many active row blocks in every head; clustered: a run of neighbours that begins anywhere."""
    blocks = -(-rows // BLOCK)
    count = round((1 - sparsity) * blocks)
    if pattern == "random":
        mask = torch.rand(heads, blocks, device="cuda").argsort(-1).argsort(-1) < count
    else:
        start = torch.randint(blocks, (heads, 1), device="cuda")
        mask = (torch.arange(blocks, device="cuda") - start) % blocks < count
    return SparseSymbols(pack(mask.T.reshape(1, -1)), None, 1, heads, rows, rows, BLOCK, BLOCK)


def _share(symbols: SparseSymbols, rows: int) -> float:
    """Of the rows' (row, head) pairs, those that are active."""
    mask = symbols.masks()[0][0].double().cpu()
    lengths = harness.block_lengths(rows, BLOCK)
    return float((mask * lengths).sum() / (mask.shape[0] * rows))


def table(rows: list[dict]) -> list[str]:
    """A line a case and suite."""
    lines = [
        "| suite | D | sparsity | pattern | ms | TFLOP/s | over linear | ideal | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        case = found["case"]
        ideal = "–" if found["ideal"] is None else f"{found['ideal']:.2f}"
        cells = [
            *(found["suite"].removesuffix("_cuda"), str(case.get("order", "")), f"{case['sparsity']:g}"),
            *(case["pattern"], f"{found['ms']:.3f}", f"{found['gflops'] / 1e3:.0f}"),
            *(f"{found['ratio']:.2f}", ideal, f"{found['efficiency']:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", help="ROWSxINxOUT, e.g. 33280x3072x3072")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes = [Shape(*map(int, text.split("x"))) for text in arguments.shapes or ()] or SHAPES
    rows = []
    for shape in shapes:
        found = run(shape, rounds=arguments.rounds)
        base = found[0]["baseline"]
        print(f"\n{shape}: linear {base['ms']:.3f} ms, {base['gflops'] / 1e3:.0f} TFLOP/s\n")
        print("\n".join(table(found)), flush=True)
        rows += found
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
