"""Which of a model's modules the operators may stand in for, and how the others are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashomni import ops
from flashomni.symbols import SparseSymbols

# How queries and keys are rotated: (cos, sin), float32 [tokens, D], or a function of x and its first row.
Rope = tuple[Tensor, Tensor] | Callable[[Tensor, int], None] | None

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}  # gemm_q's names of activations, by torch's


def _attribute(module: nn.Module, name: str) -> object:
    """getattr(module, name, None) past nn.Module's own search, which is slow, and slower where it fails."""
    for place in (module._parameters, module.__dict__, module._buffers):
        if name in place:
            return place[name]
    return None


def untouched(module: nn.Module) -> bool:
    """Whether calling it does what its class does."""
    return "forward" not in module.__dict__ and not (module._forward_hooks or module._forward_pre_hooks)


@dataclass(frozen=True)
class LinearRows:
    """Output features start .. stop of a linear layer that makes several things in one product."""

    module: nn.Module
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        return self.module.weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias[self.start : self.stop] if bias is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)[..., self.start : self.stop]


def why_not_plain(module: nn.Module | LinearRows, dtype: torch.dtype) -> str | None:
    """None if `module` is torch's own linear layer with a real weight of `dtype`; else what it is instead."""
    if isinstance(module, LinearRows):
        module = module.module
    if type(module) is not nn.Linear:
        return f"is {type(module).__name__}, not torch.nn.Linear"
    weight = _attribute(module, "weight")
    if type(weight) is not nn.Parameter or weight.is_meta:
        return "has a weight that is no plain tensor in memory"
    if not untouched(module):
        return "has hooks on its forward"
    if weight.dtype != dtype:
        return f"has a weight of {weight.dtype}, not {dtype}"
    return None


def weight_and_bias(module: nn.Linear | LinearRows) -> tuple[Tensor, Tensor | None]:
    """Those of a plain linear layer."""
    if isinstance(module, LinearRows):
        return module.weight, module.bias
    return _attribute(module, "weight"), _attribute(module, "bias")


def linear_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: SparseSymbols | None = None,
    *,
    row_offset: int = 0,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """ops.gemm_q; on a GPU, where all tiles are active, torch's own product: nothing is as fast as cuBLAS.

    x [B, M, K]; out [B, M, N], of which cached tiles stay as they were (None: a new tensor). Returns out.
    """
    if symbols is not None or not x.is_cuda:
        return ops.gemm_q(x, weight, bias, symbols, row_offset=row_offset, activation=activation, out=out)
    if out is None:
        out = x.new_empty((*x.shape[:2], weight.shape[0]))
    dense_linear(x, weight, bias, activation, out)
    return out


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None:
    """out [B, M, N] = activation(x [B, M, K] weight^T + bias) by torch, without a tensor in between."""
    for rows, into in _matrices(x, out):
        if bias is None:
            torch.mm(rows, weight.t(), out=into)
        elif activation == "gelu_tanh" and x.is_cuda:  # its GELU is the tanh form there, and only there
            torch.ops.aten._addmm_activation.out(bias, rows, weight.t(), use_gelu=True, out=into)
            continue
        else:
            torch.addmm(bias, rows, weight.t(), out=into)
        if activation is not None:
            torch.ops.aten.gelu_(into, approximate=_APPROXIMATE[activation])


def add_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [B, M, N] += x [B, M, K] weight^T by torch."""
    for rows, into in _matrices(x, out):
        into.addmm_(rows, weight.t())


def _matrices(x: Tensor, out: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The rows of both, of all batch elements at once where they lie one after the other."""
    if x.is_contiguous() and out.is_contiguous():
        return [(x.flatten(0, 1), out.flatten(0, 1))]
    return zip(x, out, strict=True)


def apply_linear(
    module: nn.Module | LinearRows | Callable[[Tensor], Tensor],
    x: Tensor,
    out: Tensor,
    symbols: SparseSymbols | None = None,
    *,
    row_offset: int = 0,
    activation: str | None = None,
) -> None:
    """out = activation(module(x)) on the active tiles; on all of them where the module has to be called.

    x [B, M, K], out [B, M, N].
    """
    if why_not_plain(module, x.dtype) is None:
        weight, bias = weight_and_bias(module)
        linear_tiles(x, weight, bias, symbols, row_offset=row_offset, activation=activation, out=out)
        return
    y = module(x)
    if activation is not None:
        y = nn.functional.gelu(y, approximate=_APPROXIMATE[activation])
    out.copy_(y)


@dataclass(frozen=True)
class FloatNorm:
    """A norm that is given float32 whatever the model's type; its result is rounded to that."""

    module: nn.Module

    @property
    def eps(self) -> float:
        eps = self.module.eps
        return eps if eps is not None else torch.finfo(torch.float32).eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x.float()).to(x.dtype)


Norm = nn.Module | FloatNorm


def _module_of(norm: Norm | None) -> nn.Module | None:
    return norm.module if isinstance(norm, FloatNorm) else norm


def why_no_norm(norm: Norm | None, dtype: torch.dtype) -> str | None:
    """None if norm_rope can do `norm` (an RMS norm over one head or all, or no norm); else why not."""
    module = _module_of(norm)
    if module is None:
        return None
    if type(module).__name__ != "RMSNorm" or not type(module).__module__.startswith(
        ("torch.nn.", "diffusers.")
    ):
        return f"is {type(module).__name__}, not an RMSNorm"
    weight = _attribute(module, "weight")
    if weight is None or _attribute(module, "bias") is not None:
        return "has no weight, or a bias"
    if weight.dtype != dtype or type(weight) is not nn.Parameter or weight.is_meta:
        return f"has a weight that is no plain {dtype} tensor in memory"
    return None if untouched(module) else "has hooks on its forward"


def norm_weight(norm: Norm | None, x: Tensor, *, across_heads: bool = False) -> tuple[Tensor | None, float]:
    """Weight and eps of a norm that norm_rope can do; (None, 1e-6) without one.

    Other modules are called on x [B, M, H, D], in place: across_heads, as [B, M, H * D]."""
    if norm is None:
        return None, 1e-6
    weight = _attribute(_module_of(norm), "weight")
    width = x.shape[2] * x.shape[3] if across_heads else x.shape[3]
    if why_no_norm(norm, x.dtype) is not None or weight.shape != (width,):  # which the module then says
        x.copy_(norm(x.flatten(2)).unflatten(2, x.shape[2:]) if across_heads else norm(x))
        return None, 1e-6
    return weight, norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps


def norm_and_rope(
    norm: Norm | None,
    x: Tensor,
    rope: Rope,
    symbols: SparseSymbols | None = None,
    *,
    row_offset: int = 0,
    across_heads: bool = False,
) -> None:
    """x = rope(norm(x)) in place on active tiles. x [B, M, H, D]; across_heads: the norm is over all H."""
    cos, sin = rope if isinstance(rope, tuple) else (None, None)
    weight, eps = norm_weight(norm, x, across_heads=across_heads)
    if weight is not None or cos is not None:
        ops.norm_rope(x, weight, cos, sin, eps=eps, symbols=symbols, row_offset=row_offset)
    if callable(rope):
        rope(x, row_offset)


def norm_and_rope_pair(
    norms: tuple[Norm | None, Norm | None],
    q: Tensor,
    k: Tensor,
    rope: Rope,
    symbols: SparseSymbols | None = None,
    *,
    row_offset: int = 0,
    across_heads: bool = False,
) -> None:
    """norm_and_rope of q on active tiles and of the same tokens' k on all: where eps agree, in one launch."""
    norm_q, norm_k = norms
    options = {"row_offset": row_offset, "across_heads": across_heads}
    if getattr(norm_q, "eps", None) != getattr(norm_k, "eps", None):
        norm_and_rope(norm_q, q, rope, symbols, **options)
        norm_and_rope(norm_k, k, rope, **options)
        return
    cos, sin = rope if isinstance(rope, tuple) else (None, None)
    weight, eps = norm_weight(norm_q, q, across_heads=across_heads)
    k_weight, k_eps = norm_weight(norm_k, k, across_heads=across_heads)
    if weight is not None or k_weight is not None or cos is not None:
        eps = k_eps if weight is None else eps
        options = {"eps": eps, "symbols": symbols, "row_offset": row_offset}
        ops.norm_rope(q, weight, cos, sin, keys=k, keys_weight=k_weight, **options)
    if callable(rope):
        rope(q, row_offset)
        rope(k, row_offset)
