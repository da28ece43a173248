"""A time ledger: seconds by kind of work. Costs nothing measurable while it is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter

import torch

_NOTHING = nullcontext()


class Ledger:
    """Adds up wall-clock seconds by name while `enabled`. On a GPU it waits for the device at each entry."""

    def __init__(self) -> None:
        self.enabled = False
        self.synchronize = False
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._measure(name) if self.enabled else _NOTHING

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - start)

    def now(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize()
        return perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def clear(self) -> None:
        self.seconds = {}
