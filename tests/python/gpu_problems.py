"""Random attention problems for the GPU, and their float64 solution: whole matrices and masks, nothing of the
package's own but the packing of bits."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni import SparseSymbols
from flashomni.symbols import pack

NAN = float("nan")


@dataclass
class Problem:
    """One call of sparse_attention, NaN-poisoned outputs included, and what its masks say."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    symbols: SparseSymbols | None
    lengths: list[tuple[int, int]]  # (query, key) tokens of each batch element
    block: tuple[int, int]
    masks: list[tuple[Tensor, Tensor]]  # by element: active [q_blocks, H], selected [q_blocks, H, kv_blocks]
    options: dict = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return self.q.ndim == 3


def _tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    """Normal values; strided: a view whose neighbours in memory are NaN."""
    if strided:
        *outer, heads, dim = shape
        tensor = torch.full((*outer, heads + 1, dim + 8), NAN, device="cuda", dtype=dtype)[..., :heads, :dim]
    else:
        tensor = torch.empty(shape, device="cuda", dtype=dtype)
    return tensor.copy_(torch.randn(shape, device="cuda"))


def _indptr(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)


def random_problem(seed: int) -> Problem:
    """Any head_dim, type, block pair, batch or ragged batch, length, density and option."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.bfloat16, torch.float16])
    dim = rng.choice([64, 72, 80, 96, 128, 128, 256])
    block = rng.choice([(128, 128), (128, 64), (64, 64)])
    kv_heads, group = rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2, 3])
    heads, batch, ragged = kv_heads * group, rng.choice([1, 1, 2, 3]), rng.random() < 0.3
    most = rng.choice([500, 500, 3000])

    def length() -> int:
        return rng.choice([1, rng.randint(1, 700), rng.randint(1, most), 128 * rng.randint(1, 6)])

    same = rng.random() < 0.5
    lengths = [(n, n if same else length()) for n in (length() for _ in range(batch))]
    if not ragged:
        lengths = lengths[:1] * batch
    causal = rng.random() < 0.3
    density = rng.choice([0, 0.02, 0.1, 0.3, 0.5, 0.8, 1, 1])
    skewed, strided = rng.random() < 0.4, rng.random() < 0.5
    return make_problem(
        *(dtype, dim, block, heads, kv_heads, lengths, density),
        ragged=ragged,
        causal=causal,
        skewed=skewed,
        strided=strided,
        peaked=rng.random() < 0.3,
        cached=rng.choice([None, 0.3, 0.8]),
        all_blocks=rng.random() < 0.15,
        summaries=not ragged and not causal and rng.random() < 0.3,
        short_blocks=not ragged and rng.random() < 0.25,
        scale=None if rng.random() < 0.7 else rng.uniform(0.02, 0.3),
        rng=rng,
    )


def make_problem(
    dtype: torch.dtype,
    dim: int,
    block: tuple[int, int],
    heads: int,
    kv_heads: int,
    lengths: list[tuple[int, int]],
    density: float,
    *,
    ragged: bool = False,
    causal: bool = False,
    skewed: bool = False,
    strided: bool = False,
    peaked: bool = False,
    cached: float | None = None,
    all_blocks: bool = False,
    summaries: bool = False,
    short_blocks: bool = False,
    scale: float | None = None,
    rng: random.Random | None = None,
) -> Problem:
    """cached: share of tiles that compute, None for no cache bits. peaked: scores that grow without bounds
    from token to token. short_blocks: lengths below the blocks' slots, with NaN in the slots beyond."""
    rng = rng or random.Random(0)
    batch, kv_tokens = len(lengths), lengths[0][1]

    def shape(index: int, count: int) -> tuple[int, ...]:
        if ragged:
            return sum(pair[index] for pair in lengths), count, dim
        return batch, lengths[0][index], count, dim

    q = _tensor(rng, shape(0, heads), dtype, strided)
    k, v = (_tensor(rng, shape(1, kv_heads), dtype, strided) for _ in range(2))
    if peaked:
        k.mul_(torch.randint(1, 30, (*k.shape[:-2], 1, 1), device="cuda").to(dtype))
    out = _tensor(rng, tuple(q.shape), dtype, strided).fill_(NAN)
    lse = torch.full(q.shape[:-1], NAN, device="cuda")
    masks = []
    for n, m in lengths:
        rows, columns = -(-n // block[0]), -(-m // block[1])
        active = torch.rand(rows, heads, device="cuda") < (1 if cached is None else cached)
        share = torch.rand(rows, heads, 1, device="cuda") * 2 * density if skewed else density
        selected = torch.rand(rows, heads, columns, device="cuda") < share
        masks.append((active, selected | all_blocks))
    options: dict = {"causal": causal, "scale": scale}
    cache = None if cached is None else [pack(active.flatten()[None])[0] for active, _ in masks]
    skip = None if all_blocks else [pack(selected.flatten()[None])[0] for _, selected in masks]
    symbols = None
    if cache is not None or skip is not None or block != (128, 128):
        symbols = SparseSymbols(None, None, batch, heads, *map(max, zip(*lengths, strict=True)), *block)
        join = torch.cat if ragged else torch.stack
        symbols.cache, symbols.skip = (part and join(part) for part in (cache, skip))
        if ragged:
            symbols.cache_indptr = cache and _indptr([len(part) for part in cache])
            symbols.skip_indptr = skip and _indptr([len(part) for part in skip])
    if ragged:
        options |= {
            "q_indptr": _indptr([n for n, _ in lengths]),
            "kv_indptr": _indptr([m for _, m in lengths]),
        }
    columns = -(-kv_tokens // block[1])
    if short_blocks:
        slots = [min(block[1], kv_tokens - j * block[1]) for j in range(columns)]
        sizes = [min(rng.choice([0, 1, block[1] // 2, block[1], block[1]]), slot) for slot in slots]
        options["kv_block_len"] = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        for tensor in (k, v):
            tensor[:, _beyond(options["kv_block_len"], kv_tokens, block[1])] = NAN
    if summaries:
        options["k_mean"], options["v_mean"] = torch.randn(2, batch, columns, kv_heads, dim, device="cuda")
    return Problem(q, k, v, out, lse, symbols, lengths, block, masks, options)


def _beyond(block_len: Tensor, tokens: int, block: int) -> Tensor:
    position = torch.arange(tokens, device="cuda")
    return position % block >= block_len[position // block]


def solve(problem: Problem, element: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One element in float64: out [H, n, D], lse [H, n] (base 2), magnitude of out's terms, active rows."""
    p, (block_q, block_kv) = problem, problem.block
    n, m = p.lengths[element]
    starts = [sum(pair[i] for pair in p.lengths[:element]) for i in (0, 1)]

    def part(tensor: Tensor, index: int) -> Tensor:
        rows = tensor[starts[index] :][: p.lengths[element][index]] if p.ragged else tensor[element]
        heads = rows.transpose(0, 1).double()
        return heads.repeat_interleave(p.q.shape[-2] // heads.shape[0], 0)

    q, k, v = part(p.q, 0), part(p.k, 1), part(p.v, 1)
    active, selected = p.masks[element]
    by_row = selected.permute(1, 0, 2).repeat_interleave(block_q, 1)[:, :n]
    seen = by_row.repeat_interleave(block_kv, 2)[..., :m]
    if p.options["causal"]:
        limit = torch.arange(n, device="cuda")[:, None] + m - n
        seen = seen & (torch.arange(m, device="cuda") <= limit)
    block_len = p.options.get("kv_block_len")
    if block_len is not None:
        seen = seen & ~_beyond(block_len, m, block_kv)
        k, v = k.nan_to_num(0), v.nan_to_num(0)
    scale = p.options["scale"] or q.shape[-1] ** -0.5
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
    if "k_mean" in p.options:
        # The kernel rounds the means to the type of the keys.
        means = [
            p.options[name][element].to(p.q.dtype).double().transpose(0, 1) for name in ("k_mean", "v_mean")
        ]
        k_mean, v_mean = (mean.repeat_interleave(q.shape[0] // mean.shape[0], 0) for mean in means)
        slots = torch.full((by_row.shape[-1],), block_kv, device="cuda")
        slots[-1] = m - (len(slots) - 1) * block_kv
        weight = (slots if block_len is None else block_len).double().log().masked_fill(by_row, -math.inf)
        scores = torch.cat([scores, q @ k_mean.transpose(1, 2) * scale + weight], -1)
        v = torch.cat([v, v_mean], 1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    rows = active.T.repeat_interleave(block_q, 1)[:, :n]
    return weights @ v, lse / math.log(2), weights @ v.abs(), rows


def check(problem: Problem) -> None:
    """Asserts that `out` and `lse` hold the solution, and NaN where a tile is cached."""
    p = problem
    unit = 2.0**-8 if p.q.dtype == torch.bfloat16 else 2.0**-11
    start = 0
    for element, (n, _) in enumerate(p.lengths):
        out, lse = (
            (t[start : start + n] if p.ragged else t[element]).transpose(0, 1) for t in (p.out, p.lse)
        )
        start += n
        expected, expected_lse, magnitude, rows = solve(p, element)
        assert out[~rows].isnan().all() and lse[~rows].isnan().all(), "a cached tile was written"
        empty = rows & expected_lse.isinf()
        assert (out[empty] == 0).all() and (lse[empty] == -math.inf).all(), "a row without keys is not empty"
        full = rows & ~empty
        if not full.any():
            continue
        # Roundings of the result, and of probabilities and their products on the way.
        allowed = 1.5 * unit * (expected[full].abs() + 2 * magnitude[full]) + 1e-6
        error = (out[full].double() - expected[full]).abs()
        assert (error <= allowed).all(), f"out: {(error / allowed).max().item():.3g} times what is allowed"
        allowed = 1e-3 + 2e-5 * expected_lse[full].abs()
        error = (lse[full].double() - expected_lse[full]).abs()
        assert (error <= allowed).all(), f"lse: {(error / allowed).max().item():.3g} times what is allowed"
