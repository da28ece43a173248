"""Where a step's time goes, by class of operator, without waiting for the device in between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flashomni.engine.ledger import Ledger

_BLOCKS = r"^(transformer_blocks|single_transformer_blocks|blocks)\.\d+\."
# Modules of diffusers' own path by the engine's names of the same work.
MODULES = {
    "gemm_q": re.compile(_BLOCKS + r"attn1?\.(to_q|add_q_proj)$"),
    "gemm_kv": re.compile(_BLOCKS + r"attn1?\.(to_[kv]|add_[kv]_proj)$"),
    "gemm_o": re.compile(_BLOCKS + r"attn1?\.(to_out\.0|to_add_out)$"),
    "gemm_o+mlp": re.compile(r"^single_transformer_blocks\.\d+\.proj_out$"),  # of both, side by side
    "norm_rope": re.compile(_BLOCKS + r"attn1?\.norm_(added_)?[qk]$"),
    "mlp": re.compile(_BLOCKS + r"(ff|ff_context|ffn|img_mlp|txt_mlp|proj_mlp|act_mlp)$"),
    "cross_attention": re.compile(_BLOCKS + r"attn2$"),
}


class EventLedger(Ledger):
    """The engine's ledger in marks on the stream: nothing waits until milliseconds() is asked."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def __call__(self, name: str):
        return self._span(name)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = self.mark()
        try:
            yield
        finally:
            self.note(name, start)

    def mark(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, name: str, start: Any) -> None:
        self._spans.append((name, start, self.mark()))

    def clear(self) -> None:
        super().clear()
        self._spans = []

    def milliseconds(self) -> dict[str, float]:
        """By name, of the spans since clear(). Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            took = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            found[name] = found.get(name, 0.0) + took
        return found


class _Attention(TorchFunctionMode):
    """Notes torch's SDPA over the image's tokens; not that of text encoders or of cross-attention."""

    def __init__(self, ledger: EventLedger, tokens: int):
        super().__init__()
        self.ledger, self.tokens = ledger, tokens

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        if not query.shape[-2] == key.shape[-2] >= self.tokens:
            return func(*args, **kwargs)
        with self.ledger("attention"):
            return func(*args, **kwargs)


@contextmanager
def watch_dense(transformer: nn.Module, tokens: int) -> Iterator[EventLedger]:
    """Inside, the model's own code is timed by hooks on its modules and a watch on torch's SDPA over at
    least `tokens` tokens."""
    ledger = EventLedger(next(transformer.parameters()).device)
    with ExitStack() as stack:
        for path, module in transformer.named_modules():
            for name, pattern in MODULES.items():
                if pattern.search(path):
                    _watch(module, name, ledger, stack)
        stack.enter_context(_Attention(ledger, tokens))
        yield ledger


def _watch(module: nn.Module, name: str, ledger: EventLedger, stack: ExitStack) -> None:
    starts: list[Any] = []

    def before(*_) -> None:
        starts.append(ledger.mark())

    def after(*_) -> None:
        ledger.note(name, starts.pop())

    for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
        stack.callback(handle.remove)


@contextmanager
def watch_engine(engine, device: torch.device) -> Iterator[EventLedger]:
    """The same for steps through an engine, by its own ledger's names. Not for CUDA graphs."""
    before = engine.ledger
    engine.ledger = EventLedger(device)
    try:
        yield engine.ledger
    finally:
        engine.ledger = before


def sparse_work(classes: dict[str, float], transformer: nn.Module) -> dict[str, float]:
    """Of a dense step's milliseconds by class, what sparsity scales: attention, gemm_q, and of gemm_o what
    reads attention's output; where they follow its rows, mlp, with the rest of that product, and
    cross_attention."""
    joint = [m for path, m in transformer.named_modules() if MODULES["gemm_o+mlp"].search(path)]
    share = joint[0].out_features / joint[0].in_features if joint else 0.0  # as wide as the heads together
    both = classes.get("gemm_o+mlp", 0.0)
    return {
        "attention": classes.get("attention", 0.0),
        "gemm_q": classes.get("gemm_q", 0.0),
        "gemm_o": classes.get("gemm_o", 0.0) + share * both,
        "mlp": classes.get("mlp", 0.0) + (1 - share) * both,
        "cross_attention": classes.get("cross_attention", 0.0),
    }


def merged(classes: dict[str, float]) -> dict[str, float]:
    """By the engine's names: it counts the parallel blocks' joint projection as gemm_o."""
    found = dict(classes)
    joint = found.pop("gemm_o+mlp", 0.0)
    if joint:
        found["gemm_o"] = found.get("gemm_o", 0.0) + joint
    return found
