"""Our code inside compiled blocks: one operator, so that the graph holds nothing of the engine's state.

A block that torch.compile traces sees flashomni::layer, whose first argument is a number in a tensor: all
layers of a kind share one graph, and steps of every kind run through it. What the operator does is our eager
code.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.ops._dispatch import define

_numbers = itertools.count()
_owners: weakref.WeakValueDictionary[int, InGraph] = weakref.WeakValueDictionary()


class InGraph:
    """A callable that takes tensors, tuples of them, integers or None by name, and returns tensors."""

    def enroll(self) -> None:
        """Gives it a number. Its `engine` must be there."""
        number = next(_numbers)
        _owners[number] = self
        self.number = torch.tensor(number)

    def run(self, arguments: dict[str, Any]) -> Any:
        """The call itself, once the graph runs."""
        return self(**arguments)

    def trace(self, arguments: dict[str, Any], like: list[Tensor]) -> list[Tensor]:
        """While a graph is traced: the operator. like: tensors of the results' shapes."""
        names, tensors = [], []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                names.append(name)
                tensors.append(value)
            elif isinstance(value, (tuple, list)) and all(isinstance(each, Tensor) for each in value):
                names.append(f"{name}:{len(value)}")
                tensors.extend(value)
            elif isinstance(value, int):
                names.append(f"{name}={int(value)}")
            elif value is not None and value != {}:
                raise NotImplementedError(
                    f"{name}: expected tensors in a compiled block, got {type(value).__name__}; compile the "
                    "model after flashomni.disable()"
                )
        return _operator(self.number, ",".join(names), like, tensors)


def _call(number: Tensor, names: str, like: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    owner = _owners[int(number)]
    arguments, given = {}, iter(tensors)
    for entry in names.split(","):
        if "=" in entry:
            name, _, value = entry.partition("=")
            arguments[name] = int(value)
            continue
        name, _, count = entry.partition(":")
        if not count:
            arguments[name] = next(given)
            continue
        values = tuple(itertools.islice(given, int(count)))
        # The same tuple for all layers of a pass, as in eager mode: what is made of it is made once.
        key = (name, tuple((value.data_ptr(), value.shape) for value in values))
        arguments[name] = owner.engine.once(key, lambda values=values: values)
    results = owner.run(arguments)
    return _apart([results] if isinstance(results, Tensor) else list(results))


def _apart(results: list[Tensor]) -> list[Tensor]:
    """As an operator may return them: contiguous, none in another's memory."""
    seen, found = set(), []
    for result in results:
        result = result.contiguous()
        if result.untyped_storage().data_ptr() in seen:
            result = result.clone()
        seen.add(result.untyped_storage().data_ptr())
        found.append(result)
    return found


def _fake(number: Tensor, names: str, like: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(each, memory_format=torch.contiguous_format) for each in like]


_operator = define(
    "layer(Tensor number, str names, Tensor[] like, Tensor[] tensors) -> Tensor[]", _call, _fake
)
