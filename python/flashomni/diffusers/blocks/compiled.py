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
from torch import Tensor, nn

from flashomni.ops._dispatch import define

_numbers = itertools.count()
_owners: weakref.WeakValueDictionary[int, InGraph] = weakref.WeakValueDictionary()
_addresses: weakref.WeakValueDictionary[int, InGraph] = weakref.WeakValueDictionary()  # of their numbers


class InGraph:
    """A callable that takes tensors, tuples of them, integers or None by name, and returns tensors."""

    def enroll(self, module: nn.Module) -> None:
        """Gives it a number. Its `engine` must be there.

        The number lies where the weights of `module` do, which it stands in for: where an argument of an
        operator is on the CPU, torch takes its results on the GPU to be badly aligned. Quantized layers can
        be without parameters: then on the CPU.
        """
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu" if device.type == "meta" else device)
        _owners[number] = _addresses[self.number.data_ptr()] = self

    def run(self, arguments: dict[str, Any]) -> Any:
        """The call itself, once the graph runs."""
        return self(**arguments)

    def trace(self, arguments: dict[str, Any], like: Sequence[str]) -> list[Tensor]:
        """While a graph is traced: the operator. like: arguments that have the results' shapes; of several,
        "a+b", a result has all the rows."""
        names, tensors, places = [], [], {}
        for name, value in arguments.items():
            places[name] = len(tensors)
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
        # Each tensor once: what a compiler makes for an operator it makes as often as it is named.
        parts = [[places[name] for name in one.split("+")] for one in like]
        counts, flat = [len(one) for one in parts], [place for one in parts for place in one]
        return _operator(self.number, ",".join(names), counts, flat, tensors)


def _call(
    number: Tensor, names: str, counts: Sequence[int], like: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    owner = _owner_of(number)
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


def _owner_of(number: Tensor) -> InGraph:
    """Known by its address without waiting for the GPU."""
    known = _addresses.get(number.data_ptr())
    return known if known is not None else _owners[int(number)]


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


def _fake(
    number: Tensor, names: str, counts: Sequence[int], like: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    places = iter(like)
    parts = [[tensors[i] for i in itertools.islice(places, count)] for count in counts]
    return [of[0].new_empty(of[0].shape[0], sum(t.shape[1] for t in of), *of[0].shape[2:]) for of in parts]


_operator = define(
    "layer(Tensor number, str names, int[] counts, int[] like, Tensor[] tensors) -> Tensor[]",
    _call,
    _fake,
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay by torch would leave out what the engine does on the host
)
