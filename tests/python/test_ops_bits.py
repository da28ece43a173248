"""packbits and segment_packbits against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashomni import packbits, segment_packbits

orders = st.sampled_from(["big", "little"])
bits = st.lists(st.integers(0, 3), max_size=80)


@given(values=bits, order=orders, dtype=st.sampled_from([torch.bool, torch.uint8, torch.int64]))
def test_packbits(values, order, dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    assert np.array_equal(packbits(x, order).numpy(), np.packbits(x.numpy() != 0, bitorder=order))


def test_packbits_flattens_and_takes_strided_views() -> None:
    x = torch.rand(7, 11) < 0.5
    assert np.array_equal(packbits(x.T).numpy(), np.packbits(x.numpy().T))


@given(segments=st.lists(bits, min_size=0, max_size=6), order=orders)
def test_segments_pack_each_to_whole_bytes(segments, order) -> None:
    x = torch.tensor([bit for segment in segments for bit in segment], dtype=torch.uint8)
    lengths = [len(segment) for segment in segments]
    indptr = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    packed, packed_indptr = segment_packbits(x, indptr, order)
    parts = [np.packbits(np.array(segment, dtype=np.uint8) != 0, bitorder=order) for segment in segments]
    assert np.array_equal(packed.numpy(), np.concatenate([np.zeros(0, dtype=np.uint8), *parts]))
    assert packed_indptr.dtype == torch.int32
    assert packed_indptr.tolist() == [0, *np.cumsum([len(part) for part in parts])]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TypeError, match="x: expected bool or integers, got float32"):
        packbits(torch.ones(8))
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        packbits([1, 0])
    with pytest.raises(ValueError, match="bitorder: expected"):
        packbits(torch.ones(8, dtype=torch.bool), "middle")
    x = torch.ones(8, dtype=torch.uint8)
    for bad in ([0, 9], [0, 5, 3, 8], [-1, 8]):
        with pytest.raises(ValueError, match="indptr"):
            segment_packbits(x, torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(ValueError, match="indptr: expected int32"):
        segment_packbits(x, torch.tensor([0, 8]))
