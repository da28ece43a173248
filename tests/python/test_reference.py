"""The reference itself, held to torch where torch knows the answer."""

import math

import pytest
import reference
import torch
from inputs import attention_case


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_dense_attention_is_torchs(causal: bool, heads: tuple[int, int]) -> None:
    case = attention_case(1, heads=heads, q_tokens=150, kv_tokens=150)
    case.symbols = None
    out, lse = case.expected(torch.zeros(case.q.shape), torch.zeros(case.q.shape[:-1]), causal=causal)
    q, k, v = (x.double().transpose(1, 2) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(64)
    if causal:
        scores = scores.masked_fill(~torch.ones(150, 150, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2) / math.log(2))


def test_sparse_attention_is_torchs_with_a_mask() -> None:
    case = attention_case(2, q_tokens=200, kv_tokens=300, cache_density=1.0, skip_density=0.7)
    _, skip = case.symbols.masks()
    assert skip.any(-1).all(), "the case must not have an empty row"
    out, _ = case.expected(torch.zeros(case.q.shape), torch.zeros(case.q.shape[:-1]))
    mask = skip.repeat_interleave(128, 2)[:, :, :200].repeat_interleave(128, 3)[..., :300]
    q, k, v = (x.double().transpose(1, 2) for x in (case.q, case.k, case.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_summaries_of_one_token_blocks_are_dense_attention() -> None:
    # With blocks of one token a mean is the token itself, so dropping nothing and skipping everything agree.
    q, k, v = (torch.randn(9, 1, 64).double() for _ in range(3))
    none = torch.zeros(math.ceil(81 / 8), dtype=torch.uint8)
    start = {"out": torch.zeros(9, 1, 64), "lse": torch.zeros(9, 1)}
    dense = reference.attention(q, k, v, None, None, reference.Blocks(1, 1), **start)
    skipped = reference.attention(q, k, v, None, none, reference.Blocks(1, 1), k_mean=k, v_mean=v, **start)
    torch.testing.assert_close(skipped, dense)


def test_gemms_are_torchs_linear() -> None:
    x, weight, bias = torch.randn(40, 96), torch.randn(64, 96), torch.randn(64)
    dense = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    q = reference.gemm_q(x, weight, bias, None, 2, 128, 0, None, torch.zeros(40, 64))
    torch.testing.assert_close(q, dense)
    cache = torch.tensor([0b0110], dtype=torch.uint8)
    out, cached = reference.gemm_o_update([x], weight, bias, cache, 2, 32, 32, 0)
    torch.testing.assert_close(out, dense)
    again = reference.gemm_o_dispatch(x, weight, cached, torch.ones(1), cache, 2, 32, 32, 0)
    torch.testing.assert_close(again, dense)
    assert not torch.allclose(cached[0], bias.double().expand(40, 64))


def test_the_smallest_prefix_knows_what_is_sure() -> None:
    share = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2], dtype=torch.float64)
    every = torch.ones(5, dtype=torch.bool)
    choice = reference.smallest_prefix(share, every, 0.25, 1e-6)
    assert choice.chosen.tolist() == [False, True, False, True, False]
    assert choice.sure.all()
    # 0.1 + 0.1 + 0.2 is the limit to rounding: either of the equal 0.2 may be the one.
    assert reference.smallest_prefix(share, every, 0.4, 1e-6).sure.tolist() == [
        True,
        True,
        False,
        True,
        False,
    ]
