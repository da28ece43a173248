"""The numbers of a step where the model's device reads them: forecast coefficients and the ramp f(t)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni import schedule


class StepScalars:
    """A row a step of the run, written once: a step reads its row, and the host waits for nothing.

    A captured graph reads one row for good, into which follow() copies that of the step at hand.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._fixed: Tensor | None = None
        self._following = False
        self._first: dict[tuple[int | None, int], Tensor] = {}  # what first() gave, by step

    def begin(self) -> None:
        """A new run: other steps. The row that graphs read stays where it is."""
        self._table = None
        self._first = {}

    def release(self) -> None:
        self._table = self._fixed = None
        self._first = {}

    def row(self, engine, device: torch.device) -> Tensor:
        """float32 [D + 2]: k^i / i! for i = 0..D, then f(t), of the engine's step."""
        if self._following:
            return self._fixed
        return self._rows(engine, device)[engine.index]

    def first(self, engine, device: torch.device, count: int) -> Tensor:
        """The first `count` of row(): one view for all layers."""
        if not self._following:
            self._rows(engine, device)
        key = (None if self._following else engine.index, count)
        view = self._first.get(key)
        if view is None:
            view = self._first[key] = self.row(engine, device)[:count]
        return view

    def follow(self, engine, device: torch.device) -> None:
        """Brings the row that graphs read to the engine's step."""
        row = self._rows(engine, device)[engine.index]
        if self._fixed is None or self._fixed.device != row.device or self._fixed.shape != row.shape:
            with torch.inference_mode(False):
                self._fixed = torch.empty_like(row)
            self._first = {}
        self._fixed.copy_(row)

    def fixed(self, on: bool) -> None:
        """Whether passes read the row that follow() fills."""
        self._following = on

    def _rows(self, engine, device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device:
            order = engine.config.max_order
            rows = []
            for plan in engine.plans:
                coefficients = schedule.coefficients(order, float(plan.since_update))
                rows.append(torch.cat([coefficients, torch.tensor([plan.ramp])]))
            with torch.inference_mode(False):
                self._table = torch.stack(rows).to(device)
            self._first = {}
        return self._table
