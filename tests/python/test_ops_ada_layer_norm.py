"""ada_layer_norm against float64, on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, poison, random
from torch import Tensor

from flashomni import ada_layer_norm


def check(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor) -> None:
    """`out` poisoned before."""
    assert ada_layer_norm(x, scale, shift, eps=eps, out=out) is out
    expected = reference.ada_layer_norm(x.cpu(), scale.cpu(), shift.cpu(), eps)
    reference.assert_close(out.cpu(), expected, x.dtype)


@given(
    batch=st.integers(1, 3),
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 7, 64, 255, 256, 257, 3072]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 0.5]),
    seed=st.integers(0, 9),
)
def test_any_shape(batch: int, rows: int, width: int, dtype: torch.dtype, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, batch, rows, width, dtype=dtype)
    scale, shift = random(generator, 2, batch, width, dtype=dtype)
    check(x, scale, shift, eps, poison(batch, rows, width, dtype=dtype))


def parts(dtype: torch.dtype, rows: int, width: int, device: str) -> tuple[Tensor, ...]:
    """(x, scale, shift) as slices of larger tensors, which are NaN around them."""
    x = torch.full((2, rows + 5, width + 8), float("nan"), dtype=dtype, device=device)
    x[:, 2 : rows + 2, :width] = torch.randn(2, rows, width, device=device)
    x[:, 2, :width] = 3  # no variance: eps alone
    made = torch.randn(2, 3 * width, device=device).to(dtype)
    return x[:, 2 : rows + 2, :width], made[:, width : 2 * width], made[:, 2 * width :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_larger_tensors(dtype: torch.dtype) -> None:
    x, scale, shift = parts(dtype, 21, 96, "cpu")
    joint = poison(2, 40, 96, dtype=dtype)
    check(x, scale, shift, 1e-6, joint[:, 11:32])
    assert int(joint.isnan().sum()) == 2 * 19 * 96


def test_a_new_output_has_the_shape_of_x() -> None:
    x, scale, shift = parts(torch.float32, 21, 96, "cpu")
    out = ada_layer_norm(x, scale, shift)
    assert out.is_contiguous() and torch.equal(out, ada_layer_norm(x, scale, shift, out=torch.empty(x.shape)))


# A warp a row, two to four; whole runs of eight columns and others.
WIDTHS = (8, 77, 256, 1024, 1536, 2304, 3072, 3073, 4096, 5120, 6144, 9216, 12288)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_on_the_gpu(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 333):
        x, scale, shift = parts(dtype, rows, width, "cuda")
        joint = torch.full((2, rows + 9, width), float("nan"), dtype=dtype, device="cuda")
        check(x, scale, shift, 1e-6, joint[:, 4 : rows + 4])
        assert int(joint.isnan().sum()) == 2 * 9 * width
        first = joint.nan_to_num().clone()
        for _ in range(3):
            ada_layer_norm(x, scale, shift, out=joint[:, 4 : rows + 4])
            assert torch.equal(joint.nan_to_num(), first)


@pytest.mark.gpu
def test_what_the_gpu_does_not_serve_is_refused() -> None:
    x = torch.randn(1, 4, 12296, device="cuda").bfloat16()
    with pytest.raises(NotImplementedError, match="x: expected at most 12288 columns"):
        ada_layer_norm(x, x[:, 0], x[:, 1])
    with pytest.raises(TypeError, match="x: expected float16 or bfloat16"):
        ada_layer_norm(x[..., :64].float(), x[:, 0, :64].float(), x[:, 1, :64].float())
