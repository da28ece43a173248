"""Wrong arguments: the right exception, naming the argument, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs import poison

import flashomni
from flashomni import SparseSymbols

TOKENS, HEADS, DIM = 200, 2, 64


def attention_arguments() -> dict[str, Any]:
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "out": poison(*q.shape, dtype=q.dtype),
        "lse": poison(1, TOKENS, HEADS, dtype=torch.float32),
    }


def gemm_q_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(1, 150, 32),
        "weight": torch.randn(HEADS * 8, 32),
        "bias": torch.randn(HEADS * 8),
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "row_offset": 50,
        "out": poison(1, 150, HEADS * 8, dtype=torch.float32),
    }


def gemm_o_update_arguments() -> dict[str, Any]:
    return {
        "o": torch.randn(1, 150, HEADS * DIM + 10),
        "weight": torch.randn(40, HEADS * DIM + 10),
        "bias": torch.randn(40),
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "head_dim": DIM,
        "row_offset": 50,
        "derivatives": [torch.randn(1, 150, HEADS * DIM)],
        "out": poison(1, 150, 40, dtype=torch.float32),
        "cached": [poison(1, 150, 40, dtype=torch.float32) for _ in range(2)],
    }


def gemm_o_dispatch_arguments() -> dict[str, Any]:
    arguments = gemm_o_update_arguments()
    del arguments["bias"], arguments["derivatives"]
    arguments["cached"] = [torch.randn(1, 150, 40) for _ in range(2)]
    return {**arguments, "coefficients": torch.ones(2)}


def select_arguments() -> dict[str, Any]:
    return {
        "q_mean": torch.randn(1, 2, HEADS, DIM),
        "k_mean": torch.randn(1, 2, HEADS, DIM),
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "text_start": 0,
        "text_length": 16,
        "tau_q": 0.5,
        "tau_kv": 0.5,
    }


def summarize_arguments() -> dict[str, Any]:
    return {
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "rows": torch.full((1, 1), 0xA5, dtype=torch.uint8),
        "shares": poison(2, HEADS, dtype=torch.float32),
        "awake": torch.full((1,), 0xA5, dtype=torch.uint8),
    }


def norm_rope_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(1, 150, HEADS, DIM),
        "weight": torch.ones(DIM),
        "cos": torch.ones(TOKENS, DIM),
        "sin": torch.ones(TOKENS, DIM),
        "symbols": SparseSymbols.ones(1, HEADS, TOKENS, TOKENS),
        "row_offset": 50,
        "keys": torch.randn(1, 150, 1, DIM),
        "keys_weight": torch.ones(DIM),
    }


def ada_layer_norm_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 30, 96),
        "scale": torch.randn(2, 96),
        "shift": torch.randn(2, 96),
        "out": poison(2, 30, 96, dtype=torch.float32),
    }


def norm_rope_mean_arguments() -> dict[str, Any]:
    arguments = norm_rope_arguments()
    del arguments["symbols"], arguments["keys"], arguments["keys_weight"]
    return arguments | {
        "mean": poison(1, 3, HEADS, DIM, dtype=torch.float32),
        "similarity": poison(1, 3, HEADS, dtype=torch.float32),
        "block": 64,
    }


def taylor_update_arguments() -> dict[str, Any]:
    return {
        "feature": torch.randn(3, 40),
        "derivatives": [poison(3, 40, dtype=torch.float32) for _ in range(2)],
        "last": poison(3, 40, dtype=torch.float32),
        "gap": 5,
        "valid": 0,
    }


def taylor_forecast_arguments() -> dict[str, Any]:
    return {
        "derivatives": [torch.randn(3, 40, 30) for _ in range(2)],
        "coefficients": torch.ones(2),
        "out": poison(3, 40, 30, dtype=torch.float32),
        "symbols": SparseSymbols.ones(3, 1, 90, 90),
        "row_offset": 50,
    }


def quantize_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(3, 200),
        "values": poison(3, 200, dtype=torch.float8_e4m3fn),
        "scales": poison(3, 2, dtype=torch.float32),
    }


def block_mean_arguments() -> dict[str, Any]:
    return {"x": torch.randn(1, TOKENS, HEADS, DIM), "block": 64}


OPERATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "sparse_attention": attention_arguments,
    "gemm_q": gemm_q_arguments,
    "gemm_o_update": gemm_o_update_arguments,
    "gemm_o_dispatch": gemm_o_dispatch_arguments,
    "select_flashomni": select_arguments,
    "summarize_symbols": summarize_arguments,
    "norm_rope": norm_rope_arguments,
    "norm_rope_mean": norm_rope_mean_arguments,
    "ada_layer_norm": ada_layer_norm_arguments,
    "taylor_update": taylor_update_arguments,
    "taylor_forecast": taylor_forecast_arguments,
    "quantize_fp8": quantize_arguments,
    "block_mean": block_mean_arguments,
}


def written(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Copies of everything an operator might write."""
    names = ("out", "lse", "x", "mean", "similarity", "values", "scales", "rows", "shares", "awake")
    tensors = [arguments.get(name) for name in names]
    tensors += [*arguments.get("cached", ()), *arguments.get("derivatives", ())]
    symbols = arguments.get("symbols")
    if isinstance(symbols, SparseSymbols):
        tensors += [symbols.cache, symbols.skip]
    return [
        tensor.clone()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
    ]


def wrong_bytes(part: str, size: int, batch: int = 1, heads: int = HEADS) -> SparseSymbols:
    """Symbols whose bits are `size` bytes too many: made so after the object's own check."""
    symbols = SparseSymbols.ones(batch, heads, TOKENS, TOKENS)
    bits = getattr(symbols, part)
    setattr(symbols, part, torch.ones(batch, bits.shape[1] + size, dtype=torch.uint8))
    return symbols


def without(part: str) -> SparseSymbols:
    return replace(SparseSymbols.ones(1, HEADS, TOKENS, TOKENS), **{part: None})


def ragged() -> SparseSymbols:
    symbols = SparseSymbols.ones(1, HEADS, TOKENS, TOKENS)
    ends = torch.tensor([0, symbols.cache_bytes], dtype=torch.int32)
    return replace(symbols, cache=symbols.cache[0], cache_indptr=ends)


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


ONES = SparseSymbols.ones
BAD = [
    # name, changes, exception, what the message must say
    ("sparse_attention", {"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ("sparse_attention", {"k": [1.0]}, TypeError, "k: expected a torch.Tensor, got list"),
    ("sparse_attention", {"symbols": ones(1, 1)}, TypeError, "symbols: expected SparseSymbols, got Tensor"),
    ("sparse_attention", {"q": ones(TOKENS, HEADS, DIM)}, ValueError, "^q: "),
    (
        "sparse_attention",
        {"q": ones(1, TOKENS, HEADS, DIM).double()},
        TypeError,
        "^q: .*float64|^q: .*64-bit",
    ),
    ("sparse_attention", {"k": ones(1, TOKENS, HEADS, DIM).half()}, TypeError, "^k: .*float32.*float16"),
    ("sparse_attention", {"v": ones(1, 7, HEADS, DIM)}, ValueError, "^v: "),
    (
        "sparse_attention",
        {"k": ones(1, TOKENS, 3, DIM), "v": ones(1, TOKENS, 3, DIM)},
        ValueError,
        "^k: .*divides",
    ),
    ("sparse_attention", {"q": ones(1, DIM, HEADS, TOKENS).transpose(1, 3)}, ValueError, "^q: .*stride"),
    ("sparse_attention", {"out": ones(1, TOKENS, HEADS, 2 * DIM)}, ValueError, "^out: "),
    ("sparse_attention", {"out": ones(1, 1, HEADS, DIM).expand(1, TOKENS, HEADS, DIM)}, ValueError, "^out: "),
    ("sparse_attention", {"lse": ones(1, TOKENS, HEADS).half()}, TypeError, "^lse: .*float32"),
    ("sparse_attention", {"q": ones(1, TOKENS, HEADS, DIM, device="meta")}, ValueError, "^q: .*meta"),
    ("sparse_attention", {"symbols": ONES(1, 3, TOKENS, TOKENS)}, ValueError, "symbols.heads: .*2.*3"),
    ("sparse_attention", {"symbols": ONES(2, HEADS, TOKENS, TOKENS)}, ValueError, "symbols.batch: .*1.*2"),
    (
        "sparse_attention",
        {"symbols": ONES(1, HEADS, 300, TOKENS)},
        ValueError,
        "symbols.q_tokens: .*200.*300",
    ),
    ("sparse_attention", {"symbols": ONES(1, HEADS, TOKENS, 90)}, ValueError, "symbols.kv_tokens: .*200.*90"),
    ("sparse_attention", {"symbols": wrong_bytes("cache", 1)}, ValueError, "symbols.cache: .*1.*2"),
    ("sparse_attention", {"symbols": wrong_bytes("skip", 3)}, ValueError, "symbols.skip: .*1.*4"),
    ("sparse_attention", {"symbols": ONES(1, HEADS, TOKENS, TOKENS, 64, 128)}, ValueError, "block"),
    ("sparse_attention", {"scale": float("nan")}, ValueError, "^scale: "),
    ("sparse_attention", {"scale": 0.0}, ValueError, "^scale: "),
    ("sparse_attention", {"k_mean": ones(1, 2, HEADS, DIM)}, TypeError, "^v_mean: "),
    ("sparse_attention", {"kv_block_len": ones(2)}, TypeError, "^kv_block_len: .*int32"),
    (
        "sparse_attention",
        {"kv_block_len": torch.tensor([128, 73], dtype=torch.int32)},
        ValueError,
        r"^kv_block_len\[1\]: expected 0 to 72, got 73",
    ),
    ("sparse_attention", {"q_indptr": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "^q: "),
    ("gemm_q", {"weight": ones(16, 32).to_sparse()}, ValueError, "^weight: .*sparse"),
    ("gemm_q", {"x": ones(150, 32)}, ValueError, r"^x: expected \[B, M, K\]"),
    ("gemm_q", {"weight": ones(16, 31)}, ValueError, "^weight: .*32"),
    ("gemm_q", {"weight": ones(17, 32), "bias": ones(17)}, ValueError, "^out: |^weight: "),
    ("gemm_q", {"weight": ones(15, 32), "bias": None, "out": None}, ValueError, "^weight: .*heads"),
    ("gemm_q", {"bias": ones(15)}, ValueError, "^bias: "),
    ("gemm_q", {"bias": ones(16).bfloat16()}, TypeError, "^bias: .*float32.*bfloat16"),
    ("gemm_q", {"row_offset": 51}, ValueError, "200"),
    ("gemm_q", {"row_offset": -1}, ValueError, "row_offset"),
    ("gemm_q", {"row_offset": 0.5}, TypeError, "^row_offset: "),
    ("gemm_q", {"heads": 4}, ValueError, "^heads: "),
    ("gemm_q", {"activation": "relu"}, ValueError, "^activation: .*'relu'"),
    ("gemm_q", {"symbols": wrong_bytes("cache", 1)}, ValueError, "symbols.cache: "),
    ("gemm_q", {"symbols": ONES(2, HEADS, TOKENS, TOKENS)}, ValueError, "symbols.batch: "),
    ("gemm_o_update", {"head_dim": 80}, ValueError, r"^o\[0\]: .*80"),
    ("gemm_o_update", {"head_dim": 0}, ValueError, "^head_dim: "),
    ("gemm_o_update", {"derivatives": [ones(1, 150, DIM)]}, ValueError, r"^o\[1\]: "),
    ("gemm_o_update", {"derivatives": [ones(1, 150, 128)] * 4}, ValueError, "^derivatives: expected 0 to 3"),
    ("gemm_o_update", {"derivatives": [3]}, TypeError, "^derivatives: "),
    ("gemm_o_update", {"cached": [ones(1, 150, 40)]}, ValueError, "^cached: expected 2 to 2"),
    ("gemm_o_update", {"cached": [ones(1, 150, 40), ones(1, 150, 41)]}, ValueError, r"^cached\[1\]: "),
    ("gemm_o_update", {"bias": ones(1, 40)}, ValueError, "^bias: "),
    ("gemm_o_update", {"past": ones(1, 150, 10)}, ValueError, "^weight: "),
    ("gemm_o_update", {"past": ones(1, 150, 0)}, ValueError, r"^o\[0\]: .*past"),
    ("gemm_o_update", {"past": ones(150, 10)}, ValueError, "^past: "),
    ("gemm_o_dispatch", {"past": ones(1, 149, 10)}, ValueError, "^past: "),
    ("gemm_o_dispatch", {"past": ones(1, 150, 10).half()}, TypeError, "^past: "),
    ("gemm_o_update", {"symbols": wrong_bytes("cache", 2)}, ValueError, "symbols.cache: "),
    ("gemm_o_dispatch", {"coefficients": ones(3)}, ValueError, "^coefficients: "),
    ("gemm_o_dispatch", {"coefficients": ones(2).double()}, TypeError, "^coefficients: "),
    (
        "gemm_o_dispatch",
        {"coefficients": [1.0, 2.0]},
        TypeError,
        "^coefficients: expected a torch.Tensor, got list",
    ),
    ("gemm_o_dispatch", {"cached": []}, ValueError, "^cached: expected 1 to 4"),
    ("gemm_o_dispatch", {"cached": [ones(1, 150, 40), ones(1, 149, 40)]}, ValueError, r"^cached\[1\]: "),
    ("gemm_o_dispatch", {"weight": ones(40, 100)}, ValueError, "^weight: "),
    ("gemm_o_update", {"keep_rows": 1}, TypeError, "^keep_rows: expected True or False, got 1"),
    ("gemm_o_dispatch", {"keep_rows": 1}, TypeError, "^keep_rows: expected True or False, got 1"),
    ("gemm_o_dispatch", {"out": ones(1, 150, 41)}, ValueError, "^out: "),
    ("select_flashomni", {"symbols": None}, TypeError, "^symbols: "),
    ("select_flashomni", {"q_mean": ones(1, 2, HEADS, DIM).half()}, TypeError, "^q_mean: "),
    ("select_flashomni", {"k_mean": ones(1, 3, HEADS, DIM)}, ValueError, "^k_mean: "),
    ("select_flashomni", {"tau_q": 1.5}, ValueError, "^tau_q: "),
    ("select_flashomni", {"tau_kv": float("nan")}, ValueError, "^tau_kv: "),
    ("select_flashomni", {"s_q": -0.1}, ValueError, "^s_q: "),
    ("select_flashomni", {"text_length": 201}, ValueError, "^text_length: "),
    ("select_flashomni", {"text_start": -1}, ValueError, "^text_start: "),
    ("select_flashomni", {"symbols": ONES(1, HEADS, TOKENS, 100)}, ValueError, "symbols.kv_tokens: "),
    ("summarize_symbols", {"symbols": ones(1, 1)}, TypeError, "^symbols: expected SparseSymbols"),
    ("summarize_symbols", {"symbols": without("cache")}, ValueError, "^symbols: .*both.*None"),
    ("summarize_symbols", {"symbols": without("skip")}, ValueError, "^symbols: .*both.*None"),
    ("summarize_symbols", {"symbols": ragged()}, ValueError, "^symbols: .*indptr.*ragged"),
    ("summarize_symbols", {"symbols": wrong_bytes("cache", 1)}, ValueError, "^symbols.cache: "),
    ("summarize_symbols", {"symbols": wrong_bytes("skip", 2)}, ValueError, "^symbols.skip: "),
    ("summarize_symbols", {"symbols": ONES(1, HEADS, 0, 0)}, ValueError, "^q_tokens: .*1.*0"),
    ("summarize_symbols", {"symbols": ONES(1, HEADS, TOKENS, TOKENS, 32, 32)}, ValueError, "block_q: "),
    ("summarize_symbols", {"rows": None}, TypeError, "^rows: expected a torch.Tensor"),
    ("summarize_symbols", {"rows": ones(1, 2, dtype=torch.uint8)}, ValueError, "^rows: "),
    ("summarize_symbols", {"rows": ones(1, 1, dtype=torch.bool)}, TypeError, "^rows: .*uint8.*bool|^rows: "),
    ("summarize_symbols", {"shares": ones(2, HEADS + 1)}, ValueError, "^shares: "),
    ("summarize_symbols", {"shares": ones(2, HEADS).double()}, TypeError, "^shares: .*float32.*float64"),
    ("summarize_symbols", {"awake": ones(2, dtype=torch.uint8)}, ValueError, "^awake: "),
    ("summarize_symbols", {"awake": ones(1)}, TypeError, "^awake: .*uint8.*float32"),
    ("norm_rope", {"x": ones(150, HEADS, DIM)}, ValueError, "^x: "),
    ("norm_rope", {"weight": ones(DIM + 1)}, ValueError, "^weight: "),
    ("norm_rope", {"weight": ones(DIM).half()}, TypeError, "^weight: "),
    ("norm_rope", {"weight": ones(2 * HEADS * DIM)}, ValueError, r"^weight: .*\[64\].*\[128\].*256"),
    ("norm_rope", {"keys": ones(1, 149, 1, DIM)}, ValueError, "^keys: "),
    ("norm_rope", {"keys": ones(1, 150, 1, DIM).half()}, TypeError, "^keys: "),
    ("norm_rope", {"keys": ones(150, 1, DIM)}, ValueError, "^keys: "),
    ("norm_rope", {"keys": None}, TypeError, "^keys: .*keys_weight"),
    ("norm_rope", {"keys_weight": ones(HEADS * DIM)}, ValueError, "^keys_weight: "),
    ("norm_rope", {"keys_weight": ones(DIM).half()}, TypeError, "^keys_weight: "),
    ("norm_rope", {"cos": None}, TypeError, "^cos: "),
    ("norm_rope", {"cos": ones(TOKENS - 1, DIM)}, ValueError, "^cos: "),
    ("norm_rope", {"sin": ones(TOKENS, DIM).double()}, TypeError, "^sin: "),
    ("norm_rope", {"row_offset": 51}, ValueError, "200"),
    ("norm_rope", {"eps": -1.0}, ValueError, "^eps: "),
    ("norm_rope", {"symbols": ONES(1, 3, TOKENS, TOKENS)}, ValueError, "symbols.heads: "),
    ("taylor_update", {"derivatives": []}, ValueError, "^derivatives: expected 1 to 4"),
    ("taylor_update", {"derivatives": ones(2, 3)}, TypeError, "^derivatives: expected a list"),
    ("taylor_update", {"derivatives": [ones(3, 40), ones(3, 41)]}, ValueError, r"^derivatives\[1\]: "),
    ("taylor_update", {"gap": 0, "valid": 1}, ValueError, "^gap: "),
    ("taylor_update", {"valid": 3}, ValueError, "^valid: expected 0 to 2, got 3"),
    ("taylor_update", {"valid": 2, "last": None}, ValueError, "^valid: expected 0 to 1, got 2"),
    ("taylor_update", {"last": ones(3, 41)}, ValueError, "^last: "),
    ("taylor_update", {"last": ones(3, 40).half()}, TypeError, "^last: .*float32.*float16"),
    ("taylor_update", {"last": ones(40, 3).T}, ValueError, "^last: "),
    ("taylor_update", {"last": ones(3, 40).to("meta")}, ValueError, "^last: .*meta"),
    ("taylor_update", {"last": 1.0}, TypeError, "^last: expected a torch.Tensor, got float"),
    ("taylor_update", {"scales": [ones(3, 1)]}, ValueError, "^scales: expected 2 to 2"),
    ("taylor_update", {"scales": [ones(3, 1)] * 2}, TypeError, "^derivatives: expected float8_e4m3fn"),
    ("taylor_forecast", {"coefficients": ones(1)}, ValueError, "^coefficients: "),
    ("taylor_forecast", {"derivatives": [ones(3, 40)]}, ValueError, r"^derivatives: expected \[B, M, N\]"),
    ("taylor_forecast", {"symbols": ones(3)}, TypeError, "^symbols: expected SparseSymbols"),
    ("taylor_forecast", {"rows": "all"}, ValueError, '^rows: expected "cached" or "active", got '),
    ("taylor_forecast", {"row_offset": -1}, ValueError, "^row_offset: expected at least 0, got -1"),
    ("taylor_forecast", {"row_offset": 1.5}, TypeError, "^row_offset: expected an integer"),
    ("taylor_forecast", {"symbols": None, "row_offset": -1}, ValueError, "^row_offset: expected at least 0"),
    ("taylor_forecast", {"row_offset": 51}, ValueError, "^row_offset: .*90"),
    ("taylor_forecast", {"symbols": ONES(2, 2, 90, 90)}, ValueError, "^symbols.heads: expected 1 .*, got 2"),
    ("taylor_forecast", {"symbols": ONES(1, 1, 90, 90)}, ValueError, "^symbols.batch: expected 3 .*, got 1"),
    ("taylor_forecast", {"symbols": ONES(3, 1, 89, 89)}, ValueError, "^row_offset: .*89"),
    ("taylor_forecast", {"symbols": wrong_bytes("cache", 1, 3, 1)}, ValueError, "^symbols.cache: .*1.*2"),
    ("taylor_forecast", {"out": ones(3, 40, 29)}, ValueError, "^out: "),
    ("quantize_fp8", {"x": ones(3, 201)}, ValueError, "^values: "),
    ("quantize_fp8", {"x": ones(3, 200).int()}, TypeError, "^x: "),
    ("quantize_fp8", {"values": ones(3, 200)}, TypeError, "^values: expected float8_e4m3fn"),
    ("quantize_fp8", {"scales": ones(3, 1)}, ValueError, "^scales: "),
    ("taylor_forecast", {"scales": [ones(3, 1)]}, ValueError, "^scales: expected 2 to 2"),
    ("taylor_forecast", {"scales": [ones(3, 1)] * 2}, TypeError, "^derivatives: expected float8_e4m3fn"),
    ("ada_layer_norm", {"x": ones(30, 96)}, ValueError, "^x: "),
    ("ada_layer_norm", {"x": ones(2, 30, 96).int()}, TypeError, "^x: "),
    ("ada_layer_norm", {"scale": ones(2, 95)}, ValueError, "^scale: "),
    ("ada_layer_norm", {"scale": ones(2, 96).half()}, TypeError, "^scale: "),
    ("ada_layer_norm", {"shift": ones(1, 96)}, ValueError, "^shift: "),
    ("ada_layer_norm", {"shift": None}, TypeError, "^shift: "),
    ("ada_layer_norm", {"out": ones(2, 29, 96)}, ValueError, "^out: "),
    ("ada_layer_norm", {"eps": -1.0}, ValueError, "^eps: "),
    ("norm_rope_mean", {"mean": ones(1, 2, HEADS, DIM)}, ValueError, "^mean: "),
    ("norm_rope_mean", {"mean": None}, TypeError, "^mean: "),
    ("norm_rope_mean", {"similarity": ones(1, 3, HEADS).half()}, TypeError, "^similarity: "),
    ("norm_rope_mean", {"block": 32}, ValueError, "^block: "),
    ("norm_rope_mean", {"weight": ones(HEADS * DIM)}, NotImplementedError, "^weight: .*each head"),
    ("norm_rope_mean", {"sin": ones(TOKENS - 1, DIM)}, ValueError, "^sin: "),
    ("norm_rope_mean", {"row_offset": 51}, ValueError, "200"),
    ("select_flashomni", {"k_similarity": ones(1, 3, HEADS)}, ValueError, "^k_similarity: "),
    ("select_flashomni", {"self_similarity": 1.5}, ValueError, "^self_similarity: "),
    ("block_mean", {"similarity": ones(1, 3, HEADS)}, ValueError, "^similarity: "),
    ("block_mean", {"x": ones(TOKENS, HEADS, DIM)}, ValueError, "^x: "),
    ("block_mean", {"x": ones(1, TOKENS, HEADS, DIM).int()}, TypeError, "^x: "),
    ("block_mean", {"block": 100}, ValueError, "^block: "),
    ("block_mean", {"block": 64.0}, TypeError, "^block: "),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), BAD)
def test_a_wrong_argument_is_named_and_nothing_is_written(name, changes, error, message) -> None:
    arguments = {**OPERATORS[name](), **changes}
    before = written(arguments)
    with pytest.raises(error, match=message):
        getattr(flashomni, name)(**arguments)
    for then, now in zip(before, written(arguments), strict=True):
        assert torch.equal(then.view(torch.uint8), now.view(torch.uint8))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_right_arguments_are_taken(name: str) -> None:
    getattr(flashomni, name)(**OPERATORS[name]())


def tensors_of(name: str) -> list[str]:
    return [key for key, value in OPERATORS[name]().items() if isinstance(value, torch.Tensor)]


EVERY_TENSOR = [(name, key) for name in OPERATORS for key in tensors_of(name)]


@pytest.mark.parametrize(("name", "key"), EVERY_TENSOR)
def test_tensors_that_require_grad_are_refused_while_grad_is_on(name: str, key: str) -> None:
    arguments = OPERATORS[name]()
    if not arguments[key].is_floating_point():
        pytest.skip("integers cannot require grad")
    arguments[key] = arguments[key].clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match=f"^{key}: .*require grad"):
        getattr(flashomni, name)(**arguments)
    with torch.no_grad():
        getattr(flashomni, name)(**arguments)


@pytest.mark.parametrize(("name", "key"), EVERY_TENSOR)
def test_lazily_negated_views_are_refused(name: str, key: str) -> None:
    arguments = OPERATORS[name]()
    tensor = arguments[key]
    negated = torch.complex(torch.zeros(()), torch.ones(())).expand(tensor.shape).clone().conj().imag
    if tensor.dtype != torch.float32:
        pytest.skip("only float tensors come out of complex ones")
    assert negated.is_neg()
    arguments[key] = negated
    with pytest.raises(ValueError, match=f"^{key}: .*negated"):
        getattr(flashomni, name)(**arguments)


WITHOUT_PLAIN_MEMORY = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "conjugated": lambda tensor: tensor.to(torch.complex64).conj(),
}


@pytest.mark.parametrize("kind", WITHOUT_PLAIN_MEMORY)
@pytest.mark.parametrize(("name", "key"), EVERY_TENSOR)
def test_tensors_without_plain_memory_are_refused(name: str, key: str, kind: str) -> None:
    arguments = OPERATORS[name]()
    tensor = arguments[key]
    if tensor.dtype != torch.float32:
        pytest.skip("quantised values and bits are known by their type")
    arguments[key] = WITHOUT_PLAIN_MEMORY[kind](tensor)
    before = written(arguments | {key: None})
    with pytest.raises(ValueError, match=f"^{key}: expected a tensor with plain memory, .*{kind}"):
        getattr(flashomni, name)(**arguments)
    for then, now in zip(before, written(arguments | {key: None}), strict=True):
        assert torch.equal(then.view(torch.uint8), now.view(torch.uint8))


@pytest.mark.parametrize(("name", "key"), EVERY_TENSOR)
def test_arrays_are_no_tensors(name: str, key: str) -> None:
    arguments = OPERATORS[name]()
    arguments[key] = torch.zeros(arguments[key].shape).numpy()
    with pytest.raises(TypeError, match=f"^{key}: expected a torch.Tensor, got ndarray"):
        getattr(flashomni, name)(**arguments)


def test_inference_mode_is_fine() -> None:
    with torch.inference_mode():
        for name, make in OPERATORS.items():
            getattr(flashomni, name)(**make())


def test_tensors_without_memory_are_refused() -> None:
    q = torch.randn(1, TOKENS, HEADS, DIM)
    q.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="memory|storage"):
        flashomni.block_mean(q, 64)


def test_a_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = block_mean_arguments()
    monkeypatch.setenv("FLASHOMNI_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FLASHOMNI_BACKEND.*nonsense"):
        flashomni.block_mean(**arguments)
