"""Selection, its summaries, block means and norm with RoPE on the GPU: against float64, the CPU, and in use.

What may differ from the reference: a bit whose shares lie within `slack` of the threshold or of another share
(reference.Choice.sure says which). What may differ from the CPU backend: the same, with a smaller slack, as
both compute scores in float32 and add shares in float64, each in an order of its own.
"""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import reference
import torch
from inputs import (
    BLOCKS,
    HEAD_DIMS,
    norm_weight,
    poison_unread,
    random_symbols,
    same_bits,
    set_padding,
    token_mask,
)

from flashomni import (
    SparseSymbols,
    block_mean,
    norm_rope,
    norm_rope_mean,
    select_flashomni,
    summarize_symbols,
)

pytestmark = pytest.mark.gpu

PROBLEMS = int(os.environ.get("FLASHOMNI_GPU_PROBLEMS", "2500")) // 10
HALVES = [torch.bfloat16, torch.float16]
NAN = float("nan")


def on_gpu(x: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The same values on the GPU; with padding, as a view whose neighbours in memory are NaN."""
    if not padding:
        return x.cuda()
    *outer, heads, dim = x.shape
    wide = torch.full((*outer, heads + 1, dim + padding), NAN, dtype=x.dtype, device="cuda")
    wide[..., :heads, :dim] = x.cuda()
    return wide[..., :heads, :dim]


def poisoned(batch: int, heads: int, tokens: int, block: tuple[int, int], device: str) -> SparseSymbols:
    symbols = SparseSymbols.zeros(batch, heads, tokens, tokens, *block, device)
    symbols.cache.fill_(0xA5)
    symbols.skip.fill_(0x5A)
    return symbols


def select(q_mean, k_mean, tokens, text, block, **options) -> SparseSymbols:
    device = str(q_mean.device)
    symbols = poisoned(q_mean.shape[0], q_mean.shape[2], tokens, block, device)
    return select_flashomni(q_mean, k_mean, symbols, text_start=text[0], text_length=text[1], **options)


def check_valid(symbols: SparseSymbols, tokens: int, text: tuple[int, int], block: tuple[int, int]) -> None:
    """What holds for any scores: bits past the end are 0, text computes, an active row keeps a block."""
    cache, skip = (mask.cpu() for mask in symbols.masks())
    again = SparseSymbols.from_masks(
        cache, skip, q_tokens=tokens, kv_tokens=tokens, block_q=block[0], block_kv=block[1]
    )
    assert torch.equal(again.cache, symbols.cache.cpu()) and torch.equal(again.skip, symbols.skip.cpu())
    text_q = reference.text_blocks(tokens, block[0], *text)
    text_kv = reference.text_blocks(tokens, block[1], *text)
    for b in range(symbols.batch):
        if not cache[b].any():
            continue  # reused whole (s_q)
        assert cache[b][..., text_q].all() and skip[b][..., text_q, :].all()
        assert skip[b][cache[b]][..., text_kv].all()
    assert skip[cache].any(-1).all() and not skip[~cache].any()


def check_against_reference(
    symbols, q_mean, k_mean, tokens, text, tau_q, tau_kv, block, k_similarity=None, self_similarity=0.0
) -> None:
    cache, skip = (mask.cpu() for mask in symbols.masks())
    group = q_mean.shape[2] // k_mean.shape[2]
    for b in range(symbols.batch):
        for h in range(symbols.heads):
            cached, skipped = reference.select_flashomni(
                *(q_mean[b, :, h].cpu(), k_mean[b, :, h // group].cpu(), tokens, *text, tau_q, tau_kv),
                reference.Blocks(*block),
                guarded=None
                if k_similarity is None
                else ~(k_similarity[b, :, h // group] > self_similarity).cpu(),
            )
            rows = cache[b, h]
            assert torch.equal(~rows[cached.sure], cached.chosen[cached.sure])
            sure = skipped.sure[rows]
            assert torch.equal(~skip[b, h][rows][sure], skipped.chosen[rows][sure])


def random_case(seed: int) -> dict:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2])
    block, dim, batch = rng.choice(BLOCKS), rng.choice(HEAD_DIMS), rng.choice([1, 2])
    tokens = rng.randint(1, rng.choice([100, 700, 3000, 9000]))
    length = min(tokens, rng.choice([0, 16, 77, 226, 512, 10**6]))
    start = min(rng.choice([0, 0, 100]), tokens - length)
    q_blocks, kv_blocks = (reference.blocks(tokens, n) for n in block)
    spread, padding = rng.choice([0.3, 1.5, 4.0]), rng.choice([0, 8, 3])
    guard = {}
    if rng.random() < 0.4:
        similarity = torch.rand(batch, kv_blocks, kv_heads)
        similarity[torch.rand(similarity.shape) < 0.05] = NAN
        guard = {"k_similarity": similarity.cuda(), "self_similarity": rng.choice([0.0, 0.1, 0.6])}
    return guard | {
        "q_mean": on_gpu(spread * torch.randn(batch, q_blocks, kv_heads * group, dim), padding),
        "k_mean": on_gpu(torch.randn(batch, kv_blocks, kv_heads, dim), padding),
        "tokens": tokens,
        "text": (start, length),
        "block": block,
        "tau_q": rng.choice([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
        "tau_kv": rng.choice([0.0, 0.05, 0.15, 0.5, 1.0]),
    }


def test_random_problems() -> None:
    for seed in range(PROBLEMS):
        case = random_case(seed)
        try:
            symbols = select(**case)
            check_valid(symbols, case["tokens"], case["text"], case["block"])
            check_against_reference(symbols, **case)
        except AssertionError as error:
            raise AssertionError(f"random_case({seed}): {error}") from None


def test_the_cpu_chooses_the_same() -> None:
    """On random scores nothing lies within rounding of a threshold but by accident: a bit in 20,000."""
    differ = total = 0
    for seed in range(PROBLEMS):
        case = random_case(seed)
        gpu = select(**case)
        cpu = select(**(case | {name: t.cpu() for name, t in case.items() if isinstance(t, torch.Tensor)}))
        for a, b in ((gpu.cache, cpu.cache), (gpu.skip, cpu.skip)):
            changed = a.cpu() ^ b
            differ += int(sum(((changed >> bit) & 1).sum() for bit in range(8)))
            total += 8 * changed.numel()
    assert differ <= 2 + total // 20_000, f"{differ} of {total} bits differ"


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("tokens,text", [(1, 0), (64, 0), (128, 64), (129, 128), (64_000, 512), (128_000, 0)])
def test_one_block_and_a_thousand(tau: float, tokens: int, text: int) -> None:
    block = (128, 64) if tokens < 1000 else (128, 128) if tokens == 128_000 else (64, 64)
    q_blocks, kv_blocks = (reference.blocks(tokens, n) for n in block)
    q_mean, k_mean = torch.randn(1, q_blocks, 2, 64).cuda(), torch.randn(1, kv_blocks, 1, 64).cuda()
    symbols = select(q_mean, k_mean, tokens, (0, text), block, tau_q=tau, tau_kv=tau)
    check_valid(symbols, tokens, (0, text), block)
    if tau == 0:
        assert symbols.density() == 1


@pytest.mark.parametrize("text", [0, 128])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_equal_scores_are_chosen_by_index(text: int, value: float) -> None:
    q_mean = torch.full((1, 11, 1, 64), value)
    options = {"tau_q": 0.55, "tau_kv": 0.3}
    for block_kv in (128, 64):
        k_mean = torch.full((1, 11 * 128 // block_kv, 1, 64), value)
        case = (11 * 128, (0, text), (128, block_kv))
        gpu = select(q_mean.cuda(), k_mean.cuda(), *case, **options)
        cpu = select(q_mean, k_mean, *case, **options)
        assert torch.equal(gpu.cache.cpu(), cpu.cache) and torch.equal(gpu.skip.cpu(), cpu.skip)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("share", [0.001, 0.2, 1.0])
def test_scores_that_are_not_finite_give_valid_symbols(bad: float, share: float) -> None:
    torch.manual_seed(0)
    q_mean, k_mean = torch.randn(2, 12, 4, 64), torch.randn(2, 24, 2, 64)
    for mean in (q_mean, k_mean):
        mean[torch.rand(mean.shape) < share] = bad
    case = (1500, (0, 77), (128, 64))
    symbols = select(q_mean.cuda(), k_mean.cuda(), *case, tau_q=0.5, tau_kv=0.2)
    check_valid(symbols, *case)


@pytest.mark.parametrize("s_q", [0.0, 0.3, 0.6, 1.0])
def test_a_layer_with_few_active_tiles_is_reused(s_q: float) -> None:
    torch.manual_seed(3)
    q_mean, k_mean = torch.randn(4, 24, 2, 64).cuda(), torch.randn(4, 24, 2, 64).cuda()
    case = (3000, (0, 226), (128, 128))
    without = select(q_mean, k_mean, *case, tau_q=0.5, tau_kv=0.1)
    symbols = select(q_mean, k_mean, *case, tau_q=0.5, tau_kv=0.1, s_q=s_q)
    for b in range(4):
        reused = s_q > 0 and float(without.masks()[0][b].float().mean()) <= s_q
        for got, want in ((symbols.cache, without.cache), (symbols.skip, without.skip)):
            assert not got[b].any() if reused else torch.equal(got[b], want[b])


@pytest.mark.parametrize("ramp", [0.0, 0.37, 1.0, 5.0, -1.0, NAN])
def test_the_ramp_scales_both_thresholds(ramp: float) -> None:
    case = random_case(5) | {"tau_q": 0.5, "tau_kv": 0.25}
    scale = 0.0 if ramp != ramp else ramp
    want = case | {name: min(max(scale * case[name], 0.0), 1.0) for name in ("tau_q", "tau_kv")}
    got, want = select(**case, ramp=torch.tensor([ramp], device="cuda")), select(**want)
    assert torch.equal(got.cache, want.cache) and torch.equal(got.skip, want.skip)


def test_a_graph_follows_its_inputs() -> None:
    """Means, selection and the ramp captured once; replayed on other queries and another ramp."""
    torch.manual_seed(1)
    tokens, heads, dim = 2000, 3, 128
    shape = (4, 1, tokens, heads, dim)
    q, k, other_q, other_k = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind(0)
    ramp = torch.tensor([0.5], device="cuda")
    symbols = poisoned(1, heads, tokens, (128, 64), "cuda")

    def choose(into: SparseSymbols) -> SparseSymbols:
        means = block_mean(q, 128), block_mean(k, 64)
        options = {"text_start": 0, "text_length": 77, "tau_q": 0.6, "tau_kv": 0.2, "s_q": 0.1}
        return select_flashomni(*means, into, ramp=ramp, **options)

    choose(symbols)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choose(symbols)
    for step in range(3):
        if step:
            q.copy_(other_q if step == 1 else -other_q)
            k.copy_(other_k)
            ramp.fill_(step / 2)
        symbols.cache.fill_(0xFF)
        symbols.skip.fill_(0xFF)
        graph.replay()
        want = choose(poisoned(1, heads, tokens, (128, 64), "cuda"))
        assert torch.equal(symbols.cache, want.cache) and torch.equal(symbols.skip, want.skip)


def test_every_run_gives_the_same_bits() -> None:
    case = random_case(11) | {"tau_q": 0.5, "tau_kv": 0.3}
    first = select(**case)
    for _ in range(20):
        again = select(**case)
        assert torch.equal(first.cache, again.cache) and torch.equal(first.skip, again.skip)


class Summary:
    """Poisoned outputs of summarize_symbols: the rows' bits at an odd address, among bytes to be left."""

    def __init__(self, symbols: SparseSymbols):
        row_bytes = reference.blocks(symbols.q_blocks, 8)
        self.bits = torch.empty(symbols.batch, row_bytes + 3, dtype=torch.uint8, device="cuda")
        self.shares = torch.empty(2, symbols.heads, device="cuda")
        self.awake = torch.empty(symbols.batch, dtype=torch.uint8, device="cuda")
        self.outputs = self.bits[:, 1:-2], self.shares, self.awake
        self.poison()

    def poison(self) -> None:
        self.bits.fill_(0xA5)
        self.shares.fill_(NAN)
        self.awake.fill_(0xA5)

    def check(self, symbols: SparseSymbols) -> None:
        for got, want in zip(self.outputs, reference.summary(*symbols.masks()), strict=True):
            assert torch.equal(got.cpu(), want)
        assert bool((self.bits[:, [0, -2, -1]] == 0xA5).all())


def at_odd_addresses(symbols: SparseSymbols) -> SparseSymbols:
    """On the GPU, elements further apart than their bytes, from an odd address; bits between are set."""

    def moved(bits: torch.Tensor) -> torch.Tensor:
        wide = torch.full((bits.shape[0], bits.shape[1] + 6), 0xFF, dtype=torch.uint8, device="cuda")
        wide[:, 3:-3] = bits.cuda()
        return wide[:, 3:-3]

    return dataclasses.replace(symbols, cache=moved(symbols.cache), skip=moved(symbols.skip))


def test_summaries() -> None:
    """To the bit: counts are integers and divided once."""
    draw = random.Random(17)
    for problem in range(PROBLEMS):
        q_tokens, kv_tokens = (
            draw.choice([1, 63, 129, 700, 4608, 9000]),
            draw.choice([1, 65, 513, 4608, 20000]),
        )
        densities = draw.choice([0.0, 0.02, 0.5, 1.0]), draw.choice([0.0, 0.05, 0.5, 1.0])
        symbols = random_symbols(
            torch.Generator().manual_seed(problem),
            *(draw.randint(1, 3), draw.randint(1, 30), q_tokens + draw.randint(0, 200), kv_tokens),
            *(draw.choice(BLOCKS), *densities),
        )
        summary = Summary(symbols)
        padded = dataclasses.replace(symbols, cache=symbols.cache.clone(), skip=symbols.skip.clone())
        set_padding(padded)
        on_device = padded.to("cuda") if problem % 2 else at_odd_addresses(padded)
        summarize_symbols(on_device, *summary.outputs)
        summary.check(symbols)


def test_summaries_in_a_graph_follow_the_bits() -> None:
    """After a selection in the same graph: the summary is of the bits that were just written."""
    torch.manual_seed(3)
    tokens, heads = 2000, 5
    q_mean = torch.randn(2, 16, heads, 64, device="cuda")
    k_mean = torch.randn(2, 32, heads, 64, device="cuda")
    symbols = poisoned(2, heads, tokens, (128, 64), "cuda")
    summary = Summary(symbols)

    def run() -> None:
        options = {"text_start": 0, "text_length": 77, "tau_q": 0.6, "tau_kv": 0.3, "s_q": 0.45}
        select_flashomni(q_mean, k_mean, symbols, **options)
        summarize_symbols(symbols, *summary.outputs)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        q_mean.normal_(std=2)
        summary.poison()
        graph.replay()
        summary.check(symbols.to("cpu"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("padding", [0, 8, 3])
def test_block_mean(dtype: torch.dtype, dim: int, padding: int) -> None:
    torch.manual_seed(dim)
    for tokens, block in ((1, 64), (64, 64), (65, 64), (700, 128), (333, 128)):
        x = torch.randn(2, tokens, 3, dim).to(dtype)
        got = block_mean(on_gpu(x, padding), block)
        expected = torch.stack([reference.block_mean(x[b], block) for b in range(2)])
        reference.assert_close(got.cpu(), expected, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("padding", [0, 8, 3])
def test_self_similarity(dtype: torch.dtype, dim: int, padding: int) -> None:
    torch.manual_seed(dim)
    for tokens, block in ((1, 64), (64, 64), (65, 64), (700, 128), (333, 128)):
        x = (torch.randn(2, tokens, 5, dim) + 0.4 * torch.randn(2, 1, 5, dim)).to(dtype)
        x[:, ::7, 2] = 0
        similarity = torch.full((2, reference.blocks(tokens, block), 5), NAN, device="cuda")
        mean = block_mean(on_gpu(x, padding), block, similarity)
        for got, of in ((mean, reference.block_mean), (similarity, reference.self_similarity)):
            expected = torch.stack([of(x[b], block) for b in range(2)])
            reference.assert_close(got.cpu(), expected, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("parts", ["norm", "rope", "both", "none"])
@pytest.mark.parametrize("padding", [0, 8, 3])
@pytest.mark.parametrize("similar", [False, True])
def test_norm_rope_mean(dtype: torch.dtype, dim: int, parts: str, padding: int, similar: bool) -> None:
    """Rows are to the bit those of norm_rope; means and similarities are of them, held to float64."""
    torch.manual_seed(dim)
    for tokens, block, heads in ((1, 64, 1), (130, 64, 11), (333, 128, 4), (512, 128, 6)):
        x = torch.randn(2, tokens, heads, dim).to(dtype)
        weight = torch.randn(dim).to(dtype).cuda() if parts in ("norm", "both") else None
        angles = 6.3 * torch.rand(77 + tokens, dim, device="cuda")
        cos, sin = (angles.cos(), angles.sin()) if parts in ("rope", "both") else (None, None)
        wanted = on_gpu(x, padding)
        if parts != "none":
            norm_rope(wanted, weight, cos, sin, row_offset=77)
        blocks = reference.blocks(tokens, block)
        mean = torch.full((2, blocks + 1, heads, dim), NAN, device="cuda")[:, 1:]
        similarity = torch.full((2, blocks, heads), NAN, device="cuda") if similar else None
        got = on_gpu(x, padding)
        norm_rope_mean(got, weight, cos, sin, mean, similarity, block=block, row_offset=77)
        assert torch.equal(got, wanted)
        pairs = [(mean, reference.block_mean)]
        pairs += [(similarity, reference.self_similarity)] if similar else []
        for measured, of in pairs:
            expected = torch.stack([of(wanted[b].cpu(), block) for b in range(2)])
            reference.assert_close(measured.cpu(), expected, torch.float32)


def test_a_nan_stays_in_its_block() -> None:
    x = torch.randn(1, 300, 2, 64).bfloat16()
    x[0, 130, 1, 5] = NAN
    bad = block_mean(x.cuda(), 128).isnan().cpu()
    assert bad.sum() == 1 and bad[0, 1, 1, 5]


def check_norm_rope(dtype, heads, dim, over, rope, padding, density) -> None:
    """Queries under symbols and keys without, in one call; heads and over: of both."""
    generator = torch.Generator().manual_seed(dim)
    batch, tokens, offset = 2, 150, 77
    cache = torch.rand(batch, heads[0], reference.blocks(offset + tokens, 64), generator=generator) < density
    sizes = {"q_tokens": offset + tokens, "kv_tokens": offset + tokens, "block_q": 64, "block_kv": 64}
    symbols = SparseSymbols.from_masks(cache, None, **sizes)
    active = token_mask(cache, tokens, 64, offset)
    weights = [norm_weight(generator, o, n, dim, dtype) for o, n in zip(over, heads, strict=True)]
    x, keys = (torch.randn(batch, tokens, n, dim, generator=generator).to(dtype) for n in heads)
    x = poison_unread(x, active, over[0])
    angles = 6.3 * torch.rand(offset + tokens, dim, generator=generator)
    cos, sin = (angles.cos(), angles.sin()) if rope else (None, None)
    targets = [on_gpu(tensor, padding) for tensor in (x, keys)]
    weight, keys_weight, *tables = (None if t is None else t.cuda() for t in (*weights, cos, sin))
    options = {"symbols": symbols.to("cuda"), "row_offset": offset}
    got = norm_rope(targets[0], weight, *tables, keys=targets[1], keys_weight=keys_weight, **options)
    assert got is targets[0]
    for target, before, own, bits in zip(targets, (x, keys), weights, (symbols.cache, None), strict=True):
        expected = torch.stack(
            [
                reference.norm_rope(
                    before[b], own, cos, sin, bits if bits is None else bits[b], 1e-6, 64, offset
                )
                for b in range(batch)
            ]
        )
        written = active if bits is not None else torch.ones(before.shape[:3], dtype=torch.bool)
        scale = 2.0 if own is None else 1 + float(own.abs().max())
        reference.assert_close(target.cpu()[written] / scale, expected[written] / scale, dtype)
        assert same_bits(target.cpu()[~written], before[~written]), "cached tiles are untouched to the bit"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "over, rope",
    [
        (("head", "head"), True),
        (("head", "head"), False),
        (("none", "none"), True),
        (("all", "all"), True),
        (("all", "head"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 8, 3])
def test_norm_rope(dtype: torch.dtype, dim: int, over: tuple, rope: bool, padding: int) -> None:
    check_norm_rope(dtype, (11, 3), dim, over, rope, padding, 0.6)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("over", ["head", "all"])
def test_norm_rope_at_every_density(over: str, density: float) -> None:
    check_norm_rope(torch.bfloat16, (9, 9), 64, (over, "head"), True, 3, density)


@pytest.mark.parametrize(
    "heads, dim",
    [(2, 64), (3, 72), (7, 96), (30, 80), (12, 128), (40, 128), (32, 64), (32, 128), (64, 256), (96, 256)],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [1, 3, None])
def test_norms_over_all_heads_of_every_width(heads: int, dim: int, kv_heads: int | None) -> None:
    """One token takes from a warp to a whole CTA."""
    check_norm_rope(torch.bfloat16, (heads, kv_heads or heads), dim, ("all", "all"), True, 0, 0.5)


@pytest.mark.parametrize("heads", [(101, 2), (2, 101)])
def test_a_norm_too_wide_is_refused_before_anything_runs(heads: tuple) -> None:
    x, keys = (torch.full((1, 10, n, 256), 3.0, device="cuda").bfloat16() for n in heads)
    weights = [torch.ones(n * 256, device="cuda").bfloat16() for n in heads]
    with pytest.raises(
        NotImplementedError, match="weight: expected a norm over at most 100 heads of 256, got 101"
    ):
        norm_rope(x, weights[0], None, None, keys=keys, keys_weight=weights[1])
    assert bool((x == 3).all()) and bool((keys == 3).all())


def test_what_the_gpu_does_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match="x: expected float16 or bfloat16"):
        block_mean(torch.randn(1, 10, 1, 64, device="cuda"), 64)
    means = torch.randn(1, 1, 1, 64, device="cuda"), torch.randn(1, 1, 1, 64, device="cuda")
    symbols = SparseSymbols.ones(1, 1, 100, 100, device="cuda")
    options = {"text_start": 0, "text_length": 0, "tau_q": 0.5, "tau_kv": 0.5}
    with pytest.raises(ValueError, match="ramp: expected a tensor on cuda"):
        select_flashomni(*means, symbols, ramp=torch.ones(1), **options)
