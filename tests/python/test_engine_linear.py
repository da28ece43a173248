"""Dense linear layers as torch does them for the engine on a GPU: here the same calls on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from flashomni import SparseSymbols, ops
from flashomni.engine.linear import (
    FloatNorm,
    LinearRows,
    add_product,
    dense_linear,
    linear_tiles,
    norm_and_rope,
    norm_and_rope_pair,
    norm_weight,
    weight_and_bias,
    why_no_norm,
    why_not_plain,
)

GELU = {"gelu_tanh": "tanh", "gelu": "none"}


def want(x, weight, bias, activation) -> torch.Tensor:
    y = nn.functional.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    return nn.functional.gelu(y, approximate=GELU[activation]) if activation is not None else y


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("joint", [True, False], ids=["rows of a joint buffer", "contiguous"])
def test_dense_layers_are_linear(activation: str | None, has_bias: bool, joint: bool) -> None:
    rows, around = slice(5, 42), torch.full((2, 60, 96), 7.0)
    x = torch.randn(2, 37, 64) * 2  # the two forms of GELU differ by 5e-4 there
    weight, bias = torch.randn(96, 64) / 4, torch.randn(96)
    bias = bias if has_bias else None
    if joint:
        x = torch.cat([x, x[:, :9]], dim=1)[:, :37]
    out = around[:, rows] if joint else torch.full((2, 37, 96), float("nan"))
    assert x.is_contiguous() == out.is_contiguous() == (not joint)
    dense_linear(x, weight, bias, activation, out)
    torch.testing.assert_close(out.double(), want(x, weight, bias, activation), atol=5e-5, rtol=0)
    if joint:
        around[:, rows] = 7.0
        assert (around == 7.0).all(), "other rows stay as they were"


def test_modes_may_alternate() -> None:
    x, weight, out = torch.randn(1, 8, 16), torch.randn(4, 16), torch.zeros(1, 8, 4)
    with torch.inference_mode():
        dense_linear(x.clone(), weight, None, "gelu", out)
    first = out.clone()
    dense_linear(x, weight, None, "gelu", out)
    assert torch.equal(out, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_gpu_does_dense_layers_by_torch(
    dtype: torch.dtype, activation: str | None, has_bias: bool, monkeypatch
) -> None:
    monkeypatch.setattr("flashomni.ops.gemm_q", None)
    x = torch.randn(2, 300, 256, device="cuda", dtype=dtype)
    weight = torch.randn(512, 256, device="cuda", dtype=dtype) / 16
    bias = torch.randn(512, device="cuda", dtype=dtype) if has_bias else None
    rows = torch.zeros(2, 400, 512, device="cuda", dtype=dtype)[:, 70:370]
    for out in (None, rows):
        found = linear_tiles(x, weight, bias, activation=activation, out=out)
        torch.testing.assert_close(found.double(), want(x, weight, bias, activation), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("joint", [True, False], ids=["rows of a joint buffer", "contiguous"])
def test_products_are_added(joint: bool) -> None:
    x, weight = torch.randn(2, 37, 64), torch.randn(96, 80)[:, 16:]
    out = torch.randn(2, 60, 96)[:, 5:42] if joint else torch.randn(2, 37, 96)
    before = out.double()
    add_product(x, weight, out)
    torch.testing.assert_close(out.double(), before + x.double() @ weight.double().t(), atol=5e-5, rtol=0)


def test_on_a_cpu_the_operator_does_dense_layers(monkeypatch) -> None:
    monkeypatch.setattr(torch, "mm", None)
    monkeypatch.setattr(torch, "addmm", None)
    x, weight, out = torch.randn(1, 8, 16), torch.randn(4, 16), torch.zeros(1, 8, 4)
    assert linear_tiles(x, weight, None, out=out) is out
    torch.testing.assert_close(out, x @ weight.t())


def test_a_plain_layer_gives_what_its_attributes_are() -> None:
    for module in (nn.Linear(8, 4), nn.Linear(8, 4, bias=False), LinearRows(nn.Linear(8, 6), 1, 5)):
        assert why_not_plain(module, torch.float32) is None
        weight, bias = weight_and_bias(module)
        assert torch.equal(weight, module.weight)
        assert bias is module.bias if module.bias is None else torch.equal(bias, module.bias)
    norm = nn.RMSNorm(8, eps=1e-3)
    assert why_no_norm(norm, torch.float32) is None
    weight, eps = norm_weight(norm, torch.randn(1, 3, 2, 8))
    assert weight is norm.weight and eps == 1e-3


def rms(x: torch.Tensor, norm: nn.Module, across_heads: bool) -> torch.Tensor:
    """In float64 and by hand: x [B, M, H, D]."""
    rows = x.double().flatten(2) if across_heads else x.double()
    rows = rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    return rows.view(x.shape)


@pytest.mark.parametrize("hooked", [False, True])
def test_norms_that_are_given_float32(hooked: bool) -> None:
    """An eps that they leave open is float32's: bfloat16's is as large as the squares of these queries."""
    norm, x = nn.RMSNorm(64), (torch.randn(2, 5, 3, 64) / 16).bfloat16()
    nn.init.uniform_(norm.weight, 1.0, 2.0)
    norm = norm.bfloat16()
    if hooked:
        norm.register_forward_hook(lambda module, args, out: None)
    want = nn.functional.normalize(x.double(), dim=-1) * 8 * norm.weight.double()
    with torch.no_grad():
        norm_and_rope(FloatNorm(norm), x, None)
    torch.testing.assert_close(x.double(), want, rtol=2**-7, atol=1e-3)
    assert (why_no_norm(FloatNorm(norm), x.dtype) is not None) == hooked


def random_norm(width: int, eps: float) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, eps=eps)
    nn.init.normal_(norm.weight)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("eps, launches", [((1e-2, 1e-2), 1), ((1e-2, 1e-1), 2)])
@pytest.mark.parametrize("rope", ["tables", "function", None])
def test_norms_of_queries_and_keys(monkeypatch, across_heads, eps, launches, rope) -> None:
    """In one launch, unless each has an eps of its own."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 70, 3, 64), torch.randn(2, 70, 3, 64)
    norms = tuple(random_norm(192 if across_heads else 64, e) for e in eps)
    cache = torch.ones(2, 3, 2, dtype=torch.bool)
    cache[:, 1, 1] = False
    sizes = {"q_tokens": 80, "kv_tokens": 80, "block_q": 64, "block_kv": 64}
    symbols = SparseSymbols.from_masks(cache, None, **sizes)
    cos, sin = torch.full((80, 64), 0.0), torch.full((80, 64), 1.0)  # a quarter turn

    def turn(x: torch.Tensor, first_row: int = 10) -> torch.Tensor:
        assert first_row == 10
        pairs = x.unflatten(-1, (-1, 2))
        return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)

    form = {"tables": (cos, sin), "function": lambda x, row: x.copy_(turn(x, row)), None: None}[rope]
    wanted = [rms(x, norm, across_heads) for x, norm in zip((q, k), norms, strict=True)]
    calls, norm_rope = [], ops.norm_rope
    monkeypatch.setattr(ops, "norm_rope", lambda *a, **o: (calls.append(1), norm_rope(*a, **o))[1])
    got = q.clone(), k.clone()
    norm_and_rope_pair(norms, *got, form, symbols, row_offset=10, across_heads=across_heads)
    assert len(calls) == launches
    active = cache[:, :, (torch.arange(70) + 10) // 64].transpose(1, 2)
    for x, before, want, mask in zip(got, (q, k), wanted, (active, torch.ones_like(active)), strict=True):
        want = turn(want) if rope is not None else want
        torch.testing.assert_close(x[mask].double(), want[mask], atol=1e-5, rtol=1e-5)
        left = turn(before) if rope == "function" else before  # a function knows no tiles
        assert torch.equal(x[~mask], left[~mask])


def test_other_norms_are_called(monkeypatch) -> None:
    """On all rows, with heads side by side where they are over all of them; our part is the rotation."""
    torch.manual_seed(2)
    monkeypatch.setattr(ops, "norm_rope", None)
    q, k = torch.randn(1, 9, 3, 64), torch.randn(1, 9, 3, 64)
    layer, hooked = nn.LayerNorm(192), random_norm(192, 1e-3)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    assert "not an RMSNorm" in why_no_norm(layer, q.dtype) and "hooks" in why_no_norm(hooked, q.dtype)
    wanted = layer(q.flatten(2)).view_as(q), 2 * rms(k, hooked, True).float()
    with torch.no_grad():
        norm_and_rope_pair((layer, hooked), q, k, None, across_heads=True)
    torch.testing.assert_close((q, k), wanted)


@pytest.mark.parametrize("width, across_heads", [(64, True), (192, False)])
def test_a_norm_of_another_width_is_no_other_norm(width: int, across_heads: bool) -> None:
    """norm_rope tells norms over a head from those over all by the weight alone."""
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm_and_rope(random_norm(width, 1e-3), torch.randn(1, 9, 3, 64), None, across_heads=across_heads)


def test_layers_whose_weight_is_made_anew_are_not_plain() -> None:
    linear = parametrizations.weight_norm(nn.Linear(8, 4))
    assert "not torch.nn.Linear" in why_not_plain(linear, torch.float32)
    linear = nn.Linear(8, 4)
    prune.random_unstructured(linear, "weight", 0.5)  # an attribute that a hook writes at each call
    assert "no plain tensor" in why_not_plain(linear, torch.float32)
    assert "no plain tensor" in why_not_plain(nn.Linear(8, 4, device="meta"), torch.float32)
    norm = nn.RMSNorm(8)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert "not an RMSNorm" in why_no_norm(norm, torch.float32)


@pytest.mark.parametrize("kind", ["parameter", "tensor", "buffer"])
def test_a_norm_with_a_bias_is_not_done(kind: str) -> None:
    norm, bias = nn.RMSNorm(8), torch.ones(8)
    if kind == "buffer":
        norm.register_buffer("bias", bias)
    else:
        norm.bias = nn.Parameter(bias) if kind == "parameter" else bias
    assert "bias" in why_no_norm(norm, torch.float32)
