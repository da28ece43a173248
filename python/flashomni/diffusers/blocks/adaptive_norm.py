"""diffusers' adaptive norms (adaLN-Zero) by ada_layer_norm, which reads and writes once."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import Tensor, nn

from flashomni import ops
from flashomni.engine import Engine, untouched

# (module, temb) -> what it splits into shift, scale and gate.
Modulation = Callable[[nn.Module, Tensor], Tensor]

_MODULATIONS: dict[str, Modulation] = {  # by the module's class
    "AdaLayerNormZeroSingle": lambda norm, temb: norm.linear(norm.silu(temb)),
    "ChromaAdaLayerNormZeroSinglePruned": lambda norm, temb: temb.flatten(1, 2),
}


def modulation_of(module: nn.Module) -> Modulation | None:
    """Of a norm with one gate; None where ada_layer_norm does not do the rest of what the module does."""
    return _MODULATIONS.get(type(module).__name__) if _holds_plain_norm(module) else None


def intercept_adaptive_norm(engine: Engine, module: nn.Module) -> Callable[[], None] | None:
    """Puts our code in place in an AdaLayerNormZero; returns what takes it out again, None for another."""
    if type(module).__name__ != "AdaLayerNormZero" or module.emb is not None or not _holds_plain_norm(module):
        return None
    module._flashomni_engine = engine
    forward = module.forward = MethodType(_forward, module)

    def restore() -> None:
        if module.__dict__.get("forward") is forward:
            del module.forward, module._flashomni_engine

    return restore


def _holds_plain_norm(module: nn.Module) -> bool:
    plain = getattr(module, "norm", None)
    if type(plain) is not nn.LayerNorm or plain.elementwise_affine:
        return False
    return untouched(module) and untouched(plain)


def _forward(
    module: nn.Module,
    x: Tensor,
    timestep=None,
    class_labels=None,
    hidden_dtype=None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One function for all modules: torch.compile makes a graph a function, not a module."""
    if not module._flashomni_engine.enabled:
        return type(module).forward(module, x, timestep, class_labels, hidden_dtype, emb)
    shift, scale, *others = module.linear(module.silu(emb)).to(x.dtype).chunk(6, dim=1)
    return ops.ada_layer_norm(x, scale, shift, eps=module.norm.eps), *others
