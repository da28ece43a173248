"""The published attention wrapper against the float64 reference."""

import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import BLOCKS, DTYPES
from published import Problem, indptr, wrapper

import flashomni


def check(problem: Problem, w=None, bits=None, **options) -> None:
    """Into NaN-poisoned outputs: active rows right, cached rows untouched to the bit."""
    w = w if w is not None else wrapper(problem.device)
    problem.plan(w, **options)
    out, lse = problem.poisoned()
    got = w.run(
        *(problem.q, problem.k, problem.v, *(problem.bits(w) if bits is None else bits)),
        out=out,
        lse=lse,
        return_lse=True,
    )
    assert got[0] is out and got[1] is lse
    expected_out, expected_lse, active = problem.expected()
    out, lse = out.cpu(), lse.cpu()
    assert torch.equal(~lse.isnan(), active) and torch.equal(~out.isnan().all(-1), active)
    reference.assert_close(out[active], expected_out[active], problem.dtype, "out")
    reference.assert_close(lse[active], expected_lse[active], torch.float32, "lse")


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    head_dim=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    causal=st.booleans(),
)
def test_any_ragged_batch(seed, lengths, heads, head_dim, dtype, block, causal) -> None:
    check(Problem(lengths, *heads, head_dim, block, dtype, seed=seed, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_batch_of_equal_lengths(block, causal) -> None:
    check(Problem([(200, 330)] * 3, 4, 2, block=block, causal=causal))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tokens", [77, 226, 512 + 77, 640])
def test_lengths_off_the_blocks(tokens, block) -> None:
    check(Problem([(tokens, tokens)], block=block, skip_density=0.4))


def test_no_symbols_is_dense() -> None:
    problem = Problem([(300, 200), (77, 640)], cache_density=1, skip_density=1, causal=True)
    check(problem, bits=())


@pytest.mark.parametrize("part", [0, 1])
def test_either_symbol_alone(part) -> None:
    problem = Problem([(300, 200)], **{("skip_density", "cache_density")[part]: 1.0})
    w = wrapper()
    problem.plan(w)
    bits = list(problem.bits(w))
    bits[1 - part] = bits[3 - part] = None
    check(problem, bits=bits)


def test_bits_without_indptr() -> None:
    problem = Problem([(300, 200)] * 2)
    w = wrapper()
    problem.plan(w)
    cache, skip, *_ = problem.bits(w)
    check(problem, bits=(cache.view(2, -1), skip.view(2, -1)))
    with pytest.raises(
        ValueError, match=r"sparse_info_indptr: expected int32\[3\] for a batch of 2, got None"
    ):
        w.run(problem.q, problem.k, problem.v, cache, skip)


def test_all_blocks_skipped_is_zero_and_not_nan() -> None:
    problem = Problem([(640, 640)], cache_density=1, skip_density=0)
    w = wrapper()
    problem.plan(w)
    out, lse = w.run_return_lse(problem.q, problem.k, problem.v, *problem.bits(w))
    assert not out.any() and bool(lse.isneginf().all())


@pytest.mark.parametrize("is_full", [1, True])
def test_is_full_looks_at_no_bit(is_full) -> None:
    problem = Problem([(300, 200)])
    w = wrapper()
    problem.plan(w)
    out = w.run(problem.q, problem.k, problem.v, *problem.bits(w), is_full)  # the eighth argument
    reference.assert_close(out, problem.expected(is_full=True)[0], torch.float32)


def test_new_outputs_are_zero_where_cached() -> None:
    problem = Problem([(400, 300), (90, 300)])
    w = wrapper()
    problem.plan(w)
    out, lse = w.run(problem.q, problem.k, problem.v, *problem.bits(w), return_lse=True)
    active = problem.expected()[2]
    assert active.any() and not active.all()
    assert not out[~active].any() and not lse[~active].any()
    assert lse.dtype == torch.float32


def test_hnd_is_the_same() -> None:
    problem = Problem([(130, 200), (64, 77)], 4, 2)
    expected = wrapper()
    problem.plan(expected)
    w = wrapper("cpu", "HND")
    problem.plan(w)
    bits = problem.bits(w)
    k, v = (x.transpose(0, 1).contiguous() for x in (problem.k, problem.v))
    assert torch.equal(w.run(problem.q, k, v, *bits), expected.run(problem.q, problem.k, problem.v, *bits))
    with pytest.raises(ValueError, match=r"k: expected \[2, 277, 64\] \(HND\)"):
        w.run(problem.q, problem.k, problem.v)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(name) -> None:
    check(Problem([(130, 130)], dtype=torch.bfloat16), q_data_type=name, kv_data_type=name)


def test_views_into_a_fused_qkv() -> None:
    problem = Problem([(100, 100)] * 2)
    problem.q, problem.k, problem.v = torch.stack([problem.q, problem.k, problem.v], 1).unbind(1)
    check(problem)


def test_scale_of_padded_heads() -> None:
    problem = Problem([(150, 150)], head_dim=128, cache_density=1, skip_density=1)
    problem.q[..., 120:], problem.k[..., 120:] = 0, 0
    w = wrapper()
    problem.plan(w, sm_scale=120**-0.5)
    short = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1)[None] for x in (problem.q[..., :120], problem.k[..., :120])),
        problem.v.double().transpose(0, 1)[None],
        scale=120**-0.5,
    )
    out = w.run(problem.q, problem.k, problem.v)
    reference.assert_close(out, short[0].transpose(0, 1), torch.float32)


def test_what_callers_read_after_plan() -> None:
    problem = Problem([(640, 200), (77, 130)], 3, 3, block=(128, 64))
    w = wrapper()
    problem.plan(w)
    assert w._qo_indptr_buf.tolist() == [0, 640, 717] and w._kv_indptr_buf.tolist() == [0, 200, 330]
    assert (w._sparse_block_size_for_q, w._sparse_block_size_for_kv) == (128, 64)
    assert w._sparse_info_indptr_base.tolist() == [0, 15, 18]
    assert w._sparse_kv_info_indptr_base.tolist() == [0, 60, 69]
    assert {x.dtype for x in (w._qo_indptr_buf, w._sparse_info_indptr_base)} == {torch.int32}


def test_old_names() -> None:
    problem = Problem([(130, 130)], cache_density=1)
    w = wrapper()
    w.begin_forward(indptr([130]), indptr([130]), 2, 2, 64, q_data_type="float32")
    out, lse = w.forward_return_lse(problem.q, problem.k, problem.v, *problem.bits(w))
    assert torch.equal(w.forward(problem.q, problem.k, problem.v, *problem.bits(w)), out)
    assert w.end_forward() is None
    w.reset_workspace_buffer(torch.empty(8), torch.empty(8, dtype=torch.uint8))
    assert torch.equal(w.run_return_lse(problem.q, problem.k, problem.v, *problem.bits(w))[1], lse)
    with pytest.raises(ValueError, match="int_workspace_buffer: expected a tensor on cpu, got NoneType"):
        w.reset_workspace_buffer(torch.empty(8), None)


def test_given_buffers_take_later_lengths_and_symbols() -> None:
    """What a graph replay sees: the same tensors with other contents."""
    buffers = (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    w = wrapper("cpu", "NHD", True, *buffers)
    assert w.is_cuda_graph_enabled
    for seed, lengths in enumerate(([(200, 300), (100, 50)], [(10, 340), (130, 10)])):
        problem = Problem(lengths, seed=seed)
        spare = torch.full((300, 2, 64), float("nan"))
        q, k, v = (torch.cat([x, spare])[:350] for x in (problem.q, problem.k, problem.v))
        problem.plan(w)
        assert w._qo_indptr_buf is buffers[0] and w._kv_indptr_buf is buffers[1]
        out = w.run(q, k, v, *problem.bits(w))
        expected, _, active = problem.expected()
        tokens = len(expected)
        reference.assert_close(out[:tokens][active], expected[active], torch.float32)
        assert not out[tokens:].any() and not out[:tokens][~active].any()
    with pytest.raises(ValueError, match=r"qo_indptr: expected int32\[3\], as qo_indptr_buf, got int32\[2\]"):
        Problem([(9, 9)]).plan(w)
    with pytest.raises(ValueError, match="qo_indptr_buf: expected int32"):
        wrapper("cpu", "NHD", True)


REFUSED = {
    "head_dim_vo": (128, NotImplementedError),
    "pos_encoding_mode": ("ROPE_LLAMA", NotImplementedError),
    "use_fp16_qk_reduction": (True, NotImplementedError),
    "logits_soft_cap": (30.0, NotImplementedError),
    "rope_scale": (1.0, NotImplementedError),
    "rope_theta": (1e4, NotImplementedError),
    "kv_data_type": ("bfloat16", NotImplementedError),
    "q_data_type": ("float8", ValueError),
    "sm_scale": (-1.0, ValueError),
    "sparse_block_size_for_q": (96, ValueError),
    "custom_mask": (torch.ones(5, dtype=torch.bool), ValueError),
    "packed_custom_mask": (torch.ones(8, dtype=torch.bool), TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_ignored(name) -> None:
    value, kind = REFUSED[name]
    options = {"q_data_type": "float32", name: value}
    with pytest.raises(kind, match=f"{name}.*: expected"):
        wrapper().plan(indptr([8]), indptr([8]), 2, 2, 64, **options)


def test_what_means_nothing_is_taken() -> None:
    problem = Problem([(130, 130)])
    check(problem, logits_soft_cap=0.0, pos_encoding_mode="NONE", use_fp16_qk_reduction=False)
    for backend in ("auto", "fa2", "fa3"):
        check(problem, wrapper("cpu", backend=backend))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="float_workspace_buffer: expected a torch.Tensor, got int"):
        flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper(1)
    for options, name in (
        ({"kv_layout": "NDH"}, "kv_layout"),
        ({"backend": "triton"}, "backend"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            wrapper("cpu", **options)
    with pytest.raises(NotImplementedError, match="custom_mask_buf: expected None"):
        wrapper("cpu", custom_mask_buf=torch.empty(1))
    w, problem = wrapper(), Problem([(130, 130)])
    with pytest.raises(RuntimeError, match=r"expected a plan\(\) before"):
        w.run(problem.q, problem.k, problem.v)
    for bad in (torch.tensor([1, 8]), torch.tensor([0, 8, 4]), torch.tensor([0])):
        with pytest.raises(ValueError, match="qo_indptr: expected"):
            w.plan(bad.int(), bad.int(), 2, 2, 64)
    with pytest.raises(TypeError, match="kv_indptr: expected int32, got int64"):
        w.plan(indptr([8]), indptr([8]).long(), 2, 2, 64)
    problem.plan(w)
    q, k, v = problem.q, problem.k, problem.v
    bits = problem.bits(w)
    for arguments, kind, message in (
        ((q.half(), k, v), TypeError, "q: expected torch.float32, as in plan"),
        ((q[:100], k, v), ValueError, r"q: expected \[130, 2, 64\] \(NHD\), got float32\[100, 2, 64\]"),
        ((q, k, v, bits[0][:0], bits[1], *bits[2:]), ValueError, "sparse_info_indptr: expected"),
        ((q, k, v, bits[0].int()), TypeError, "sparse_info: expected uint8"),
        ((q, k, v, None, None, bits[2]), ValueError, "sparse_info_indptr: expected None"),
        (
            (q, k, v, bits[0], bits[1], bits[2].long(), bits[3]),
            TypeError,
            "sparse_info_indptr: expected int32",
        ),
        ((q, k, v, *bits, "yes"), TypeError, "is_full: expected a bool"),
    ):
        with pytest.raises(kind, match=message):
            w.run(*arguments)
    with pytest.raises(ValueError, match=r"sparse_kv_info: expected 1 bytes for batch element 0, got 2"):
        w.run(q, k, v, None, torch.ones(2, dtype=torch.uint8), None, torch.tensor([0, 2], dtype=torch.int32))


def test_bits_of_other_blocks_are_refused() -> None:
    """Bits for blocks of 64 under a plan for 128."""
    problem = Problem([(640, 640)], block=(64, 64))
    w, other = wrapper(), wrapper()
    problem.plan(w)
    Problem([(640, 640)]).plan(other)
    with pytest.raises(ValueError, match="sparse_info: expected 2 bytes for batch element 0, got 3"):
        other.run(problem.q, problem.k, problem.v, *problem.bits(w))


def test_compiled_is_the_same() -> None:
    problem = Problem([(130, 200), (77, 64)])
    w = wrapper()
    problem.plan(w)
    bits = problem.bits(w)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, *bits: w.run(q, k, v, *bits) + 1, fullgraph=True, backend="eager"
    )
    got = compiled(problem.q, problem.k, problem.v, *bits)
    assert torch.equal(got, w.run(problem.q, problem.k, problem.v, *bits) + 1)


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("sizes", [[], [0], [8], [1, 0, 17, 8], [130, 3]])
def test_packing_in_torch_is_numpys(sizes, order) -> None:
    """What a GPU's tensors go through, on the CPU's."""
    from flashomni.ops import bits as ops

    little = order == "little"
    x = torch.rand(sum(sizes) + 5) < 0.5
    ends = torch.tensor([3, *(3 + n for n in itertools.accumulate(sizes))], dtype=torch.int32)
    packed, offsets = ops._pack_segments(x.view(torch.uint8), ends, little)
    parts = [np.packbits(x[a:b].numpy(), bitorder=order) for a, b in itertools.pairwise(ends.tolist())]
    assert packed.tolist() == [byte for part in parts for byte in part]
    assert offsets.tolist() == [0, *itertools.accumulate(map(len, parts))] and offsets.dtype == torch.int32
    assert (
        ops._pack_rows(x.view(torch.uint8), little).tolist()
        == np.packbits(x.numpy(), bitorder=order).tolist()
    )
    again = flashomni.segment_packbits(x, ends, order)
    assert torch.equal(again[0], packed) and torch.equal(again[1], offsets)
    with pytest.raises(ValueError, match="indptr: expected ascending offsets"):
        ops._pack_segments(x.view(torch.uint8), torch.tensor([0, 9999]), little)
