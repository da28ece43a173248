"""Statistics of a run: which steps it took, how dense they were, where the time and the memory went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

from flashomni.engine.state import Contexts, LayerState
from flashomni.symbols import SparseSymbols

KINDS = ("full", "update", "dispatch")


@dataclass
class RunStats:
    """Of one run. Density = selected share of all (query block, KV block) pairs; dense steps count 1.

    Means are over passes (contexts) and heads; layers that the engine does not run count 1.
    """

    num_steps: int  # planned
    steps_done: int
    step_kinds: list[str]  # of each step done
    steps: dict[str, int]  # steps done by kind
    passes: int  # calls of the model
    density: float
    cache_density: float  # share of active (query block, head) tiles
    density_by_step: list[float]
    density_by_layer: list[float]
    density_by_head: list[list[float]]  # [layer][head], Dispatch steps only; empty where there was none
    bytes_held: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)  # by kind of work, if engine.ledger was enabled
    notes: dict[str, int] = field(default_factory=dict)  # what did not go as planned, with how often
    symbols: dict[tuple[Hashable, int], SparseSymbols] = field(default_factory=dict, repr=False)
    """The symbols of the last Update by (context, layer). They are the engine's own tensors: copy to keep."""

    def as_dict(self) -> dict:
        """Plain numbers, lists and dicts (all but the symbols), for JSON."""
        plain = asdict(replace(self, symbols={}))
        del plain["symbols"]
        return plain

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.steps[kind]} {kind}" for kind in KINDS)
        held = sum(size for kind, size in self.bytes_held.items() if kind != "host_history")
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.bytes_held.items())
        lines = [
            f"steps    {self.steps_done} of {self.num_steps}: {kinds}; {self.passes} passes",
            f"density  {self.density:.3f} of block pairs, {self.cache_density:.3f} of tiles active",
            f"memory   {held / 2**20:.1f} MiB ({parts})",
        ]
        if self.seconds:
            by_size = sorted(self.seconds.items(), key=lambda item: -item[1])
            lines.append("seconds  " + ", ".join(f"{name} {value:.2f}" for name, value in by_size))
        lines += [f"note     {text} ({times}x)" for text, times in self.notes.items()]
        return "\n".join(lines)


def together(parts: list[RunStats]) -> RunStats:
    """Of models that take turns in one run: the layers of each are numbered on from those before."""
    if len(parts) == 1:
        return parts[0]
    longest = max(parts, key=lambda part: part.steps_done)
    weights = [part.passes * len(part.density_by_layer) for part in parts]
    first = [sum(len(part.density_by_layer) for part in parts[:i]) for i in range(len(parts))]

    def mean(name: str) -> float:
        values = [getattr(part, name) for part in parts]
        whole = sum(weights)
        return sum(w * v for w, v in zip(weights, values, strict=True)) / whole if whole else 1.0

    def joined(name: str) -> list:
        return [value for part in parts for value in getattr(part, name)]

    return replace(
        longest,
        passes=sum(part.passes for part in parts),
        density=mean("density"),
        cache_density=mean("cache_density"),
        density_by_step=joined("density_by_step"),
        density_by_layer=joined("density_by_layer"),
        density_by_head=joined("density_by_head"),
        bytes_held=sum_by_name(part.bytes_held for part in parts),
        seconds=sum_by_name(part.seconds for part in parts),
        notes=sum_by_name(part.notes for part in parts),
        symbols={
            (context, start + layer): symbols
            for start, part in zip(first, parts, strict=True)
            for (context, layer), symbols in part.symbols.items()
        },
    )


def sum_by_name(dicts: Iterable[dict]) -> dict:
    total: Counter = Counter()
    for each in dicts:
        total.update(each)
    return dict(total)


class StatsRecorder:
    """Collects while a run goes on; keeps references to small device tensors and reads none of them."""

    def __init__(self, layers: int):
        self.layers = layers
        self.begin([])

    def begin(self, plans: list) -> None:
        self.plans = plans
        self.entries: list[tuple[int, Hashable, int, str, Tensor | None, Tensor | None]] = []
        self.notes: Counter[str] = Counter()

    def note(self, text: str) -> None:
        self.notes[text] += 1

    def record(self, step: int, context: Hashable, layer: int, kind: str, state: LayerState) -> None:
        sparse = kind == "dispatch"
        density, cache = (state.density, state.cache_density) if sparse else (None, None)
        self.entries.append((step, context, layer, kind, density, cache))

    def summary(
        self, steps_done: int, bytes_held: dict[str, int], seconds: dict[str, float], contexts: Contexts
    ) -> RunStats:
        kinds = [plan.kind for plan in self.plans[:steps_done]]
        passes = {(step, context) for step, context, *_ in self.entries}
        # A layer that the engine never ran counts 1 in every pass.
        by_step: dict[int, list[float]] = {step: [] for step, _ in passes}
        by_layer: list[list[float]] = [[] for _ in range(self.layers)]
        heads: list[list[Tensor]] = [[] for _ in range(self.layers)]
        tiles: list[float] = []
        for step, _, layer, _, density, cache in self.entries:
            value = 1.0 if density is None else float(density.mean())
            by_step[step].append(value)
            by_layer[layer].append(value)
            tiles.append(1.0 if cache is None else float(cache.mean()))
            if density is not None:
                heads[layer].append(density)
        passes_of = Counter(step for step, _ in passes)
        expected = len(passes) * self.layers
        missing = expected - len(self.entries)
        everything = [value for values in by_layer for value in values] + [1.0] * missing
        return RunStats(
            num_steps=len(self.plans),
            steps_done=steps_done,
            step_kinds=kinds,
            steps={kind: kinds.count(kind) for kind in KINDS},
            passes=len(passes),
            density=_mean(everything),
            cache_density=_mean(tiles + [1.0] * missing),
            density_by_step=[
                _mean(values + [1.0] * (passes_of[step] * self.layers - len(values)))
                for step, values in sorted(by_step.items())
            ],
            density_by_layer=[_mean(values) for values in by_layer],
            density_by_head=[
                (sum(h.double() for h in found) / len(found)).tolist() if found else [] for found in heads
            ],
            bytes_held=bytes_held,
            seconds=seconds,
            notes=dict(self.notes),
            symbols={
                (context, layer): state.symbols
                for context in contexts.names()
                for layer in range(self.layers)
                if (state := contexts.get(context, layer)) is not None and state.updated_step >= 0
            },
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
