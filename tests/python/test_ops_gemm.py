"""gemm_q, gemm_o_update and gemm_o_dispatch against the float64 reference."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random, random_symbols, token_mask

from flashomni import SparseSymbols, gemm_o_dispatch, gemm_o_update, gemm_q
from flashomni.schedule import coefficients

OFFSETS = (0, 16, 77, 226, 512)
geometries = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "batch": st.integers(1, 2),
        "rows": st.integers(1, 200),
        "heads": st.integers(1, 5),
        "row_offset": st.sampled_from(OFFSETS) | st.integers(0, 300),
        "block_q": st.sampled_from([64, 128]),
        "density": st.floats(0, 1),
        "dtype": st.sampled_from(DTYPES),
    }
)


class Matrix:
    """Rows of a joint sequence, a weight, and the symbols."""

    def __init__(
        self, seed, batch, rows, heads, row_offset, block_q, density, dtype, width, outputs, rest=0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        tokens = row_offset + rows + rest
        self.symbols = random_symbols(
            self.generator, batch, heads, tokens, tokens, (block_q, 64), cache_density=density
        )
        self.dtype, self.shape = dtype, (batch, rows, outputs)
        self.x = random(self.generator, batch, rows, width, dtype=dtype)
        self.weight = random(self.generator, outputs, width).div(width**0.5).to(dtype)
        self.bias = random(self.generator, outputs, dtype=dtype)
        self.offset, self.block_q, self.heads = row_offset, block_q, heads

    def active(self) -> torch.Tensor:
        """bool [B, M, heads]."""
        return token_mask(self.symbols.masks()[0], self.shape[1], self.block_q, self.offset)


@given(
    geometry=geometries,
    width=st.integers(1, 200),
    columns=st.integers(1, 70),
    bias=st.booleans(),
    activation=st.sampled_from([None, "gelu", "gelu_tanh"]),
)
def test_gemm_q(geometry, width, columns, bias, activation) -> None:
    case = Matrix(**geometry, width=width, outputs=columns * geometry["heads"], rest=5)
    bias = case.bias if bias else None
    out = poison(*case.shape, dtype=case.dtype)
    expected = torch.stack(
        [
            reference.gemm_q(
                *(case.x[b], case.weight, bias, case.symbols.cache[b], case.heads, case.block_q),
                *(case.offset, activation, out[b]),
            )
            for b in range(case.shape[0])
        ]
    )
    got = gemm_q(
        case.x, case.weight, bias, case.symbols, row_offset=case.offset, activation=activation, out=out
    )
    assert got is out
    active = case.active().repeat_interleave(columns, -1)
    assert torch.equal(out.isnan(), ~active)
    reference.assert_close(out[active], expected[active], case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_q_of_a_model(dtype: torch.dtype) -> None:
    case = Matrix(1, 1, 300, 4, 77, 128, 0.5, dtype, width=256, outputs=768)
    out = gemm_q(case.x, case.weight, case.bias, case.symbols, row_offset=77)
    dense = torch.nn.functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    active = case.active().repeat_interleave(192, -1)
    reference.assert_close(out[active], dense[active], dtype)
    assert not out[~active].any(), "a new output is zero where cached"


def test_gemm_q_without_symbols_is_linear() -> None:
    case = Matrix(2, 2, 130, 3, 0, 128, 1.0, torch.float32, width=48, outputs=96)
    expected = torch.nn.functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    reference.assert_close(gemm_q(case.x, case.weight, case.bias), expected, torch.float32)


def test_gemm_q_with_one_head_is_row_sparse() -> None:
    case = Matrix(3, 1, 900, 1, 30, 128, 0.5, torch.float32, width=64, outputs=50)
    out = poison(*case.shape, dtype=torch.float32)
    gemm_q(case.x, case.weight, case.bias, case.symbols, row_offset=30, out=out)
    rows = case.active()[..., 0]
    assert rows.any() and not rows.all()
    assert torch.equal(out.isnan().any(-1), ~rows) and torch.equal(out.isnan().all(-1), ~rows)


def test_gemm_q_takes_rows_of_a_larger_matrix_and_writes_into_one() -> None:
    case = Matrix(4, 2, 100, 2, 16, 64, 0.5, torch.bfloat16, width=64, outputs=128)
    joint = torch.full((2, 130, 80), float("nan"), dtype=torch.bfloat16)
    joint[:, 30:, :64] = case.x
    into = poison(2, 130, 384, dtype=torch.bfloat16)
    out = gemm_q(
        joint[:, 30:, :64], case.weight, case.bias, case.symbols, row_offset=16, out=into[:, 30:, 128:256]
    )
    expected = gemm_q(case.x, case.weight, case.bias, case.symbols, row_offset=16)
    active = case.active().repeat_interleave(64, -1)
    assert torch.equal(out[active], expected[active])
    assert int(into.isnan().sum()) == into.numel() - int(active.sum())


orders = st.integers(0, 3)


@given(
    geometry=geometries,
    head_dim=st.sampled_from([8, 64, 80]),
    past=st.integers(0, 70),
    apart=st.booleans(),
    order=orders,
    bias=st.booleans(),
    keep_rows=st.booleans(),
)
def test_gemm_o(geometry, head_dim, past, apart, order, bias, keep_rows) -> None:
    """An Update, then a Dispatch from what it cached; the columns past the heads in `o` or in `past`."""
    width = geometry["heads"] * head_dim
    case = Matrix(**geometry, width=width + past, outputs=60, rest=3)
    bias = case.bias if bias else None
    derivatives = [random(case.generator, *case.x.shape[:2], width, dtype=case.dtype) for _ in range(order)]
    out = poison(*case.shape, dtype=case.dtype)
    cached = [poison(*case.shape, dtype=case.dtype) for _ in range(order + 1)]
    got = gemm_o_update(
        *(case.x[..., :width] if apart else case.x, case.weight, bias, case.symbols),
        past=case.x[..., width:].contiguous() if apart else None,
        head_dim=head_dim,
        row_offset=case.offset,
        derivatives=derivatives,
        keep_rows=keep_rows,
        out=out,
        cached=cached,
    )
    asleep = ~case.active().any(-1)
    assert got[0] is out and all(a is b for a, b in zip(got[1], cached, strict=True))
    for b in range(case.shape[0]):
        geometry_b = (case.symbols.cache[b], case.heads, head_dim, case.block_q, case.offset)
        features = [case.x[b], *(d[b] for d in derivatives)]
        expected_out, expected_cached = reference.gemm_o_update(features, case.weight, bias, *geometry_b)
        reference.assert_close(out[b], expected_out, case.dtype, "out")
        written = ~(asleep[b] & keep_rows)
        for i, part in enumerate(expected_cached):
            reference.assert_close(cached[i][b, written], part[written], case.dtype, f"cached[{i}]")
            assert cached[i][b, ~written].isnan().all()

    # The forecast's terms grow with the coefficients: halves keep it of order 1.
    factors = coefficients(order, 0.5)
    o = random(case.generator, *case.x.shape, dtype=case.dtype)
    active = case.active().repeat_interleave(head_dim, -1)
    o[..., :width][~active] = float("nan")
    held = random(case.generator, *case.shape, dtype=case.dtype)
    if keep_rows:  # what nothing of may be read
        o[asleep] = float("nan")
        for part in cached:
            part[asleep] = float("nan")
    out = poison(*case.shape, dtype=case.dtype)
    out[asleep] = held[asleep] if keep_rows else float("nan")
    assert (
        gemm_o_dispatch(
            *(o[..., :width] if apart else o, case.weight, cached, factors, case.symbols),
            past=o[..., width:].contiguous() if apart else None,
            head_dim=head_dim,
            row_offset=case.offset,
            keep_rows=keep_rows,
            out=out,
        )
        is out
    )
    if keep_rows:
        assert torch.equal(out[asleep], held[asleep])
    for b in range(case.shape[0]):
        expected = reference.gemm_o_dispatch(
            *(o[b], case.weight, [part[b] for part in cached], factors),
            *(case.symbols.cache[b], case.heads, head_dim, case.block_q, case.offset),
            keep=held[b] if keep_rows else None,
        )
        reference.assert_close(out[b], expected, case.dtype, "dispatch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forecast_of_a_linear_feature_is_exact(dtype: torch.dtype) -> None:
    # With D = 1 an O that is linear in time comes back as if it were computed: at +k, not at -k.
    case = Matrix(5, 1, 260, 4, 0, 128, 0.4, torch.float32, width=256, outputs=96)
    slope = random(case.generator, *case.x.shape)
    now, later = case.x.to(dtype), (case.x + 3 * slope).to(dtype)
    weight, bias = case.weight.to(dtype), case.bias.to(dtype)
    _, cached = gemm_o_update(now, weight, bias, case.symbols, head_dim=64, derivatives=[slope.to(dtype)])
    out = gemm_o_dispatch(later, weight, cached, coefficients(1, 3.0), case.symbols, head_dim=64)
    expected = torch.nn.functional.linear(later.double(), weight.double(), bias.double())
    scale = 4.0  # |now| + 3 |slope|: what the roundings are relative to
    reference.assert_close(out / scale, expected / scale, dtype)


def test_an_update_is_dense_and_a_dispatch_of_the_same_o_repeats_it() -> None:
    case = Matrix(6, 2, 300, 3, 226, 128, 0.5, torch.float32, width=3 * 64 + 40, outputs=100)
    out, cached = gemm_o_update(case.x, case.weight, case.bias, case.symbols, head_dim=64, row_offset=226)
    dense = torch.nn.functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    reference.assert_close(out, dense, torch.float32)
    again = gemm_o_dispatch(
        case.x, case.weight, cached, coefficients(0, 1.0), case.symbols, head_dim=64, row_offset=226
    )
    reference.assert_close(again, dense, torch.float32)


def test_gemm_o_without_symbols_caches_the_bias_alone() -> None:
    case = Matrix(7, 1, 50, 2, 0, 128, 1.0, torch.float32, width=128, outputs=40)
    out, cached = gemm_o_update(case.x, case.weight, case.bias, None, head_dim=64)
    torch.testing.assert_close(cached[0], case.bias.expand(1, 50, 40))
    dense = torch.nn.functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    reference.assert_close(out, dense, torch.float32)


def test_all_heads_cached_is_the_forecast_alone() -> None:
    zeros = SparseSymbols.zeros(1, 2, 100, 100)
    cached = [torch.randn(1, 100, 40) for _ in range(2)]
    o = torch.full((1, 100, 128), float("nan"))
    out = gemm_o_dispatch(o, torch.randn(40, 128), cached, coefficients(1, 2.0), zeros, head_dim=64)
    reference.assert_close(out, cached[0].double() + 2 * cached[1].double(), torch.float32)


def test_rows_that_are_kept_are_zero_in_a_new_output() -> None:
    case = Matrix(8, 2, 300, 2, 77, 64, 0.4, torch.float32, width=128 + 40, outputs=48)
    cached = [torch.randn(case.shape)]
    arguments = (case.x, case.weight, cached, coefficients(0, 1.0), case.symbols)
    rows = case.active().any(-1)
    assert rows.any() and not rows.all()
    every = gemm_o_dispatch(*arguments, head_dim=64, row_offset=77)
    out = gemm_o_dispatch(*arguments, head_dim=64, row_offset=77, keep_rows=True)
    assert torch.equal(out[rows], every[rows]) and not out[~rows].any() and every[~rows].any()


def test_rows_that_are_kept_are_zero_in_new_cached_tensors() -> None:
    case = Matrix(8, 2, 300, 2, 77, 64, 0.4, torch.float32, width=128 + 40, outputs=48)
    options = {"head_dim": 64, "row_offset": 77, "derivatives": [case.x]}
    _, every = gemm_o_update(case.x, case.weight, case.bias, case.symbols, **options)
    _, cached = gemm_o_update(case.x, case.weight, case.bias, case.symbols, keep_rows=True, **options)
    rows = case.active().any(-1)
    for a, b in zip(cached, every, strict=True):
        assert torch.equal(a[rows], b[rows]) and not a[~rows].any() and b[~rows].any()


def test_without_symbols_no_row_is_kept() -> None:
    case = Matrix(9, 1, 50, 2, 0, 128, 1.0, torch.float32, width=128, outputs=40)
    _, (cached,) = gemm_o_update(case.x, case.weight, case.bias, None, head_dim=64, keep_rows=True)
    torch.testing.assert_close(cached, case.bias.expand(1, 50, 40))
    arguments = (case.x, case.weight, [torch.randn(case.shape)], coefficients(0, 1.0), None)
    out = gemm_o_dispatch(*arguments, head_dim=64, keep_rows=True)
    assert torch.equal(out, gemm_o_dispatch(*arguments, head_dim=64))
