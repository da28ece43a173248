"""A step of each kind as a CUDA graph: captured once, replayed for all steps after."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flashomni.engine.journal import carry_out


@dataclass
class Graph:
    """One captured pass. Everything that it reads or writes by address is held here."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]
    outputs_spec: pytree.TreeSpec
    written: list
    buffers: dict
    states: list


class StepGraphs:
    """Runs the passes of a model: the first of each key as it is, which allocates all that is kept between
    steps; the second is captured; that graph is replayed for it and for every later one.

    A key is all of the host's state that a pass depends on: the step's kind, its context, the history behind
    it, the inputs' shapes. What differs from step to step is in tensors that the graph reads: inputs,
    coefficients, ramp, symbols.
    """

    def __init__(self, engine, model: nn.Module):
        self.engine, self.model = engine, model
        self._graphs: dict[Hashable, Graph | None] = {}
        self._used: set[Hashable] = set()
        self._pool: Any = None
        self._model_print: tuple | None = None

    def clear(self) -> None:
        self._graphs, self._used, self._pool, self._model_print = {}, set(), None, None

    def begin(self) -> None:
        """A new run. Graphs of a model that has changed since, and those that went unused, are dropped.

        A model that is offloaded between runs comes back to other addresses, while what is seen of it here
        stays the same: its graphs are dropped too.
        """
        print_now = fingerprint(self.model)
        away = any(
            graph is not None and not self._is_on(graph.inputs[0].device) for graph in self._graphs.values()
        )
        if away or print_now != self._model_print:
            self.clear()
            self._model_print = print_now
        self._graphs = {key: graph for key, graph in self._graphs.items() if key in self._used}
        self._used = set()

    def run(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """forward(*args, **kwargs), from a graph where that can be."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        reason = self._why_not(tensors)
        if reason is not None:
            self.engine.stats.note(f"cuda_graphs: {reason}")
            return forward(*args, **kwargs)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (self.engine.outlook(), str(spec), repr(constants), shapes, torch.is_inference_mode_enabled())
        self._used.add(key)
        if key not in self._graphs:
            self._graphs[key] = None
            return forward(*args, **kwargs)
        graph = self._graphs[key]
        first = graph is None
        if first and not self._is_on(tensors[0].device):
            self.engine.stats.note("cuda_graphs: weights are offloaded layer by layer")
            return forward(*args, **kwargs)
        if first:
            graph = self._graphs[key] = self._capture(forward, leaves, spec, tensors)
        return self._replay(graph, tensors, first)

    def _is_on(self, device: torch.device) -> bool:
        """Whether all weights are there."""
        return all(parameter.device == device for parameter in self.model.parameters())

    def _why_not(self, tensors: list[Tensor]) -> str | None:
        engine = self.engine
        if not tensors or not all(t.is_cuda for t in tensors):
            return "an input is not on the GPU"
        if engine.ledger.enabled:
            return "timing waits for the device"
        if engine.plan.kind == "update" and not getattr(engine.policy, "capturable", False):
            return f"policy {type(engine.policy).__name__} is not capturable"
        if torch.cuda.is_current_stream_capturing():
            return "a capture is under way"
        return None

    def _capture(self, forward, leaves: list, spec: pytree.TreeSpec, tensors: list[Tensor]) -> Graph:
        engine, device = self.engine, tensors[0].device
        with torch.inference_mode(False):
            inputs = [_room_for(t) for t in tensors]
        for fixed, tensor in zip(inputs, tensors, strict=True):
            fixed.copy_(tensor)
        fixed = iter(inputs)
        fixed_leaves = [next(fixed) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(fixed_leaves, spec)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        engine.scalars.follow(engine, device)
        engine.scalars.fixed(True)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(device),
                engine.journal.written() as written,
                engine.buffers.watched() as used,
            ):
                with (
                    _no_collection(),
                    torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
                ):
                    result = forward(*args, **kwargs)
                    engine.traffic.join()
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graphs: expected a model whose {engine.plan.kind} step can be captured, got: {error}. "
                "Config(cuda_graphs=False) runs it as it is"
            ) from error
        finally:
            engine.scalars.fixed(False)
        outputs, outputs_spec = pytree.tree_flatten(result)
        for leaf in outputs:
            if leaf is not None and not isinstance(leaf, (Tensor, int, float, str)):
                raise TypeError(
                    f"cuda_graphs: expected a model that returns tensors, got {type(leaf).__name__}"
                )
        states = list(engine.contexts.of(engine.context).values())
        return Graph(graph, inputs, outputs, outputs_spec, written, used, states)

    def _replay(self, graph: Graph, tensors: list[Tensor], first: bool) -> Any:
        for fixed, tensor in zip(graph.inputs, tensors, strict=True):
            fixed.copy_(tensor)
        self.engine.scalars.follow(self.engine, tensors[0].device)
        graph.graph.replay()
        self.engine.buffers.touch(graph.buffers)
        carry_out(graph.written, first=first)
        # The graph's own outputs are overwritten at its next replay.
        outputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in graph.outputs]
        return pytree.tree_unflatten(outputs, graph.outputs_spec)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, no cycles are collected: what lies in them may be CUDA's (an older graph, events), and giving
    it back would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _room_for(tensor: Tensor) -> Tensor:
    """Memory of its own with the same strides: torch's kernels depend on them, and so does how they round."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return torch.empty_like(tensor)  # elements that share memory cannot be written one by one
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def fingerprint(model: nn.Module) -> tuple:
    """What a graph has of a model by address or by its code: it changes when weights move or modules do."""
    tensors = tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers()))
    modules = tuple((id(type(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    return tensors, modules, model.training
