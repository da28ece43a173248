"""CUDA graphs for machines without a GPU: what a capture runs is undone, and a replay runs it again.

A replay may not depend on the host: the operators' numbers must be those of the capture, and what it changes
of the host's state is put back, so that only the engine's journal can have brought it about.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils import _pytree as pytree

from flashomni import ops
from flashomni.engine import graphs
from flashomni.engine.state import LayerState

HOST = ("recorded", "recorded_step", "updated_step", "orders", "reuse_all", "keeps_o")
OPERATORS = (
    "gemm_q",
    "sparse_attention",
    "taylor_update",
    "taylor_forecast",
    "gemm_o_update",
    "gemm_o_dispatch",
)


class StandIn:
    """One for all graphs of an engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine):
        self.engine, self.captures, self.replays = engine, 0, 0
        self.calls: list[tuple] = []
        for name in OPERATORS:
            monkeypatch.setattr(ops, name, self._logged(name, getattr(ops, name)))
        capture = graphs.StepGraphs._capture

        def capture_with_forward(steps, forward, leaves, spec, tensors):
            seen = []

            def watched(*args, **kwargs):
                seen.append((args, kwargs))
                return forward(*args, **kwargs)

            graph = capture(steps, watched, leaves, spec, tensors)
            graph.graph.rerun = lambda: forward(*seen[0][0], **seen[0][1])
            graph.graph.outputs = graph.outputs
            return graph

        monkeypatch.setattr(graphs.StepGraphs, "_capture", capture_with_forward)
        monkeypatch.setattr(graphs.StepGraphs, "_why_not", lambda steps, tensors: None)
        stand_in = self

        class Graph:
            def replay(self) -> None:
                stand_in.replay(self)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)

    def _logged(self, name: str, operator):
        def call(*args, **kwargs):
            numbers = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, (int, float, str))]
            self.calls.append((name, *numbers))
            return operator(*args, **kwargs)

        return call

    def states(self) -> list[LayerState]:
        return list(self.engine.contexts.states())

    def holders(self) -> list:
        """All that has numbers which later steps read."""
        return [each for s in self.states() for each in (s, *s.followed.values())]

    def tensors(self) -> list[torch.Tensor]:
        found = [t for s in self.states() for part in s.tensors().values() for t in part]
        summaries = [s.summary for s in self.states() if s.summary is not None]
        found += [t for each in summaries for t in (each.rows.cache, each.shares, each.awake)]
        return found + list(self.engine.buffers.tensors())

    def host(self) -> list[dict]:
        return [
            {name: getattr(each, name) for name in HOST if hasattr(each, name)} for each in self.holders()
        ]

    def put_back(self, host: list[dict]) -> None:
        for each, values in zip(self.holders(), host, strict=True):
            for name, value in values.items():
                setattr(each, name, value)

    @contextmanager
    def capturing(self, graph, **_):
        self.captures += 1
        before = [(t, t.clone()) for t in self.tensors()]
        graph.host, self.calls = self.host(), []
        yield
        graph.calls = self.calls
        for tensor, content in before:
            tensor.copy_(content)

    def replay(self, graph) -> None:
        self.replays += 1
        after, self.calls = self.host(), []
        if graph.host is not None:  # the first replay stands for the pass that was captured
            self.put_back(graph.host)
            graph.host = None
        self.engine.scalars.fixed(True)
        with self.engine.journal.written():
            result = graph.rerun()
        self.engine.scalars.fixed(False)
        assert self.calls == graph.calls, "a graph does what it was captured doing"
        self.put_back(after)
        for fixed, leaf in zip(graph.outputs, pytree.tree_leaves(result), strict=True):
            fixed.copy_(leaf)
