"""What a pass does to the host's state, so that a replayed graph can do it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Entry = Callable[[], None]


class Journal:
    """Carries entries out; while a pass is captured, also writes them down.

    An entry must not hold tensors of the pass: they would outlive it.
    """

    def __init__(self) -> None:
        self._written: list[tuple[bool, Entry]] | None = None

    def now(self, entry: Entry) -> None:
        """For what the rest of the pass reads."""
        entry()
        if self._written is not None:
            self._written.append((True, entry))

    def later(self, entry: Entry) -> None:
        """For what works on the pass' results: under capture there are none yet."""
        if self._written is None:
            entry()
        else:
            self._written.append((False, entry))

    @contextmanager
    def written(self) -> Iterator[list[tuple[bool, Entry]]]:
        """Inside, entries are written down in the list that it gives."""
        self._written = []
        try:
            yield self._written
        finally:
            self._written = None


def carry_out(written: list[tuple[bool, Entry]], *, first: bool) -> None:
    """After a replay. The first one follows the capture, when what had to be done at once was done."""
    for at_once, entry in written:
        if not (first and at_once):
            entry()
