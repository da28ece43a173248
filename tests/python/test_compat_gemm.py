"""flashomni_gemm and flashomni_gemm_reduction against the float64 reference."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random, random_mask
from published import indptr

from flashomni import flashomni_gemm, flashomni_gemm_reduction, segment_packbits


class Matrix:
    """A [B, M, K], W [N, K] and bits of sequences of offset + M + rest tokens, as scripts have them."""

    def __init__(
        self,
        rows: int = 300,
        heads: int = 3,
        width: int = 192,
        features: int = 96,
        offset: int = 0,
        rest: int = 0,
        batch: int = 1,
        block: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.A = random(generator, batch, rows, width, dtype=dtype)
        self.W = random(generator, features, width).div(width**0.5).to(dtype)
        self.bias = random(generator, features, dtype=dtype)
        bits = -(-(offset + rows + rest) // block) * heads
        mask = random_mask(generator, 0.6, batch * bits)
        self.info, self.indptr = segment_packbits(mask, indptr([bits] * batch), "little")
        blocks = (torch.arange(rows) + offset) // block
        self.active = mask.view(batch, -1, heads)[:, blocks]  # [B, M, H]
        self.heads, self.offset, self.block, self.dtype = heads, offset, block, dtype

    @property
    def arguments(self) -> tuple:
        """All positional up to num_text_tokens, as real callers have it."""
        return (self.A, self.W, self.heads, self.info, self.indptr, self.offset)

    def shares(self, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A W^T in float64: cached heads, active heads, columns past the heads."""
        A, W = self.A.double(), self.W.double()
        heads = self.heads * head_dim
        active = self.active.repeat_interleave(head_dim, -1)
        A_heads, W_heads = A[..., :heads], W[:, :heads]
        return (
            A_heads.masked_fill(active, 0) @ W_heads.T,
            A_heads.masked_fill(~active, 0) @ W_heads.T,
            A[..., heads:] @ W[:, heads:].T,
        )


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    heads=st.integers(1, 9),
    columns=st.integers(1, 40),
    offset=st.sampled_from([0, 77, 226, 512]),
    rest=st.sampled_from([0, 1, 1000]),
    batch=st.integers(1, 3),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_gemm(seed, rows, heads, columns, offset, rest, batch, block, dtype) -> None:
    case = Matrix(rows, heads, 64, heads * columns, offset, rest, batch, block, dtype, seed)
    out = poison(batch, rows, heads * columns, dtype=dtype)
    assert flashomni_gemm(*case.arguments, case.bias, out, block) is out
    dense = case.A.double() @ case.W.double().T + case.bias.double()
    active = case.active.repeat_interleave(columns, -1)
    assert torch.equal(out.isnan(), ~active)
    reference.assert_close(out[active], dense[active], dtype)
    new = flashomni_gemm(*case.arguments, case.bias, sparse_q_size=block)
    assert torch.equal(new, out.nan_to_num(0))


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    heads=st.integers(1, 9),
    head_dim=st.sampled_from([64, 80, 128]),
    features=st.integers(1, 90),
    offset=st.sampled_from([0, 77, 226, 512]),
    rest=st.sampled_from([0, 1, 1000]),
    batch=st.integers(1, 3),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_reduction(seed, rows, heads, head_dim, features, offset, rest, batch, block, dtype, bias) -> None:
    """The two calls of an Update together are one dense product, and the second alone is a Dispatch."""
    case = Matrix(rows, heads, heads * head_dim, features, offset, rest, batch, block, dtype, seed)
    bias = case.bias if bias else None
    B_c = flashomni_gemm_reduction(*case.arguments, bias, True, block)
    cached, active, _ = case.shares(head_dim)
    reference.assert_close(B_c, cached + (0 if bias is None else bias.double()), dtype, "B_c")
    kept = B_c.clone()
    out = flashomni_gemm_reduction(*case.arguments, B_c, False, block)
    assert torch.equal(B_c, kept), "bias is only read"
    reference.assert_close(out, kept.double() + active, dtype, "out")
    alone = flashomni_gemm_reduction(*case.arguments, sparse_q_size=block)
    reference.assert_close(alone, active, dtype, "without B_c")


def test_a_dispatch_does_not_read_cached_heads() -> None:
    case = Matrix()
    clean = flashomni_gemm_reduction(*case.arguments)
    case.A[~case.active.repeat_interleave(64, -1)] = float("nan")
    assert torch.equal(flashomni_gemm_reduction(*case.arguments), clean)


@pytest.mark.parametrize("given_head_dim", [None, 64])
def test_a_single_block_has_its_mlp_beside_the_heads(given_head_dim) -> None:
    """FLUX's proj_out: A is [attention | MLP], four times as wide; its MLP is always computed."""
    case = Matrix(heads=3, width=3 * 64 * 5, features=3 * 64, offset=77)
    cached, active, past = case.shares(64)
    B_c = flashomni_gemm_reduction(*case.arguments, case.bias, True, head_dim=given_head_dim)
    reference.assert_close(B_c, cached + case.bias.double(), torch.float32)
    out = flashomni_gemm_reduction(*case.arguments, B_c, False, head_dim=given_head_dim)
    dense = case.A.double() @ case.W.double().T + case.bias.double()
    reference.assert_close(out, dense, torch.float32)
    torch.testing.assert_close(out.double() - B_c.double(), active + past, atol=1e-4, rtol=1e-4)


def test_a_head_that_cannot_be_told_is_asked_for() -> None:
    case = Matrix(heads=3, width=3 * 64 + 500, features=100)
    with pytest.raises(ValueError, match=r"head_dim: expected .*K / num_qo_heads = 692 / 3 nor .*100 / 3"):
        flashomni_gemm_reduction(*case.arguments)
    reference.assert_close(
        flashomni_gemm_reduction(*case.arguments, head_dim=64), sum(case.shares(64)[1:]), torch.float32
    )


def test_no_symbols() -> None:
    case = Matrix(features=99)
    dense = case.A.double() @ case.W.double().T
    for call in (
        flashomni_gemm(case.A, case.W, 3),
        flashomni_gemm(*case.arguments, is_full=1),
        flashomni_gemm_reduction(case.A, case.W, 3, None, None, 77),
    ):
        reference.assert_close(call, dense, torch.float32)
    B_c = flashomni_gemm_reduction(case.A, case.W, 3, None, None, 77, case.bias, True)
    torch.testing.assert_close(B_c, case.bias.expand_as(B_c))


def test_bits_without_indptr() -> None:
    case = Matrix(batch=2, rest=500)
    expected = flashomni_gemm(*case.arguments)
    rows = case.info.view(2, -1)
    assert torch.equal(flashomni_gemm(case.A, case.W, 3, rows, None, 0), expected)
    assert torch.equal(flashomni_gemm(case.A[:1], case.W, 3, rows[0], None, 0), expected[:1])
    with pytest.raises(ValueError, match=r"sparse_info_indptr: expected int32\[3\]"):
        flashomni_gemm(case.A, case.W, 3, case.info, None, 0)


def test_sequences_of_different_lengths() -> None:
    """Bits of a ragged batch whose elements are of different sizes."""
    mask = torch.rand(9 * 3 + 4 * 3) < 0.5
    info, offsets = segment_packbits(mask, indptr([27, 12]), "little")
    case = Matrix(batch=2)
    out = flashomni_gemm(case.A, case.W, 3, info, offsets, 100)
    for b, first in enumerate((0, 27)):
        bits = mask[first : first + 12].view(4, 3)[(torch.arange(300) + 100) // 128]
        dense = (case.A[b].double() @ case.W.double().T).view(300, 3, 32) * bits[:, :, None]
        reference.assert_close(out[b], dense.flatten(1), torch.float32)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"num_qo_heads": 0}, ValueError, "num_qo_heads: expected at least 1, got 0"),
        ({"num_qo_heads": 3.0}, TypeError, "num_qo_heads: expected an integer"),
        ({"num_text_tokens": -1}, ValueError, "num_text_tokens: expected at least 0"),
        ({"num_text_tokens": 512}, ValueError, "sparse_info: expected at least 3 bytes .* got 2"),
        ({"sparse_q_size": 96}, ValueError, "sparse_q_size: expected 64 or 128"),
        ({"sparse_info": torch.zeros(9)}, TypeError, "sparse_info: expected uint8"),
        ({"sparse_info": None}, ValueError, "sparse_info_indptr: expected None"),
        ({"A": torch.zeros(3, 192)}, ValueError, "A: expected"),
        ({"A": torch.zeros(1, 300, 192, dtype=torch.int32)}, TypeError, "A: expected float"),
        ({"W": torch.zeros(96, 64)}, ValueError, "W: expected"),
        ({"bias": torch.zeros(7)}, ValueError, "bias: expected"),
    ],
)
def test_wrong_arguments_are_named(change, kind, message) -> None:
    case = Matrix()
    names = ("A", "W", "num_qo_heads", "sparse_info", "sparse_info_indptr", "num_text_tokens")
    arguments = dict(zip(names, case.arguments, strict=True)) | change
    for call in (flashomni_gemm, flashomni_gemm_reduction):
        with pytest.raises(kind, match=message):
            call(**arguments)


def test_what_each_of_the_two_wants_as_bias() -> None:
    case = Matrix()
    with pytest.raises(
        ValueError, match=r"bias: expected \[96\] with is_for_cache=True, got float32\[1, 300"
    ):
        flashomni_gemm_reduction(*case.arguments, torch.zeros(1, 300, 96), True)
    with pytest.raises(ValueError, match=r"bias: expected \[1, 300, 96\] with is_for_cache=False"):
        flashomni_gemm_reduction(*case.arguments, case.bias, False)
    with pytest.raises(ValueError, match="W: expected a number of rows divisible"):
        flashomni_gemm(case.A, case.W[:95], *case.arguments[2:])
