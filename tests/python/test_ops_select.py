"""block_mean, select_flashomni, summarize_symbols and norm_rope against the float64 reference."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    BLOCKS,
    DTYPES,
    HEAD_DIMS,
    norm_weight,
    poison_unread,
    random,
    random_symbols,
    same_bits,
    set_padding,
    strided,
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


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 400),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from(HEAD_DIMS),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    view=st.booleans(),
)
def test_block_mean(seed, batch, tokens, heads, head_dim, block, dtype, view) -> None:
    x = random(torch.Generator().manual_seed(seed), batch, tokens, heads, head_dim, dtype=dtype)
    got = block_mean(strided(x) if view else x, block)
    assert got.dtype == torch.float32
    expected = torch.stack([reference.block_mean(x[b], block) for b in range(batch)])
    reference.assert_close(got, expected, torch.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 300),
    head_dim=st.sampled_from(HEAD_DIMS),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    alike=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_self_similarity(seed, tokens, head_dim, block, dtype, alike) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, 2, tokens, 3, head_dim) + alike * random(generator, 2, 1, 3, head_dim)
    x[:, torch.rand(tokens, generator=generator) < 0.1] = 0  # tokens without a direction
    x = strided(x.to(dtype))
    got = torch.full((2, reference.blocks(tokens, block), 3), float("nan"))
    mean = block_mean(x, block, got)
    assert torch.equal(mean, block_mean(x, block))
    expected = torch.stack([reference.self_similarity(x[b], block) for b in range(2)])
    reference.assert_close(got, expected, torch.float32)
    assert got.min() >= 0 and got.max() <= 1 + 1e-5


def test_tokens_that_are_no_numbers_are_like_none() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 256, 1, 64)
        x[0, 130, 0, 3] = bad
        similarity = torch.zeros(1, 2, 1)
        block_mean(x, 128, similarity)
        assert float(similarity[0, 0, 0]) == pytest.approx(1) and not float(similarity[0, 1, 0]) > 0


def select(q_mean, k_mean, tokens, text, tau_q, tau_kv, block, s_q=0.0, **guard) -> SparseSymbols:
    batch, _, heads, _ = q_mean.shape
    symbols = SparseSymbols.zeros(batch, heads, tokens, tokens, *block)
    symbols.cache.fill_(0xA5)
    symbols.skip.fill_(0x5A)
    return select_flashomni(
        *(q_mean, k_mean, symbols),
        text_start=text[0],
        text_length=text[1],
        tau_q=tau_q,
        tau_kv=tau_kv,
        s_q=s_q,
        **guard,
    )


def means(seed, batch, tokens, heads, block, head_dim=64, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    q_blocks, kv_blocks = (reference.blocks(tokens, n) for n in block)
    q_mean = spread * random(generator, batch, q_blocks, heads[0], head_dim)
    return q_mean, spread * random(generator, batch, kv_blocks, heads[1], head_dim)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 2500),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2)]),
    block=st.sampled_from(BLOCKS),
    text=st.sampled_from([(0, 0), (0, 16), (0, 77), (0, 226), (0, 512), (100, 130)]),
    tau_q=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    tau_kv=st.sampled_from([0.0, 0.05, 0.15, 0.5, 1.0]),
    head_dim=st.sampled_from(HEAD_DIMS),
)
def test_selection(seed, batch, tokens, heads, block, text, tau_q, tau_kv, head_dim) -> None:
    """Bits may differ from the reference only where rounding may turn them; Choice.sure says where that is.

    One share in a row or head can lie on the limit, and random shares are not equal, so nearly all bits are
    sure: the test fails if they are not.
    """
    start, length = min(text[0], tokens), min(text[1], max(0, tokens - text[0]))
    q_mean, k_mean = means(seed, batch, tokens, heads, block, head_dim)
    symbols = select(q_mean, k_mean, tokens, (start, length), tau_q, tau_kv, block)
    cache, skip = symbols.masks()
    text_q = reference.text_blocks(tokens, block[0], start, length)
    text_kv = reference.text_blocks(tokens, block[1], start, length)
    assert cache[..., text_q].all(), "text rows are never cached"
    assert skip[..., text_q, :].all(), "text rows are never skipped"
    assert not skip[~cache].any(), "bits of cached rows are 0"
    assert skip[cache].any(-1).all(), "an active row keeps a block"
    unsure = total = 0
    for b in range(batch):
        for h in range(heads[0]):
            cached, skipped = reference.select_flashomni(
                *(q_mean[b, :, h], k_mean[b, :, h * heads[1] // heads[0]], tokens, start, length),
                *(tau_q, tau_kv, reference.Blocks(*block)),
            )
            assert torch.equal(~cache[b, h][cached.sure], cached.chosen[cached.sure])
            rows = cache[b, h]
            assert skip[b, h][rows][:, text_kv].all(), "text columns are never skipped"
            sure = skipped.sure[rows]
            assert torch.equal(~skip[b, h][rows][sure], skipped.chosen[rows][sure])
            unsure += int((~cached.sure).sum()) + int((~sure).sum())
            total += cached.sure.numel() + sure.numel()
    if 0 < tau_q < 1 and 0 < tau_kv < 1:
        assert unsure <= 2 + total // 20


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 2500),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    block=st.sampled_from(BLOCKS),
    text=st.sampled_from([0, 77, 512]),
    tau_kv=st.sampled_from([0.15, 0.5, 1.0]),
    threshold=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)
def test_blocks_of_unlike_keys_are_never_skipped(seed, tokens, heads, block, text, tau_kv, threshold) -> None:
    text = min(text, tokens)
    q_mean, k_mean = means(seed, 2, tokens, heads, block)
    similarity = torch.rand(2, k_mean.shape[1], heads[1], generator=torch.Generator().manual_seed(seed))
    similarity[0, 0, 0] = float("nan")
    case = (q_mean, k_mean, tokens, (0, text), 0.0, tau_kv, block)
    symbols = select(*case, k_similarity=similarity, self_similarity=threshold)
    _, skip = symbols.masks()
    for b in range(2):
        for h in range(heads[0]):
            guarded = ~(similarity[b, :, h * heads[1] // heads[0]] > threshold)
            assert skip[b, h][:, guarded].all()
            _, skipped = reference.select_flashomni(
                *(q_mean[b, :, h], k_mean[b, :, h * heads[1] // heads[0]], tokens, 0, text, 0.0, tau_kv),
                *(reference.Blocks(*block),),
                guarded=guarded,
            )
            assert torch.equal(~skip[b, h][skipped.sure], skipped.chosen[skipped.sure])
    if threshold == 1.0:
        assert symbols.density() == 1


def test_equal_scores_are_chosen_by_index() -> None:
    """Ten image blocks with a tenth of all shares each: five are cached; of eleven columns three go."""
    q_mean, k_mean = torch.ones(1, 11, 1, 64), torch.ones(1, 11, 1, 64)
    symbols = select(q_mean, k_mean, 11 * 128, (0, 128), 0.55, 0.3, (128, 128))
    cache, skip = symbols.masks()
    assert cache[0, 0].tolist() == [True] + [False] * 5 + [True] * 5
    assert skip[0, 0, 6:].tolist() == [[True] + [False] * 3 + [True] * 7] * 5


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokens,text", [(1, 0), (64, 64), (65, 1), (64_000, 512), (64_000, 0)])
def test_one_block_and_a_thousand(tau: float, tokens: int, text: int) -> None:
    q_mean, k_mean = means(4, 1, tokens, (1, 1), (64, 64))
    cache, skip = select(q_mean, k_mean, tokens, (0, text), tau, tau, (64, 64)).masks()
    text_blocks = reference.blocks(text, 64) if text else 0
    assert cache[..., :text_blocks].all() and skip[cache].any(-1).all() and not skip[~cache].any()
    if tau == 0:
        assert cache.all() and skip.all()
    elif tau == 1:
        assert bool(cache[..., text_blocks:].any()) == (text == 0)
        assert int(skip[0, 0, -1].sum()) == (0 if text else 1) or tokens < 100


def test_tau_zero_computes_everything() -> None:
    q_mean, k_mean = means(0, 2, 1000, (3, 3), (128, 128))
    symbols = select(q_mean, k_mean, 1000, (0, 77), 0.0, 0.0, (128, 128))
    assert symbols.density() == 1.0


def test_tau_one_computes_the_text_alone() -> None:
    q_mean, k_mean = means(1, 1, 1000, (2, 2), (128, 128))
    cache, _ = select(q_mean, k_mean, 1000, (0, 77), 1.0, 0.0, (128, 128)).masks()
    assert cache[..., 0].all() and not cache[..., 1:].any()


def test_more_tau_selects_less() -> None:
    q_mean, k_mean = means(2, 1, 4000, (4, 4), (128, 64))
    densities = [
        select(q_mean, k_mean, 4000, (0, 226), tau, tau / 2, (128, 64)).density()
        for tau in (0.0, 0.1, 0.3, 0.6, 0.9)
    ]
    assert densities == sorted(densities, reverse=True) and densities[-1] < 0.5 < densities[0]


@pytest.mark.parametrize("ramp", [0.0, 0.37, 1.0, 5.0, -1.0, float("nan")])
def test_the_ramp_scales_both_thresholds(ramp: float) -> None:
    """Whatever it holds, they stay in [0, 1]."""
    q_mean, k_mean = means(7, 1, 2000, (2, 2), (128, 64))
    taus = [min(max(tau * (0.0 if ramp != ramp else ramp), 0.0), 1.0) for tau in (0.5, 0.25)]
    want = select(q_mean, k_mean, 2000, (0, 77), *taus, (128, 64))
    got = SparseSymbols.ones(1, 2, 2000, 2000, 128, 64)
    options = {"text_start": 0, "text_length": 77, "tau_q": 0.5, "tau_kv": 0.25}
    select_flashomni(q_mean, k_mean, got, ramp=torch.tensor([ramp]), **options)
    assert torch.equal(got.cache, want.cache) and torch.equal(got.skip, want.skip)


@pytest.mark.parametrize("s_q", [0.3, 0.6, 1.0])
def test_a_layer_with_few_active_tiles_is_reused(s_q: float) -> None:
    q_mean, k_mean = means(3, 4, 3000, (2, 2), (128, 128))
    without = select(q_mean, k_mean, 3000, (0, 226), 0.5, 0.1, (128, 128))
    symbols = select(q_mean, k_mean, 3000, (0, 226), 0.5, 0.1, (128, 128), s_q=s_q)
    for b in range(4):
        cache, _ = (mask[b] for mask in without.masks())
        if float(cache.float().mean()) <= s_q:
            assert not symbols.cache[b].any()
        else:
            assert torch.equal(symbols.cache[b], without.cache[b])
            assert torch.equal(symbols.skip[b], without.skip[b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_scores_that_are_not_finite_give_valid_symbols(bad: float) -> None:
    q_mean, k_mean = means(4, 1, 1500, (2, 2), (128, 128))
    q_mean[0, 3:6, 0] = bad
    k_mean[0, 7, 1] = bad
    cache, skip = select(q_mean, k_mean, 1500, (0, 77), 0.5, 0.2, (128, 128)).masks()
    assert cache[..., 0].all() and skip[cache].any(-1).all() and not skip[~cache].any()


def test_equal_blocks_share_the_choice_by_index() -> None:
    # With equal scores every share is the same, so the number of cached blocks is what tau_q buys.
    q_mean, k_mean = torch.ones(1, 11, 1, 64), torch.ones(1, 11, 1, 64)
    cache, skip = select(q_mean, k_mean, 11 * 128, (0, 128), 0.55, 0.0, (128, 128)).masks()
    assert int((~cache).sum()) == 5 and not (~cache)[0, 0, 0]
    assert skip[0, 0][cache[0, 0]].all()


def rope_table(generator, tokens, head_dim):
    """cos and sin as diffusers' FLUX makes them: each frequency twice, for the pair (2i, 2i + 1)."""
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6.3
    return angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 150),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    row_offset=st.sampled_from([0, 16, 77, 226, 512]),
    over=st.sampled_from(["head", "all", "none"]),
    rope=st.booleans(),
    density=st.sampled_from([None, 0.0, 0.2, 0.6, 1.0]),
    view=st.booleans(),
)
def test_norm_rope(
    seed, batch, tokens, heads, head_dim, dtype, row_offset, over, rope, density, view
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, batch, tokens, heads, head_dim, dtype=dtype)
    weight = norm_weight(generator, over, heads, head_dim, dtype)
    cos, sin = rope_table(generator, row_offset + tokens + 9, head_dim) if rope else (None, None)
    symbols, active = None, torch.ones(batch, tokens, heads, dtype=torch.bool)
    if density is not None:
        sizes = (row_offset + tokens + 9,) * 2
        symbols = random_symbols(generator, batch, heads, *sizes, (64, 64), density)
        active = token_mask(symbols.masks()[0], tokens, 64, row_offset)
        x = poison_unread(x, active, over)
    cache = [None] * batch if symbols is None else symbols.cache
    block_q = 64 if symbols is not None else 128
    expected = torch.stack(
        [
            reference.norm_rope(x[b], weight, cos, sin, cache[b], 1e-6, block_q, row_offset)
            for b in range(batch)
        ]
    )
    target = strided(x) if view else x.clone()
    got = norm_rope(target, weight, cos, sin, symbols=symbols, row_offset=row_offset)
    assert got is target
    # Values are not of order 1: rows are.
    scale = 1 + float(weight.abs().max()) if weight is not None else 2.0
    reference.assert_close(target[active] / scale, expected[active] / scale, dtype)
    assert same_bits(target[~active], x[~active]), "cached tiles are untouched to the bit"


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 150),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    over=st.tuples(*[st.sampled_from(["head", "all", "none"])] * 2),
    rope=st.booleans(),
)
def test_keys_in_the_same_call(seed, tokens, heads, head_dim, dtype, over, rope) -> None:
    """To the bit what two calls do, of which the keys' takes no symbols."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (random(generator, 2, tokens, n, head_dim, dtype=dtype) for n in heads)
    weight, keys_weight = (
        norm_weight(generator, o, n, head_dim, dtype) for o, n in zip(over, heads, strict=True)
    )
    cos, sin = rope_table(generator, 40 + tokens, head_dim) if rope else (None, None)
    symbols = random_symbols(generator, 2, heads[0], 40 + tokens, 40 + tokens, (64, 64))
    options = {"eps": 1e-5, "row_offset": 40}
    wanted = norm_rope(q.clone(), weight, cos, sin, symbols=symbols, **options)
    wanted_k = norm_rope(k.clone(), keys_weight, cos, sin, **options)
    got, keys = strided(q), strided(k)
    assert (
        norm_rope(got, weight, cos, sin, symbols=symbols, keys=keys, keys_weight=keys_weight, **options)
        is got
    )
    assert torch.equal(got, wanted) and torch.equal(keys, wanted_k)


def test_rope_is_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    ids = torch.stack([torch.zeros(40), torch.arange(40) // 8, torch.arange(40) % 8], 1)
    cos, sin = (
        torch.cat(parts, -1)
        for parts in zip(
            *(
                embeddings.get_1d_rotary_pos_embed(
                    dim, ids[:, i], repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
                )
                for i, dim in enumerate((16, 24, 24))
            ),
            strict=True,
        )
    )
    cos, sin = cos.float(), sin.float()
    x = torch.randn(2, 40, 3, 64)
    expected = embeddings.apply_rotary_emb(x, (cos, sin), sequence_dim=1)
    torch.testing.assert_close(norm_rope(x.clone(), None, cos, sin), expected)


def test_norm_is_torchs() -> None:
    x, weight = torch.randn(2, 40, 3, 64), torch.randn(64)
    expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    torch.testing.assert_close(norm_rope(x.clone(), weight, None, None, eps=1e-5), expected)
    weight = torch.randn(3 * 64)
    expected = torch.nn.functional.rms_norm(x.flatten(2), (3 * 64,), weight, 1e-5).view_as(x)
    torch.testing.assert_close(norm_rope(x.clone(), weight, None, None, eps=1e-5), expected)


def test_a_norm_over_forty_heads() -> None:
    """As wide as a model of 14 B parameters has it, in a stride that is no multiple of its runs."""
    generator = torch.Generator().manual_seed(0)
    weight = random(generator, 40 * 128, dtype=torch.bfloat16)
    x = random(generator, 1, 70, 41, 129, dtype=torch.bfloat16)[:, :, :40, :128]
    cos, sin = rope_table(generator, 70, 128)
    expected = reference.norm_rope(x[0], weight, cos, sin, None, 1e-6, 128, 0)
    scale = 1 + float(weight.abs().max())
    reference.assert_close(norm_rope(x, weight, cos, sin)[0] / scale, expected / scale, torch.bfloat16)


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 300),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([64, 128]),
    parts=st.sampled_from(["norm", "rope", "both", "none"]),
    similar=st.booleans(),
)
def test_norm_rope_mean_is_its_parts(seed, tokens, head_dim, dtype, block, parts, similar) -> None:
    """Both parts are held to float64 by tests of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, 2, tokens, 3, head_dim, dtype=dtype)
    weight = random(generator, head_dim, dtype=dtype) if parts in ("norm", "both") else None
    angles = random(generator, 40 + tokens, head_dim)
    cos, sin = (angles.cos(), angles.sin()) if parts in ("rope", "both") else (None, None)
    shape = (2, reference.blocks(tokens, block), 3)
    similarity = [torch.full(shape, float("nan")) if similar else None for _ in range(2)]
    wanted = norm_rope(x.clone(), weight, cos, sin, row_offset=40) if parts != "none" else x.clone()
    wanted_mean = block_mean(wanted, block, similarity[0])
    got, mean = strided(x), torch.full((*shape, head_dim), float("nan"))
    assert norm_rope_mean(got, weight, cos, sin, mean, similarity[1], block=block, row_offset=40) is got
    assert torch.equal(got, wanted) and torch.equal(mean, wanted_mean)
    if similar:
        assert torch.equal(*similarity)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    heads=st.integers(1, 30),
    tokens=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    block=st.sampled_from(BLOCKS),
    densities=st.tuples(*[st.sampled_from([0.0, 0.03, 0.5, 1.0])] * 2),
)
def test_summary(seed, batch, heads, tokens, block, densities) -> None:
    generator = torch.Generator().manual_seed(seed)
    symbols = random_symbols(generator, batch, heads, *tokens, block, *densities)
    rows, shares, awake = reference.summary(*symbols.masks())
    set_padding(symbols)
    bits = torch.full((batch, rows.shape[1] + 2), 0xA5, dtype=torch.uint8)
    got = bits[:, 1:-1], torch.full((2, heads), float("nan")), torch.full_like(awake, 0xA5)
    summarize_symbols(symbols, *got)
    assert torch.equal(got[0], rows) and torch.equal(got[1], shares) and torch.equal(got[2], awake)
    assert bool((bits[:, [0, -1]] == 0xA5).all())
