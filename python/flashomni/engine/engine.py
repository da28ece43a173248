"""The engine: a clock, a plan of steps, and the state of every layer between them. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor, nn

from flashomni import schedule
from flashomni.config import Config
from flashomni.engine.buffers import Buffers, bytes_of
from flashomni.engine.graphs import StepGraphs
from flashomni.engine.journal import Journal
from flashomni.engine.kept import Traffic
from flashomni.engine.layer import Attention, LayerRun
from flashomni.engine.ledger import Ledger
from flashomni.engine.scalars import StepScalars
from flashomni.engine.state import Contexts
from flashomni.engine.stats import RunStats, StatsRecorder
from flashomni.policies import Policy

T = TypeVar("T")


class Engine:
    """Runs the attention layers of one model over the steps of a denoising run.

    The clock is begin(num_steps), then step() after every denoising step; between them each call of the model
    is one pass, and the passes of one step (classifier-free guidance) are kept apart as contexts. An engine
    serves one thread at a time; several engines share nothing.
    """

    def __init__(self, config: Config, layers: int, policy: Policy):
        self.config, self.layers, self.policy = config, layers, policy
        self.buffers, self.contexts = Buffers(), Contexts()
        self.ledger, self.stats = Ledger(), StatsRecorder(layers)
        self.journal, self.scalars, self.traffic = Journal(), StepScalars(), Traffic()
        self.graphs: StepGraphs | None = None
        self.plans: list[schedule.StepPlan] = []
        self.index = 0
        self.context: Hashable = 0
        self.enabled = True
        self._pending: Callable[[], int] | None = None
        self._inputs: Hashable = None
        self._names: list[Hashable] = []  # of the passes of this step
        self._seen: set[Hashable] = set()
        self._once: dict[Hashable, object] = {}
        self._started = 0.0

    @property
    def count(self) -> int:
        """Steps of this run."""
        return len(self.plans)

    @property
    def is_new(self) -> bool:
        """Whether no pass of the run has begun yet."""
        return self._pending is not None or (self.index == 0 and not self._names)

    @property
    def plan(self) -> schedule.StepPlan:
        """What the step at hand does."""
        return self.plans[self.index]

    def is_before_update(self) -> bool:
        """Whether an Update comes within max_order steps: what runs dense now can still enter its history."""
        after = self.index + 1
        return any(plan.kind == "update" for plan in self.plans[after : after + self.config.max_order])

    def begin(self, num_steps: int) -> None:
        """A new run of `num_steps` denoising steps: forgets everything of the last one but its memory."""
        plans = schedule.plan(num_steps, self.config)
        self._pending = None
        self.plans, self.index, self._names = plans, 0, []
        self.contexts.reset(self._seen)
        self.buffers.drop_unused()
        self._seen = set()
        self.scalars.begin()
        if self.graphs is not None:
            self.graphs.begin()
        self.ledger.clear()
        self.stats.begin(plans)

    def begin_when_called(self, num_steps: Callable[[], int]) -> None:
        """A new run whose length is asked for at its first pass: by then pipelines know where they start."""
        self._pending = num_steps
        self.plans, self.index, self._names = [], 0, []

    def step(self) -> None:
        """The denoising step is over."""
        self.index += 1
        self._names = []

    def start_pass(self, name: Hashable | None = None, inputs: Hashable = None) -> None:
        """A call of the model begins.

        name: its context, numbered if it comes again within the step (windows of a long video); by default
            the pass' number. inputs: what of the call's inputs the layers' work depends on besides their
            tensors' shapes.

        Raises RuntimeError if no run has begun or the run is over.
        """
        if self._pending is not None:
            elapsed = self.index  # steps that went by while the engine was switched off
            self.begin(self._pending())
            self.index = elapsed
        if self.index >= self.count:
            state = "no run has begun" if not self.plans else f"the run of {self.count} steps is over"
            raise RuntimeError(
                f"flashomni: {state}. A pipeline's scheduler drives the clock by set_timesteps() and step(); "
                "for a bare transformer call engine.begin(num_steps) before a run and engine.step() after "
                "every step, where engine = flashomni.enable(transformer). To call the model outside a run: "
                "`with flashomni.disabled(...)`."
            )
        repeats = self._names.count(name)
        self.context = len(self._names) if name is None else (name, repeats) if repeats else name
        self._inputs = inputs
        self._once.clear()
        self._seen.add(self.context)
        self._names.append(name)
        self._started = self.ledger.now() if self.ledger.enabled else 0.0

    def end_pass(self, completed: bool) -> None:
        """The call of the model is over; one that failed may be tried again in the same context."""
        self._once.clear()
        self.traffic.join()
        if not completed:
            self._names = self._names[:-1]
        elif self.ledger.enabled:
            self.ledger.add("model", self.ledger.now() - self._started)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), worked out once a pass for all layers."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def attend(self, attention: Attention) -> list[Tensor]:
        """One attention layer of the pass at hand: the output projections' results, each [B, rows, N]."""
        return LayerRun(self, attention).run()

    def graph_steps(self, model: nn.Module) -> StepGraphs:
        """From now on the passes that go through the result's run() are replayed from CUDA graphs."""
        self.graphs = StepGraphs(self, model)
        return self.graphs

    def outlook(self) -> Hashable:
        """All of the host's state that the pass at hand depends on, besides its inputs."""
        plan, layers = self.plan, self.contexts.of(self.context)
        if plan.kind == "dispatch":
            late = self.is_before_update()
            states = [
                (state.is_ready(self), state.orders, state.keeps_o)
                + (state.history_of(self) if late and not state.is_ready(self) else ())
                + tuple(followed.orders for followed in state.followed.values())
                for state in layers.values()
            ]
        else:
            states = [state.history_of(self) if plan.record else () for state in layers.values()]
        identities = tuple(map(id, layers.values()))  # a graph holds its states: none is of the same address
        return plan.kind, plan.record, self.context, self._inputs, identities, tuple(states)

    def release(self) -> None:
        """Frees all tensors: the run at hand, if any, has to begin anew."""
        self.buffers, self.contexts = Buffers(), Contexts()
        self.plans, self.index, self._pending = [], 0, None
        self.scalars.release()
        if self.graphs is not None:
            self.graphs.clear()

    def bytes_held(self) -> dict[str, int]:
        """Bytes by what they are for: symbols, cached products, history of O, scratch buffers, and apart from
        these what is in the host's memory for a model on a GPU (host_history)."""
        held = {"symbols": 0, "cached": 0, "history": 0, "buffers": bytes_of(self.buffers.tensors())}
        held["host_history"] = 0
        for state in self.contexts.states():
            for name, tensors in state.tensors().items():
                held[name] += bytes_of(tensors)
        return held

    def run_stats(self) -> RunStats:
        """Statistics of the run at hand, or of the last one."""
        return self.stats.summary(self.index, self.bytes_held(), dict(self.ledger.seconds), self.contexts)
