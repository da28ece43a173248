"""Symbols: bits, masks, block lists, and what is refused."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import random_mask, random_symbols

from flashomni import SparseSymbols

geometries = st.tuples(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([(128, 128), (128, 64), (64, 64)]),
)


@given(geometries, st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_masks_survive_packing_and_bits_lie_where_the_definition_says(
    geometry, seed, cached, skipped
) -> None:
    batch, heads, q_tokens, kv_tokens, block = geometry
    generator = torch.Generator().manual_seed(seed)
    symbols = random_symbols(generator, batch, heads, q_tokens, kv_tokens, block, cached, skipped)
    cache, skip = symbols.masks()
    again = SparseSymbols.from_masks(
        cache, skip, q_tokens=q_tokens, kv_tokens=kv_tokens, block_q=block[0], block_kv=block[1]
    )
    assert torch.equal(again.cache, symbols.cache) and torch.equal(again.skip, symbols.skip)
    b, h, i, j = (int(torch.randint(n, (), generator=generator)) for n in skip.shape)
    assert reference.bit(symbols.cache[b], i * heads + h) == bool(cache[b, h, i])
    kv_blocks = symbols.kv_blocks
    assert reference.bit(symbols.skip[b], (i * heads + h) * kv_blocks + j) == bool(skip[b, h, i, j])


@given(geometries, st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_packing_is_numpys(geometry, seed, density) -> None:
    batch, heads, q_tokens, kv_tokens, block = geometry
    symbols = random_symbols(
        torch.Generator().manual_seed(seed), batch, heads, q_tokens, kv_tokens, block, density, density
    )
    cache, skip = symbols.masks()
    flat = cache.transpose(1, 2).reshape(batch, -1).numpy()
    assert np.array_equal(symbols.cache.numpy(), np.packbits(flat, axis=1, bitorder="little"))
    flat = skip.transpose(1, 2).reshape(batch, -1).numpy()
    assert np.array_equal(symbols.skip.numpy(), np.packbits(flat, axis=1, bitorder="little"))


@given(geometries, st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 3))
def test_block_lists_and_back(geometry, seed, density, spare) -> None:
    batch, heads, q_tokens, kv_tokens, block = geometry
    generator = torch.Generator().manual_seed(seed)
    symbols = random_symbols(generator, batch, heads, q_tokens, kv_tokens, block, 0.7, density)
    indices, counts = symbols.block_lists(symbols.kv_blocks + spare)
    assert indices.dtype == counts.dtype == torch.int32
    cache, skip = symbols.masks()
    selected = cache[..., None] & skip
    for place in np.ndindex(*counts.shape):
        row = indices[place][: int(counts[place])].tolist()
        assert row == torch.nonzero(selected[place]).flatten().tolist()
    backwards = (counts[..., None] - 1 - torch.arange(indices.shape[-1])).clamp(min=0)
    shuffled = indices.gather(-1, backwards)
    again = SparseSymbols.from_block_lists(
        shuffled, counts, q_tokens=q_tokens, kv_tokens=kv_tokens, block_q=block[0], block_kv=block[1]
    )
    again_cache, again_skip = again.masks()
    assert torch.equal(again_skip, selected)
    assert torch.equal(again_cache, selected.any(-1))


def test_an_empty_row_may_stay_active() -> None:
    lists = torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.tensor([[[0, 1]]], dtype=torch.int32)
    assert SparseSymbols.from_block_lists(*lists, q_tokens=256, kv_tokens=128).cache is not None
    kept = SparseSymbols.from_block_lists(*lists, q_tokens=256, kv_tokens=128, empty_is_cached=False)
    assert kept.cache is None
    assert kept.masks()[1].flatten().tolist() == [False, True]


def test_densities() -> None:
    cache = torch.tensor([[[True, False]]])
    skip = torch.tensor([[[[True, False, False], [True, True, True]]]])
    symbols = SparseSymbols.from_masks(cache, skip, q_tokens=200, kv_tokens=300)
    assert symbols.cache_density() == pytest.approx(0.5)
    assert symbols.density() == pytest.approx(1 / 6)
    assert SparseSymbols.ones(2, 3, 300, 300).density() == 1.0
    assert SparseSymbols.zeros(2, 3, 300, 300).cache_density() == 0.0
    half = SparseSymbols.from_masks(None, skip, q_tokens=200, kv_tokens=300)
    assert half.cache is None and half.density() == pytest.approx(4 / 6)


def test_equal_elements_with_indptr_have_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = random_symbols(generator, 2, 3, 300, 400)
    flat = SparseSymbols(
        symbols.cache.flatten(),
        symbols.skip.flatten(),
        *(2, 3, 300, 400),
        cache_indptr=torch.tensor([0, 1, 2], dtype=torch.int32) * symbols.cache_bytes,
        skip_indptr=torch.tensor([0, 1, 2], dtype=torch.int32) * symbols.skip_bytes,
    )
    for mine, theirs in zip(flat.masks(), symbols.masks(), strict=True):
        assert torch.equal(mine, theirs)
    flat.cache_indptr = torch.tensor([0, 1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_indptr.*different lengths"):
        flat.masks()


def test_moving_keeps_the_bits() -> None:
    symbols = random_symbols(torch.Generator().manual_seed(0), 1, 2, 300, 300)
    moved = symbols.to("cpu")
    assert moved is not symbols and torch.equal(moved.skip, symbols.skip)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"cache": torch.zeros(2, 2, dtype=torch.uint8)},
            ValueError,
            r"symbols.cache: expected uint8\[2, 1\]",
        ),
        ({"skip": torch.zeros(2, 1, dtype=torch.uint8)}, ValueError, r"symbols.skip: expected uint8\[2, 2\]"),
        ({"cache": torch.zeros(2, 1)}, TypeError, "symbols.cache: expected uint8, got float32"),
        ({"batch": 0}, ValueError, "symbols.batch"),
        ({"heads": -1}, ValueError, "symbols.heads"),
        ({"block_q": 0}, ValueError, "symbols.block_q"),
        ({"q_tokens": -5}, ValueError, "symbols.q_tokens"),
        (
            {"cache_indptr": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "symbols.cache: expected uint8.bytes.",
        ),
        (
            {"cache": None, "cache_indptr": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "cache_indptr: expected None",
        ),
        (
            {"cache": torch.zeros(4, dtype=torch.uint8), "cache_indptr": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"cache_indptr: expected int32\[3\]",
        ),
        (
            {"cache": torch.zeros(4, dtype=torch.uint8), "cache_indptr": torch.zeros(3)},
            TypeError,
            "cache_indptr: expected int32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], message: str) -> None:
    fields = {
        "cache": torch.zeros(2, 1, dtype=torch.uint8),
        "skip": torch.zeros(2, 2, dtype=torch.uint8),
        "batch": 2,
        "heads": 2,
        "q_tokens": 200,
        "kv_tokens": 300,
    }
    SparseSymbols(**fields)
    with pytest.raises(error, match=message):
        SparseSymbols(**{**fields, **change})


def test_check_compares_with_what_the_caller_has() -> None:
    symbols = SparseSymbols.ones(1, 2, 200, 300)
    symbols.check(batch=1, heads=2, q_tokens=200, kv_tokens=300)
    with pytest.raises(ValueError, match="symbols.heads: expected 4, got 2"):
        symbols.check(heads=4)


def test_masks_and_lists_that_do_not_fit_are_refused() -> None:
    geometry = {"q_tokens": 200, "kv_tokens": 300}
    with pytest.raises(ValueError, match="cache_mask"):
        SparseSymbols.from_masks(None, None, **geometry)
    with pytest.raises(TypeError, match="skip_mask: expected bool"):
        SparseSymbols.from_masks(None, torch.ones(1, 1, 2, 3), **geometry)
    with pytest.raises(ValueError, match="cache_mask: expected shape"):
        SparseSymbols.from_masks(torch.ones(1, 1, 3, dtype=torch.bool), None, **geometry)
    with pytest.raises(ValueError, match="skip_mask: expected 4 dimensions"):
        SparseSymbols.from_masks(None, torch.ones(1, 1, 2, dtype=torch.bool), **geometry)
    indices = torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    counts = torch.full((1, 1, 2), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="counts: expected 0 to 3, got 4 to 4"):
        SparseSymbols.from_block_lists(indices, counts, **geometry)
    with pytest.raises(ValueError, match="indices: expected 0 to 2"):
        SparseSymbols.from_block_lists(indices + 3, counts - 2, **geometry)
    with pytest.raises(ValueError, match="capacity: expected at least 3, got 2"):
        SparseSymbols.ones(1, 1, 200, 300).block_lists(2)


def test_plot_draws_every_head_it_is_asked_for() -> None:
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    symbols = random_symbols(generator, 2, 10, 500, 500)
    assert len(symbols.plot(batch=1).axes) >= 10
    figure = symbols.plot(heads=[3])
    (image,) = figure.axes[0].images
    cache, skip = (mask[0, 3] for mask in symbols.masks())
    assert image.get_array().shape == skip.shape
    assert bool(((torch.as_tensor(image.get_array().data) == 1) == ~cache[:, None]).all())


def test_random_masks_reach_both_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    assert random_mask(generator, 1.0, 1000).all() and not random_mask(generator, 0.0, 1000).any()
