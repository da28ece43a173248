"""Scratch tensors that layers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Buffers:
    """Scratch tensors that all layers of an engine share: one a (name, shape, dtype, device).

    What take() returns is valid until the same name is taken again, and holds whatever was last written
    there."""

    def __init__(self) -> None:
        self._tensors: dict[tuple, Tensor] = {}
        self._used: set[tuple] = set()
        self._rows: dict[tuple, list[tuple[Tensor, Tensor]]] = {}

    def take(
        self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """On `like`'s device, and of its dtype unless another is given."""
        dtype = like.dtype if dtype is None else dtype
        key = (name, shape, dtype, like.device)
        self._used.add(key)
        tensor = self._tensors.get(key)
        if tensor is None:
            tensor = self._tensors[key] = new_zeros(shape, dtype, like.device)
        return tensor

    def rows(
        self, names: str, shape: tuple[int, ...], like: Tensor, first: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Rows first .. first + count of the tensors that take() gives for a shape [B, S, H, D], one a letter
        of `names`: as [B, count, H, D] and as [B, count, H * D].

        Made once, as views are a good part of a layer's host time. The tensors are to be taken besides.
        """
        key = (names, shape, like.dtype, like.device, first, count)
        rows = self._rows.get(key)
        if rows is None:
            tensors = [self.take(name, shape, like) for name in names]
            with torch.inference_mode(False):
                cut = [tensor[:, first : first + count] for tensor in tensors]
                rows = self._rows[key] = [(part, part.flatten(2)) for part in cut]
        return rows

    def drop_unused(self) -> None:
        """Frees what has not been taken since the last call: shapes of a run that is over."""
        self._rows = {}
        self._tensors = {key: tensor for key, tensor in self._tensors.items() if key in self._used}
        self._used = set()

    @contextmanager
    def watched(self) -> Iterator[dict[tuple, Tensor]]:
        """Gives a dict that, when it ends, holds what was taken inside: for touch()."""
        before, self._used, taken = self._used, set(), {}
        try:
            yield taken
        finally:
            taken.update((key, self._tensors[key]) for key in self._used)
            self._used |= before

    def touch(self, taken: dict[tuple, Tensor]) -> None:
        """Counts these as taken again, by a replayed graph."""
        self._used.update(taken)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._tensors.values()


def new_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
) -> Tensor:
    """Contiguous zeros that may be written in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
