"""Custom masks of the published wrapper, exact to the token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import BLOCKS, DTYPES
from published import Problem, indptr, wrapper
from test_compat_attention import check

import flashomni
from flashomni.compat import masks, plan


def padding(q_tokens: int, kv_tokens: int, *unseen: range) -> torch.Tensor:
    mask = torch.ones(q_tokens, kv_tokens, dtype=torch.bool)
    for keys in unseen:
        mask[:, keys.start : keys.stop] = False
    return mask


def kinds(problem: Problem) -> list[int] | None:
    """Classes of rows of each sequence, as the wrapper sees them."""
    w = wrapper()
    problem.plan(w)
    return None if w._plan.classes is None else [len(part) for part in w._plan.classes]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=2),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98]),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
)
def test_any_mask(seed, lengths, density, dtype, block) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(n, generator=generator) < density for n in lengths]
    check(Problem(lengths, block=block, dtype=dtype, seed=seed, masks=drawn))


@pytest.mark.parametrize("block", BLOCKS)
def test_text_padding(block) -> None:
    """512 text tokens of which 77 and 300 are real, images after them."""
    lengths = [(900, 900), (700, 700)]
    problem = Problem(
        lengths, block=block, masks=[padding(900, 900, range(77, 512)), padding(700, 700, range(300, 512))]
    )
    assert kinds(problem) == [1, 1]
    check(problem)


def test_padding_rows_that_see_nothing() -> None:
    valid = torch.arange(640) % 300 < 200
    problem = Problem([(640, 640)], masks=[valid[:, None] & valid], skip_density=0.9)
    assert kinds(problem) == [2]
    check(problem)


def test_documents_one_after_the_other() -> None:
    document = torch.bucketize(torch.arange(500), torch.tensor([90, 333]))
    problem = Problem([(500, 500)], masks=[document[:, None] == document], block=(128, 64))
    assert kinds(problem) == [3]
    check(problem)


def test_whole_blocks_cost_nothing() -> None:
    mask = torch.zeros(256, 512, dtype=torch.bool)
    mask[:128, :128] = mask[128:, 384:] = True
    problem = Problem([(256, 512)], masks=[mask])
    for kind in masks.classes(mask, 128, 128):
        assert kind.whole and kind.order is None and int(kind.kv_holds.sum()) == 1
    check(problem)


def test_all_seen_is_no_mask() -> None:
    problem = Problem([(200, 300)], masks=[torch.ones(200, 300, dtype=torch.bool)])
    assert kinds(problem) is None
    check(problem)


@pytest.mark.parametrize("lengths", [[(200, 300)], [(300, 200), (64, 64)]])
def test_a_causal_mask_is_causality(lengths) -> None:
    causal = [torch.ones(n, dtype=torch.bool).tril(n[1] - n[0]) for n in lengths]
    problem = Problem(lengths, masks=causal)
    w = wrapper()
    problem.plan(w)
    assert w._plan.causal and w._plan.classes is None
    check(problem)


def test_packed_masks_are_the_same() -> None:
    lengths = [(130, 77), (50, 200)]
    drawn = [padding(130, 77, range(3, 40)), padding(50, 200, range(100, 131))]
    problem = Problem(lengths, masks=drawn)
    flat = torch.cat([mask.flatten() for mask in drawn])
    packed, _ = flashomni.segment_packbits(flat, indptr([mask.numel() for mask in drawn]), "little")
    check(problem, custom_mask=None, packed_custom_mask=packed)
    check(problem, packed_custom_mask=packed)  # both, and they agree
    packed[0] ^= 1
    with pytest.raises(ValueError, match="packed_custom_mask: expected the bits of custom_mask, got others"):
        problem.plan(wrapper(), packed_custom_mask=packed)


def test_large_masks_are_looked_at_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(masks, "_CHUNK", 1 << 9)
    drawn = [padding(130, 77, range(3, 40)), torch.ones(50, 200, dtype=torch.bool).tril(150)]
    problem = Problem([(130, 77), (50, 200)], masks=drawn)
    flat = torch.cat([mask.flatten() for mask in drawn])
    packed, _ = flashomni.segment_packbits(flat, indptr([mask.numel() for mask in drawn]), "little")
    check(problem, custom_mask=None, packed_custom_mask=packed)
    assert [masks.is_causal(mask) for mask in drawn] == [False, True]


def test_is_full_keeps_the_mask() -> None:
    problem = Problem([(200, 200)], masks=[padding(200, 200, range(20, 90))])
    w = wrapper()
    problem.plan(w)
    out = w.run(problem.q, problem.k, problem.v, *problem.bits(w), True)
    torch.testing.assert_close(out.double(), problem.expected(is_full=True)[0], atol=2**-16, rtol=2**-16)


def test_what_is_refused() -> None:
    mask = padding(64, 64, range(8))
    with pytest.raises(ValueError, match="causal: expected False beside a custom mask"):
        Problem([(64, 64)], masks=[mask], causal=True).plan(wrapper())
    buffers = (torch.zeros(2, dtype=torch.int32),) * 2
    with pytest.raises(NotImplementedError, match="custom_mask: expected None with use_cuda_graph=True"):
        Problem([(64, 64)], masks=[mask]).plan(wrapper("cpu", "NHD", True, *buffers))
    with pytest.raises(TypeError, match="custom_mask: expected bool, got uint8"):
        Problem([(64, 64)], masks=[mask.to(torch.uint8)]).plan(wrapper())


def test_a_gpu_refuses_masks_that_would_be_slower_than_dense(monkeypatch) -> None:
    monkeypatch.setattr(plan, "_flat_mask", lambda *_: torch.rand(200 * 200) < 0.5)
    planned = plan.Plan([(200, 200)], 1, 1, 64, 128, 128, torch.float16, False, None)
    with pytest.raises(
        NotImplementedError, match="custom_mask: expected at most 64 kinds of rows .*, got 200: use"
    ):
        plan.add_mask(planned, None, None, torch.device("cuda"))


def test_bits_of_another_length_are_refused_under_a_mask() -> None:
    problem = Problem([(200, 200)], masks=[padding(200, 200, range(20, 90))])
    w = wrapper()
    problem.plan(w)
    q, k, v = problem.q, problem.k, problem.v
    cache, skip, cache_indptr, skip_indptr = problem.bits(w)
    with pytest.raises(ValueError, match="sparse_kv_info: expected 1 bytes for batch element 0, got 3"):
        w.run(q, k, v, cache, torch.cat([skip, skip, skip]), cache_indptr, skip_indptr * 3)
    with pytest.raises(ValueError, match="sparse_kv_info: expected 1 bytes for batch element 0, got 3"):
        w.run(q, k, v, cache, torch.cat([skip, skip, skip]))
