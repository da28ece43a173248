"""sparse_attention against the float64 reference."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import BLOCKS, DTYPES, HEAD_DIMS, attention_case, poison, strided, token_mask

from flashomni import SparseSymbols, sparse_attention


def check(case, dtype, **options) -> None:
    """Runs into NaN-poisoned outputs: active rows must be right, cached rows untouched to the bit."""
    out, lse = poison(*case.q.shape, dtype=dtype), poison(*case.q.shape[:-1], dtype=torch.float32)
    expected_out, expected_lse = case.expected(out, lse, **options)
    got = sparse_attention(case.q, case.k, case.v, case.symbols, out=out, lse=lse, **options)
    assert got[0] is out and got[1] is lse
    active = ~expected_lse.isnan()
    assert torch.equal(~lse.isnan(), active) and torch.equal(~out.isnan().all(-1), active)
    reference.assert_close(out[active], expected_out[active], dtype, "out")
    # Scores come from the inputs alone, so lse is as exact as float32 in any dtype.
    reference.assert_close(lse[active], expected_lse[active], torch.float32, "lse")


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    q_tokens=st.integers(1, 300),
    kv_tokens=st.integers(1, 300),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    cache_density=st.floats(0, 1),
    skip_density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    causal=st.booleans(),
)
def test_any_symbols(
    seed, batch, heads, q_tokens, kv_tokens, head_dim, dtype, block, cache_density, skip_density, causal
) -> None:
    case = attention_case(
        seed, batch, heads, q_tokens, kv_tokens, head_dim, dtype, block, cache_density, skip_density
    )
    check(case, dtype, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_each_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    check(attention_case(head_dim, 1, (2, 1), 270, 333, head_dim, dtype, (128, 64), 0.8, 0.5), dtype)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("block", BLOCKS)
def test_lengths_around_the_blocks(tokens: int, block: tuple[int, int]) -> None:
    check(attention_case(tokens, 1, (1, 1), tokens, 300 - tokens, 64, torch.float32, block), torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_symbols_it_is_dense(dtype: torch.dtype, causal: bool) -> None:
    case = attention_case(3, 2, (4, 2), 200, 260, dtype=dtype)
    case.symbols = None
    check(case, dtype, causal=causal)


def test_either_symbol_may_be_absent() -> None:
    for part in ("cache", "skip"):
        case = attention_case(4, q_tokens=300, kv_tokens=300)
        setattr(case.symbols, part, None)
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_into_a_fused_qkv(dtype: torch.dtype) -> None:
    case = attention_case(5, 2, (2, 2), 190, 190, dtype=dtype)
    fused = torch.stack([case.q, case.k, case.v], 2)
    case.q, case.k, case.v = fused.unbind(2)
    assert not case.q.is_contiguous()
    out = strided(poison(*case.q.shape, dtype=dtype))
    lse = poison(2, 2, 190, dtype=torch.float32).transpose(1, 2)[..., :2]
    expected, _ = case.expected(out, torch.full(case.q.shape[:-1], math.nan))
    kept = out.isnan()
    sparse_attention(case.q, case.k, case.v, case.symbols, out=out)
    active = ~expected.isnan()
    assert torch.equal(out.isnan(), kept & ~active)
    reference.assert_close(out[active], expected[active], dtype)
    assert lse.shape[-1] == 2


def test_heads_before_tokens_in_memory() -> None:
    # [B, H, N, D] tensors, as torch's SDPA takes them, transposed.
    case = attention_case(6, 1, (3, 3), 150, 170)
    case.q, case.k, case.v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v)
    )
    check(case, torch.float32)


def test_new_outputs_are_zero_where_cached() -> None:
    case = attention_case(7, q_tokens=400, kv_tokens=300, cache_density=0.5)
    out, lse = sparse_attention(case.q, case.k, case.v, case.symbols, return_lse=True)
    active = token_mask(case.symbols.masks()[0], 400, 128)
    assert active.any() and not active.all()
    assert not out[~active].any() and not lse[~active].any()
    assert lse.dtype == torch.float32 and lse.shape == (1, 400, 2)
    assert out[active].abs().amin(-1).max() > 0


def test_an_active_tile_without_keys_is_zero() -> None:
    case = attention_case(8, cache_density=1.0, skip_density=0.0)
    out, lse = poison(*case.q.shape, dtype=torch.float32), poison(1, 200, 2, dtype=torch.float32)
    sparse_attention(case.q, case.k, case.v, case.symbols, out=out, lse=lse)
    assert not out.any() and bool((lse == -math.inf).all())


def test_no_keys_and_no_queries() -> None:
    q, none = torch.randn(1, 130, 2, 64), torch.randn(1, 0, 2, 64)
    out, lse = sparse_attention(q, none, none, return_lse=True)
    assert not out.any() and bool((lse == -math.inf).all())
    assert sparse_attention(none, q, q).shape == (1, 0, 2, 64)


def test_large_scores_do_not_overflow() -> None:
    case = attention_case(9, skip_density=0.7)
    case.q = case.q * 300
    out = sparse_attention(case.q, case.k, case.v, case.symbols)
    assert out.isfinite().all()
    expected, _ = case.expected(torch.zeros(case.q.shape), torch.zeros(case.q.shape[:-1]))
    # Scores of order 3,000 in float32 are exact to 2^-24 of that, and the weights to as much.
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(scale: float) -> None:
    check(attention_case(10), torch.float32, scale=scale)


@pytest.mark.parametrize("tokens", [(100, 300), (300, 100), (129, 128)])
def test_causal_is_aligned_at_the_bottom_right(tokens: tuple[int, int]) -> None:
    case = attention_case(11, 1, (2, 2), *tokens, cache_density=1.0, skip_density=0.8)
    check(case, torch.float32, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [False, True])
def test_skipped_blocks_may_be_stood_for_by_their_means(dtype: torch.dtype, lengths: bool) -> None:
    case = attention_case(12, 2, (4, 2), 200, 590, dtype=dtype, block=(128, 64), skip_density=0.3)
    means = [
        torch.stack([reference.block_mean(x[b], 64) for b in range(2)]).float() for x in (case.k, case.v)
    ]
    options = {"k_mean": means[0], "v_mean": means[1]}
    if lengths:
        options["kv_block_len"] = torch.tensor([64, 0, 17, 64, 1, 33, 64, 64, 50, 14], dtype=torch.int32)
    check(case, dtype, **options)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), causal=st.booleans())
def test_blocks_with_fewer_valid_tokens(seed: int, dtype: torch.dtype, causal: bool) -> None:
    case = attention_case(seed, 1, (2, 2), 150, 300, dtype=dtype, block=(64, 64))
    generator = torch.Generator().manual_seed(seed)
    slots = torch.tensor([64, 64, 64, 64, 44])
    lengths = (torch.rand(5, generator=generator) * (slots + 1)).to(torch.int32)
    check(case, dtype, kv_block_len=lengths, causal=causal)


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    causal=st.booleans(),
)
def test_ragged_batches(seed, lengths, dtype, block, causal) -> None:
    cases = [attention_case(seed + i, 1, (2, 1), *n, dtype=dtype, block=block) for i, n in enumerate(lengths)]

    def indptr(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    q, k, v = (torch.cat([getattr(case, name)[0] for case in cases]) for name in "qkv")
    parts = [case.symbols for case in cases]
    symbols = SparseSymbols(
        torch.cat([part.cache[0] for part in parts]),
        torch.cat([part.skip[0] for part in parts]),
        *(len(cases), 2, max(n for n, _ in lengths), max(n for _, n in lengths), *block),
        cache_indptr=indptr([part.cache_bytes for part in parts]),
        skip_indptr=indptr([part.skip_bytes for part in parts]),
    )
    out, lse = poison(*q.shape, dtype=dtype), poison(*q.shape[:-1], dtype=torch.float32)
    expected = [
        case.expected(
            poison(*case.q.shape, dtype=dtype), poison(*case.q.shape[:-1], dtype=dtype), causal=causal
        )
        for case in cases
    ]
    sparse_attention(
        *(q, k, v, symbols),
        out=out,
        lse=lse,
        causal=causal,
        q_indptr=indptr([n for n, _ in lengths]),
        kv_indptr=indptr([n for _, n in lengths]),
    )
    expected_out, expected_lse = (torch.cat([e[i][0] for e in expected]) for i in (0, 1))
    active = ~expected_lse.isnan()
    assert torch.equal(~lse.isnan(), active) and torch.equal(~out.isnan().all(-1), active)
    reference.assert_close(out[active], expected_out[active], dtype, "out")
    reference.assert_close(lse[active], expected_lse[active], torch.float32, "lse")


def test_the_number_of_threads_changes_nothing() -> None:
    case = attention_case(13, 2, (3, 3), 500, 500)
    one_and_more = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        one_and_more.append(sparse_attention(case.q, case.k, case.v, case.symbols))
    assert torch.equal(one_and_more[0], one_and_more[1]) and torch.equal(one_and_more[0], one_and_more[2])
