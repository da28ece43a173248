"""What the published code gets wrong, a test each that ours is right. Others lie where they belong:

it cannot be installed as cloned             tests/installs
the JIT recompiles in every process          test_jit.py
benchmark scripts assert and time nothing    examples/published_api, test_published_examples.py
"""

import pytest
import reference
import torch
from published import Problem, wrapper
from test_compat_attention import check
from test_compat_gemm import Matrix

import flashomni
from flashomni import flashomni_gemm, flashomni_gemm_reduction


def test_auto_backend_runs() -> None:
    check(Problem([(200, 200)]), wrapper("cpu", backend="auto"))


def test_run_without_symbols_is_dense() -> None:
    check(Problem([(640, 640)], cache_density=1, skip_density=1), bits=())


def test_causal_is_exact() -> None:
    check(Problem([(640, 640), (77, 226)], causal=True))


def test_custom_masks_are_exact() -> None:
    mask = torch.ones(226, 640, dtype=torch.bool)
    mask[:, 77:300] = False
    check(Problem([(226, 640)], masks=[mask]))


@pytest.mark.parametrize("tokens", [1, 64, 77])
@pytest.mark.parametrize("graph", [False, True])
def test_cached_rows_are_never_written(tokens, graph) -> None:
    """Small inputs and graph mode: there they received stale workspace."""
    problem = Problem([(tokens, tokens)], cache_density=0)
    buffers = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    w = wrapper("cpu", "NHD", True, *buffers) if graph else wrapper()
    problem.plan(w)
    out, lse = (torch.full_like(x, 7) for x in problem.poisoned())
    w.run(problem.q, problem.k, problem.v, *problem.bits(w), out=out, lse=lse)
    assert bool((out == 7).all()) and bool((lse == 7).all())


@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)])
def test_640_tokens_obey_their_own_bits(block) -> None:
    check(Problem([(640, 640)], block=block, cache_density=1, skip_density=0.5))


def test_rows_without_a_block_are_zero() -> None:
    problem = Problem([(640, 640)], cache_density=1)
    problem.skip[0][2, 1] = False
    check(problem)
    problem.skip[0][:] = False
    w = wrapper()
    problem.plan(w)
    assert not w.run(problem.q, problem.k, problem.v, *problem.bits(w)).any()


@pytest.mark.parametrize("features", [40, 1000])
def test_gemm_o_of_other_features_than_heads(features) -> None:
    case = Matrix(heads=3, width=3 * 64, features=features)
    B_c = flashomni_gemm_reduction(*case.arguments, case.bias, True)
    cached, active, _ = case.shares(64)
    reference.assert_close(B_c, cached + case.bias.double(), torch.float32)
    reference.assert_close(
        flashomni_gemm_reduction(*case.arguments, B_c), cached + active + case.bias.double(), torch.float32
    )


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96])
def test_each_narrow_head_has_its_own_bit(head_dim) -> None:
    """128 columns hold more than one head; the bits of neighbours differ."""
    case = Matrix(heads=4, width=4 * head_dim, features=4 * head_dim, rows=128)
    case.info = torch.tensor([0b0101], dtype=torch.uint8)
    case.active = torch.tensor([True, False, True, False]).expand(1, 128, 4)
    out = flashomni_gemm(*case.arguments)
    active = case.active.repeat_interleave(head_dim, -1)
    reference.assert_close(out, (case.A.double() @ case.W.double().T) * active, torch.float32)
    reference.assert_close(flashomni_gemm_reduction(*case.arguments), case.shares(head_dim)[1], torch.float32)
    check(Problem([(200, 200)], 4, 4, head_dim))


@pytest.mark.parametrize("text", [77, 226, 512])
@pytest.mark.parametrize("rows", [1, 100, 640])
def test_any_rows_after_any_text(rows, text) -> None:
    case = Matrix(rows=rows, offset=text)
    active = case.active.repeat_interleave(32, -1)
    out = flashomni_gemm(*case.arguments, case.bias)
    dense = case.A.double() @ case.W.double().T + case.bias.double()
    reference.assert_close(out, dense * active, torch.float32)
    reference.assert_close(flashomni_gemm_reduction(*case.arguments), case.shares(64)[1], torch.float32)


def test_the_bias_is_only_read_and_the_result_is_new() -> None:
    case = Matrix()
    B_c = torch.randn(1, 300, 96)
    before, version = B_c.clone(), B_c._version
    out = flashomni_gemm_reduction(*case.arguments, B_c)
    assert torch.equal(B_c, before) and B_c._version == version
    assert out.data_ptr() != B_c.data_ptr()


def test_schemas_tell_what_is_written() -> None:
    for name, written in (
        ("gemm_o_dispatch", ["out"]),
        ("gemm_q", ["out"]),
        ("sparse_attention", ["out", "lse"]),
    ):
        schema = getattr(torch.ops.flashomni, name).default._schema
        assert [
            a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ] == written
    assert flashomni.flashomni_gemm is flashomni_gemm
