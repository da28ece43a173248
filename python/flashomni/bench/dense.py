"""The dense bars of a model: diffusers' own code, eager and compiled, with torch's best attention."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashomni.bench import classes

# torch's kernels for long sequences on a GPU; what they refuse (a text encoder's mask) goes to the others.
ATTENTIONS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WARM_UP, STEPS = 1, 2

Call = Callable[[float], Tensor]  # time from 1 to 0 -> the model's output


@dataclass
class Bar:
    """One dense arm. steps: milliseconds of each; total: of a run of `count` steps."""

    name: str
    steps: list[float]
    peak: int | None  # bytes
    classes: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return median(self.steps)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds, the device waited for before and after."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return (perf_counter() - start) * 1e3


def forget_peak(device: torch.device) -> None:
    """Frees what nobody holds, so that the next arm's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def attention(name: str) -> Iterator[None]:
    """Inside, torch's SDPA is the one called `name`; "sdpa" leaves the choice to torch."""
    chosen = ATTENTIONS.get(name)
    if chosen is None:
        with nullcontext():
            yield
        return
    order = [chosen, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


@contextmanager
def without_masks(transformer: nn.Module, position: int | None) -> Iterator[None]:
    """Inside, blocks get None for the mask at `position`: it would keep torch from its fastest kernels, and
    with text of full length it is all True."""
    if position is None:
        yield
        return

    def drop(module: nn.Module, args: tuple) -> tuple:
        return (*args[:position], None, *args[position + 1 :])

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [block.register_forward_pre_hook(drop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compile_blocks(transformer: nn.Module, backend: str) -> None:
    """The repeated blocks, as diffusers advises."""
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


@contextmanager
def compiled(transformer: nn.Module, backend: str) -> Iterator[None]:
    """Inside, the repeated blocks are compiled; afterwards nothing is left of it."""
    torch._dynamo.reset()
    compile_blocks(transformer, backend)
    try:
        yield
    finally:
        for module in transformer.modules():
            module.__dict__.pop("_compiled_call_impl", None)
        torch._dynamo.reset()


class Dense:
    """Measures the dense arms of one transformer. `call` runs it; `count` steps are timed, a few unless the
    whole run is wanted."""

    def __init__(self, transformer: nn.Module, call: Call, mask_argument: int | None, count: int = STEPS):
        self.transformer, self.call, self.mask_argument = transformer, call, mask_argument
        self.device = next(transformer.parameters()).device
        self.count = count
        self.attention = "sdpa"

    def eager(self, tokens: int) -> Bar:
        """With the faster of torch's attention kernels; where the time goes, by class, in one more step."""
        names = list(ATTENTIONS) if self.device.type == "cuda" else ["sdpa"]
        forget_peak(self.device)
        found = {}
        with without_masks(self.transformer, self.mask_argument):
            for name in names:
                with attention(name):
                    found[name] = self._steps(min(self.count, STEPS))
            self.attention = min(found, key=lambda name: median(found[name]))
            bar = Bar(f"dense eager {self.attention}", found[self.attention], peak(self.device))
            with attention(self.attention), classes.watch_dense(self.transformer, tokens) as ledger:
                self.call(0.5)
                bar.classes = ledger.milliseconds()
        return bar

    def again(self, bar: Bar) -> None:
        """More steps of the eager arm, later in the run: a machine that drifts does so for all."""
        with without_masks(self.transformer, self.mask_argument), attention(self.attention):
            bar.steps += self._steps(self.count)

    def compiled(self, backend: str) -> Bar:
        """With the attention that eager() found. backend: of torch.compile, which raises what it raises."""
        forget_peak(self.device)
        with (
            without_masks(self.transformer, self.mask_argument),
            compiled(self.transformer, backend),
            attention(self.attention),
        ):
            self.call(1.0)
            steps = self._steps(self.count)
        return Bar(f"dense compiled {self.attention}", steps, peak(self.device))

    def _steps(self, count: int) -> list[float]:
        for _ in range(WARM_UP):
            self.call(1.0)
        return [timed(lambda i=i: self.call(1 - i / count), self.device) for i in range(count)]
