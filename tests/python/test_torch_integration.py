"""The operators as torch sees them: opcheck, torch.compile, subclasses; and imports and threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import pytest
import torch
from inputs import random_symbols
from torch._subclasses import FakeTensorMode

import flashomni
from flashomni import SparseSymbols
from flashomni.diffusers.blocks.compiled import InGraph
from flashomni.ops import _dispatch

TOKENS, HEADS, DIM, TEXT = 300, 2, 64, 77


def symbols() -> SparseSymbols:
    return random_symbols(torch.Generator().manual_seed(0), 1, HEADS, TOKENS, TOKENS, (128, 64))


class Times(InGraph):
    """What a block's part in a graph may be."""

    def __call__(self, x: torch.Tensor, factor: int) -> torch.Tensor:
        return factor * x


TIMES = Times()
TIMES.enroll(torch.nn.Identity())


def samples() -> dict[str, tuple]:
    """Arguments of each torch.library operator, in the order of its schema."""
    s = symbols()
    q = torch.randn(1, TOKENS, HEADS, DIM)
    x, weight = torch.randn(1, TOKENS - TEXT, 96), torch.randn(HEADS * 40, 96)
    o, o_weight = torch.randn(1, TOKENS - TEXT, HEADS * DIM + 8), torch.randn(50, HEADS * DIM + 8)
    rows = (1, TOKENS - TEXT)
    tiles = (HEADS, TOKENS, TEXT, 128)
    means = torch.randn(1, 3, HEADS, DIM), torch.randn(1, 5, HEADS, DIM)
    table = torch.randn(TOKENS, DIM)
    bits = torch.ones(20, dtype=torch.uint8)
    return {
        "sparse_attention": (
            *(q, torch.randn_like(q), torch.randn_like(q), s.cache, s.skip, None, None, torch.zeros_like(q)),
            *(torch.zeros(1, TOKENS, HEADS), None, None, None, None, None, 0.0, False, 128, 64),
        ),
        "gemm_q": (
            x,
            weight,
            torch.randn(HEADS * 40),
            s.cache,
            None,
            torch.zeros(*rows, HEADS * 40),
            *tiles,
            2,
        ),
        "gemm_o_update": (
            *([o, torch.randn(*rows, HEADS * DIM)], None, o_weight, torch.randn(50), s.cache, None),
            *(torch.zeros(*rows, 50), [torch.zeros(*rows, 50) for _ in range(2)], DIM, *tiles, True),
        ),
        "gemm_o_dispatch": (
            *(o[..., : HEADS * DIM], o[..., HEADS * DIM :], o_weight),
            *([torch.randn(*rows, 50) for _ in range(2)], torch.ones(2), s.cache, None),
            *(torch.zeros(*rows, 50), DIM, *tiles, True),
        ),
        "block_mean": (q, torch.zeros(1, 5, HEADS, DIM), torch.zeros(1, 5, HEADS), 64),
        "select_flashomni": (
            *(*means, s.cache, s.skip, torch.ones(1), torch.rand(means[1].shape[:3])),
            *(TOKENS, 0, TEXT, 0.5, 0.1, 0.0, 0.0, 0.5, 128, 64),
        ),
        "summarize_symbols": (
            *(s.cache, s.skip, torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(2, HEADS)),
            *(torch.zeros(1, dtype=torch.uint8), HEADS, TOKENS, TOKENS, 128, 64),
        ),
        "norm_rope": (
            *(q, torch.ones(DIM), table, table, s.cache, torch.randn_like(q), torch.ones(HEADS * DIM)),
            *(1e-6, 0, TOKENS, 128),
        ),
        "ada_layer_norm": (x, *torch.randn(2, 1, 96), torch.zeros_like(x), 1e-6),
        "norm_rope_mean": (
            *(q, torch.ones(DIM), table, table, torch.zeros(1, 5, HEADS, DIM), torch.zeros(1, 5, HEADS)),
            *(1e-6, 0, TOKENS, 64),
        ),
        "taylor_update": (
            *(torch.randn(3, 50), [torch.randn(3, 50) for _ in range(3)], [], torch.zeros(3, 50), 5.0, 1),
        ),
        "taylor_forecast": (
            *([torch.randn(1, 150, 50) for _ in range(3)], [], torch.ones(3)),
            *(torch.full((1, 1), 2, dtype=torch.uint8), None, torch.zeros(1, 150, 50), 1, 150, 0, 128, 1),
        ),
        "quantize_fp8": (torch.randn(3, 150), torch.zeros(3, 150, dtype=torch.uint8), torch.zeros(3, 2)),
        "packbits": (bits, True),
        "segment_packbits": (bits, torch.tensor([0, 9, 20], dtype=torch.int32), False),
        "layer": (TIMES.number, "x,factor=3", [1], [0], [torch.randn(3, 4)]),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    results = torch.library.opcheck(getattr(torch.ops.flashomni, name).default, samples()[name])
    assert set(results.values()) == {"SUCCESS"}, results


def test_every_operator_has_a_sample() -> None:
    defined = {name.removeprefix("flashomni::").split(".")[0] for name in _dispatch._torch_library._op_defs}
    assert defined == set(samples())


class Block(torch.nn.Module):
    """An attention block at an Update or a Dispatch, through every operator of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(96, HEADS * DIM)
        self.to_out = torch.nn.Linear(HEADS * DIM, 96)
        self.norm = torch.nn.Parameter(torch.ones(DIM))

    def project(self, x, s):
        q = flashomni.gemm_q(x, self.to_q.weight, self.to_q.bias, s)
        return q.unflatten(-1, (HEADS, DIM))

    def forward(self, x, cos, sin, s, previous, cached, coefficients):
        q = flashomni.norm_rope(self.project(x, None), self.norm, cos, sin)
        k, v = self.project(x.flip(1), None), self.project(x + 1, None)
        flashomni.select_flashomni(
            *(flashomni.block_mean(q, s.block_q), flashomni.block_mean(k, s.block_kv), s),
            text_start=0,
            text_length=TEXT,
            tau_q=0.5,
            tau_kv=0.1,
        )
        o, lse = flashomni.sparse_attention(q, k, v, s, return_lse=True)
        o = o.flatten(2)
        flashomni.taylor_update(o, previous, gap=5, valid=1)
        out, new = flashomni.gemm_o_update(
            *(o, self.to_out.weight, self.to_out.bias, s), head_dim=DIM, derivatives=previous[1:]
        )
        sparse = flashomni.sparse_attention(
            flashomni.gemm_q(x, self.to_q.weight, None, s).view(q.shape), k, v, s
        )
        later = flashomni.gemm_o_dispatch(
            sparse.flatten(2), self.to_out.weight, cached, coefficients, s, head_dim=DIM, keep_rows=True
        )
        return out, lse, new[1], later, flashomni.taylor_forecast(previous, coefficients)


def block_arguments() -> tuple:
    torch.manual_seed(1)
    table = torch.randn(TOKENS, DIM)
    return (
        *(
            torch.randn(1, TOKENS, 96),
            table,
            table.flip(0),
            SparseSymbols.ones(1, HEADS, TOKENS, TOKENS, 128, 64),
        ),
        [torch.randn(1, TOKENS, HEADS * DIM) for _ in range(2)],
        [torch.randn(1, TOKENS, 96) for _ in range(2)],
        torch.tensor([1.0, 2.0]),
    )


BACKENDS = ["eager", "aot_eager"] + (["inductor"] if shutil.which("c++") or shutil.which("g++") else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_has_no_break_and_agrees(backend: str) -> None:
    torch.manual_seed(0)
    block = Block()
    eager, compiled = block_arguments(), block_arguments()
    expected = block(*eager)
    torch._dynamo.reset()
    got = torch.compile(block, backend=backend, fullgraph=True)(*compiled)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    # Mutation is real in the compiled program too.
    assert torch.equal(compiled[3].cache, eager[3].cache) and torch.equal(compiled[3].skip, eager[3].skip)
    for mine, theirs in zip(compiled[4], eager[4], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_compiled_differences_in_e4m3_and_forecasts_of_rows() -> None:
    symbols = SparseSymbols.from_masks(torch.tensor([[[True, False]]]), None, q_tokens=200, kv_tokens=1)

    def step(x, values, scales, last, out):
        flashomni.taylor_update(x, values, gap=2.0, valid=2, scales=scales, last=last)
        return flashomni.taylor_forecast(values, torch.ones(2), out, scales, symbols, row_offset=20) + 1

    torch.manual_seed(0)
    x, kept = torch.randn(1, 180, 200), [flashomni.quantize_fp8(torch.randn(1, 180, 200)) for _ in range(2)]
    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        values, scales = ([part.clone() for part in parts] for parts in zip(*kept, strict=True))
        last = torch.zeros_like(x)
        results.append((function(x, values, scales, last, torch.zeros_like(x)), *values, *scales, last))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.float(), theirs.float())
    active = (results[0][0] == 1).all(-1)[0]
    assert bool(active[:108].all()) and not bool(active[108:].any())


def test_compile_with_other_lengths_needs_no_break() -> None:
    def attend(q, k, v, s):
        return flashomni.sparse_attention(q, k, v, s)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for tokens in (100, 130, 257):
        q, k, v = (torch.randn(1, tokens, HEADS, DIM) for _ in range(3))
        s = random_symbols(torch.Generator().manual_seed(tokens), 1, HEADS, tokens, tokens)
        assert torch.equal(compiled(q, k, v, s), attend(q, k, v, s))


def test_compiled_bits() -> None:
    x = torch.rand(50) < 0.5
    indptr = torch.tensor([0, 13, 50], dtype=torch.int32)
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(flashomni.packbits, fullgraph=True, backend="eager")(x), flashomni.packbits(x)
    )
    compiled = torch.compile(flashomni.segment_packbits, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(x, indptr), flashomni.segment_packbits(x, indptr), strict=True):
        assert torch.equal(mine, theirs)


def test_subclasses_go_through_torch() -> None:
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1, 100, 2, 64)
    mean = flashomni.block_mean(x.as_subclass(Logged), 64)
    assert any("flashomni.block_mean" in name for name in seen)
    assert torch.equal(mean.as_subclass(torch.Tensor), flashomni.block_mean(x, 64))


def test_fake_tensors_give_shapes_and_run_nothing() -> None:
    with FakeTensorMode() as mode:
        q = mode.from_tensor(torch.empty(1, TOKENS, HEADS, DIM))
        out, lse = flashomni.sparse_attention(q, q, q, return_lse=True)
        assert out.shape == q.shape and lse.shape == (1, TOKENS, HEADS)
        x = mode.from_tensor(torch.empty(2, 50, 96))
        assert flashomni.gemm_q(x, mode.from_tensor(torch.empty(40, 96))).shape == (2, 50, 40)
        assert flashomni.block_mean(q, 64).shape == (1, 5, HEADS, DIM)


def test_the_schemas_tell_what_is_written() -> None:
    writes = {
        "sparse_attention": {"out", "lse"},
        "gemm_q": {"out"},
        "gemm_o_update": {"out", "cached"},
        "gemm_o_dispatch": {"out"},
        "block_mean": {"out", "similarity"},
        "select_flashomni": {"cache", "skip"},
        "summarize_symbols": {"rows", "shares", "awake"},
        "norm_rope": {"x", "keys"},
        "norm_rope_mean": {"x", "mean", "similarity"},
        "ada_layer_norm": {"out"},
        "taylor_update": {"derivatives", "scales", "last"},
        "taylor_forecast": {"out"},
        "quantize_fp8": {"values", "scales"},
        "packbits": set(),
        "segment_packbits": set(),
        "layer": set(),
    }
    for name, written in writes.items():
        schema = getattr(torch.ops.flashomni, name).default._schema
        assert {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write} == written, name


def test_threads_have_workspaces_of_their_own() -> None:
    s = symbols()
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM) for _ in range(3))
    expected = flashomni.sparse_attention(q, k, v, s)
    wrong = []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(flashomni.sparse_attention(q, k, v, s), expected):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_workspace_is_kept() -> None:
    q = torch.randn(1, TOKENS, HEADS, DIM)
    flashomni.sparse_attention(q, q, q)
    kept = _dispatch._local.__dict__["cpu"].data_ptr()
    flashomni.sparse_attention(q, q, q)
    assert _dispatch._local.__dict__["cpu"].data_ptr() == kept


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_is_cheap() -> None:
    code = "import sys, flashomni; assert not {'torch', 'tvm_ffi', 'numpy'} & set(sys.modules)"
    run_python(code)
    run_python(f"{code}; flashomni.Config(); assert 'torch' not in sys.modules")
    run_python("import flashomni.ops, flashomni.symbols, sys; assert 'tvm_ffi' not in sys.modules")


def test_a_missing_library_says_how_to_build_it() -> None:
    code = """
import flashomni
import flashomni._native as native
flashomni.__path__ = ["nowhere"]
try:
    native.load()
except RuntimeError as error:
    print(error)
"""
    assert "make build" in run_python(code)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flashomni.nonsense  # noqa: B018
    assert "sparse_attention" in dir(flashomni)
