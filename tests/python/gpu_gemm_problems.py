"""Random problems of the sparse GEMMs for the GPU, and their float64 solution: whole matrices and masks,
nothing of the package's own but the packing of bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni import SparseSymbols, gemm_o_dispatch, gemm_o_update, gemm_q
from flashomni.ops import _dispatch
from flashomni.symbols import pack

NAN, HELD = float("nan"), 7.0
ACTIVATIONS = (None, "gelu", "gelu_tanh")


@contextmanager
def without_counter() -> Iterator[None]:
    """Operators are handed none, as in a graph when none is left: then they set one of their own to zero."""
    kept, take = _dispatch._local.__dict__, _dispatch._Counters.take
    before = dict(kept)
    kept.clear()
    _dispatch._Counters.take = lambda self: 0
    try:
        yield
    finally:
        _dispatch._Counters.take = take
        kept.clear()
        kept.update(before)


@dataclass
class Problem:
    """A matrix with its place in a joint sequence, a weight, and the symbols; NaN where nobody may read."""

    x: Tensor  # [B, M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None
    symbols: SparseSymbols | None
    active: Tensor  # bool [B, M, heads]
    row_offset: int
    heads: int
    head_dim: int  # of the reduction, for GEMM-O
    strided: bool = False
    apart: bool = False  # GEMM-O: the columns past the heads are a tensor of their own
    keep_rows: bool = False  # GEMM-O leaves row blocks without an active head alone
    derivatives: list[Tensor] = field(default_factory=list)

    def heads_and_past(self) -> tuple[Tensor, Tensor | None]:
        """`o` and `past` of GEMM-O."""
        if not self.apart:
            return self.x, None
        width = self.heads * self.head_dim
        return self.x[..., :width], self.x[..., width:].contiguous()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.x.shape[:2], self.weight.shape[0])

    def output(self) -> Tensor:
        """NaN, as `out` or as a cached tensor."""
        return _matrix(self.shape, self.x.dtype, self.strided).fill_(NAN)

    @property
    def kept(self) -> Tensor:
        """bool [B, M]: rows that a Dispatch leaves alone, and an Update in what it caches."""
        return ~self.active.any(-1) & self.keep_rows

    def dispatch_output(self) -> Tensor:
        """NaN; with kept rows a number, which a NaN could not hide behind."""
        return self.output().fill_(HELD if self.keep_rows else NAN)

    def head_columns(self, tensor: Tensor, active: bool) -> Tensor:
        """`tensor` in float64, the columns of the other heads zero; columns past the heads are active."""
        columns = self.active.repeat_interleave(self.head_dim, -1)
        past = tensor.shape[-1] - columns.shape[-1]
        if past > 0:
            columns = torch.cat([columns, columns.new_ones((*columns.shape[:-1], past))], -1)
        return torch.where(columns == active, tensor.double(), 0.0)


def _matrix(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    """Memory for a matrix; strided: rows and columns of a larger one, which is NaN."""
    if not strided:
        return torch.empty(shape, device="cuda", dtype=dtype)
    *outer, rows, columns = shape
    larger = torch.full((*outer, rows + 3, (columns + 7) // 8 * 8 + 24), NAN, device="cuda", dtype=dtype)
    return larger[..., 2 : rows + 2, 16 : columns + 16]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, strided: bool, scale: float = 1.0) -> Tensor:
    return _matrix(shape, dtype, strided).copy_(torch.randn(shape, device="cuda") * scale)


def make_problem(
    dtype: torch.dtype,
    rows: int,
    heads: int,
    head_dim: int,
    outputs: int,
    density: float,
    *,
    for_q: bool = False,
    width: int | None = None,
    past: int = 0,
    batch: int = 1,
    block: int = 128,
    row_offset: int = 0,
    rest: int = 0,
    bias: bool = True,
    symbols: bool = True,
    clustered: bool = False,
    strided: bool = False,
    apart: bool = False,
    order: int = 0,
    keep_rows: bool = False,
) -> Problem:
    """for_q: outputs are heads * head_dim, and `width` is the reduction's length; else the reduction goes
    over heads * head_dim and `past` columns more. rest: tokens of the joint sequence after the matrix."""
    if not for_q:
        width = heads * head_dim + past
    tokens = row_offset + rows + rest
    blocks = -(-tokens // block)
    mask = torch.rand(batch, heads, blocks, device="cuda") < density
    if clustered:
        at = torch.arange(blocks, device="cuda") / blocks
        start = torch.rand(batch, heads, 1, device="cuda")
        mask = (at - start) % 1 < density
    if not symbols:
        mask = torch.ones_like(mask)
    packed = pack(mask.transpose(1, 2).reshape(batch, -1)) if symbols else None
    symbols_of = None
    if symbols:
        symbols_of = SparseSymbols(packed, None, batch, heads, tokens, tokens, block, min(block, 128))
    at = (torch.arange(rows, device="cuda") + row_offset) // block
    # Without symbols, whatever heads fit are heads.
    derivative = (heads if symbols else width // head_dim) * head_dim
    x = _normal((batch, rows, width), dtype, strided)
    return Problem(
        x=x,
        weight=_normal((outputs, width), dtype, strided, width**-0.5),
        bias=_normal((outputs,), dtype, False) if bias else None,
        symbols=symbols_of,
        active=mask[:, :, at].transpose(1, 2),
        row_offset=row_offset,
        heads=heads,
        head_dim=head_dim,
        strided=strided,
        apart=apart and past > 0 and symbols,
        keep_rows=keep_rows,
        derivatives=[_normal((batch, rows, derivative), dtype, strided) for _ in range(order)],
    )


def random_problem(seed: int, for_q: bool) -> Problem:
    """Any type, shape, offset, density and layout."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads = rng.choice([1, 2, 3, 5, 8, 24])
    head_dim = rng.choice([64, 72, 80, 96, 128, 128, 256, 8 * rng.randint(1, 40)])
    if heads * head_dim > 4096:
        heads = max(1, 4096 // head_dim)
    block = rng.choice([64, 128])
    most = rng.choice([200, 700, 4000])
    rows = rng.choice([1, rng.randint(1, most), rng.randint(1, most), block * rng.randint(1, 9)])
    return make_problem(
        rng.choice([torch.bfloat16, torch.float16]),
        *(rows, heads, head_dim),
        outputs=heads * head_dim if for_q else 8 * rng.randint(1, rng.choice([8, 60, 200])),
        density=rng.choice([0, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1]),
        for_q=for_q,
        width=8 * rng.randint(1, rng.choice([10, 100, 400])),
        past=rng.choice([0, 0, 8 * rng.randint(1, 100)]),
        batch=rng.choice([1, 1, 2, 3]),
        block=block,
        row_offset=rng.choice([0, 0, 77, 226, 512, rng.randint(0, 700)]),
        rest=rng.choice([0, rng.randint(0, 300)]),
        bias=rng.random() < 0.7,
        symbols=rng.random() < 0.9,
        clustered=rng.random() < 0.4,
        strided=rng.random() < 0.5,
        apart=rng.random() < 0.5,
        order=rng.choice([0, 0, 1, 2, 3]),
        keep_rows=rng.random() < 0.5,
    )


def close(got: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, what: str) -> None:
    """Asserts that a sum is right up to its rounding; magnitude: of the sum's terms, for float32's share."""
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # half the spacing above a power of two
    allowed = 1.01 * unit * expected.abs() + 2.0**-18 * magnitude + 1e-6
    error = (got.double() - expected).abs()
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values wrong, first {wrong.nonzero()[0].tolist()}, "
        f"worst {(error / allowed).nan_to_num(float('inf')).max().item():.3g} times what is allowed"
    )


def terms(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """x weight^T and the sum of its terms' magnitudes, in float64. A derivative has fewer columns than x."""
    weight = p.weight.double()[:, : x.shape[-1]]
    return x.double() @ weight.T, x.double().abs() @ weight.abs().T


def bias_of(p: Problem) -> Tensor | float:
    return 0.0 if p.bias is None else p.bias.double()


def run_q(p: Problem, activation: str | None, out: Tensor) -> Tensor:
    heads = p.heads if p.symbols is None else None
    return gemm_q(
        *(p.x, p.weight, p.bias, p.symbols),
        heads=heads,
        row_offset=p.row_offset,
        activation=activation,
        out=out,
    )


def check_q(p: Problem, activation: str | None, out: Tensor) -> None:
    """Asserts that `out`, NaN before, holds the solution on active tiles and NaN on the others."""
    tiles = p.active.repeat_interleave(p.weight.shape[0] // p.heads, -1)
    assert out[~tiles].isnan().all(), "a cached tile was written"
    value, magnitude = terms(p, p.x)
    value = value + bias_of(p)
    if activation is not None:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        value = torch.nn.functional.gelu(value, approximate=approximate)
        magnitude = magnitude + 2  # the approximate exponential's
    close(out[tiles], value[tiles], magnitude[tiles], p.x.dtype, "gemm_q")


def run_update(p: Problem, out: Tensor, cached: list[Tensor]) -> None:
    o, past = p.heads_and_past()
    gemm_o_update(
        *(o, p.weight, p.bias, p.symbols),
        past=past,
        head_dim=p.head_dim,
        row_offset=p.row_offset,
        derivatives=p.derivatives,
        keep_rows=p.keep_rows,
        out=out,
        cached=cached,
    )


def check_update(p: Problem, out: Tensor, cached: list[Tensor]) -> None:
    """Asserts that `out` and `cached`, NaN before, hold the solution; kept rows of `cached` still NaN."""
    rows = ~p.kept
    for i, source in enumerate([p.x, *p.derivatives]):
        value, magnitude = terms(p, p.head_columns(source, active=False))
        value = value + (bias_of(p) if i == 0 else 0.0)
        close(cached[i][rows], value[rows], magnitude[rows] + 1, p.x.dtype, f"cached[{i}]")
        assert cached[i][~rows].isnan().all(), "a cached tensor was written where rows are kept"
    value, magnitude = terms(p, p.x)
    close(out, value + bias_of(p), magnitude + 1, p.x.dtype, "gemm_o_update")


def hide_cached(p: Problem) -> None:
    """What a Dispatch may not read of x becomes NaN."""
    hidden = ~p.active.repeat_interleave(p.head_dim, -1)
    p.x[..., : hidden.shape[-1]][hidden] = NAN
    p.x[p.kept] = NAN


def run_dispatch(p: Problem, cached: list[Tensor], coefficients: Tensor, out: Tensor) -> None:
    o, past = p.heads_and_past()
    gemm_o_dispatch(
        *(o, p.weight, cached, coefficients, p.symbols),
        past=past,
        head_dim=p.head_dim,
        row_offset=p.row_offset,
        keep_rows=p.keep_rows,
        out=out,
    )


def check_dispatch(p: Problem, cached: list[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """Asserts that `out`, a dispatch_output() before, holds the solution, in the rows that are not kept."""
    assert bool((out[p.kept] == HELD).all()), "a row without an active head was written"
    value, magnitude = terms(p, p.head_columns(p.x, active=True))
    for c, part in zip(coefficients.tolist(), cached, strict=True):
        if c != 0:
            part = part.double().nan_to_num()  # kept rows
            value, magnitude = value + c * part, magnitude + abs(c) * part.abs()
    rows = ~p.kept
    close(out[rows], value[rows], magnitude[rows], p.x.dtype, "gemm_o_dispatch")
